"""The small files that name the classes of a layout to its loader, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cpseg.core.palette import voc_colour
from cpseg.files.layouts import LAYOUTS, Layout


def config_of(
    layout: Layout, names: Sequence[str], *, suffix: str, validates: bool
) -> tuple[str, str]:
    """Name and text of the file beside the images that a loader or its user needs.

    Args:
        layout: the layout.
        names: of the classes.
        suffix: of the images.
        validates: whether there is a validation split.
    """
    if layout.name == "yolo":
        return "data.yaml", _data_yaml(names, validates=validates)
    if layout.name == "mmseg":
        return "dataset.py", _mmseg_config(names, suffix=suffix, validates=validates)
    return "classes.txt", "".join(f"{name}\n" for name in names)


def usage_of(layout: str, out: Path, num_classes: int | None) -> list[str]:
    """Lines that say how a folder is used."""
    count = "K" if num_classes is None else num_classes
    if layout == "yolo":
        return [f"yolo semantic train model=yolo26n-sem.yaml data={out / 'data.yaml'}"]
    if layout == "mmseg":
        return [
            f"in an MMSegmentation config: '{out / 'dataset.py'}' in _base_ as the data set, and",
            f"model = dict(decode_head=dict(num_classes={count}))",
        ]
    chosen = LAYOUTS[layout]
    where = f"data_prefix=dict(img_path='{chosen.images}', seg_map_path='{chosen.masks}')"
    where = where.format(chosen.splits[0], chosen.splits[0])
    lists = "" if chosen.lists is None else f"ann_file='{chosen.lists[0]}', "
    zero = ", reduce_zero_label=True" if chosen.counts_from_one else ""
    values = "0 is void and class + 1 the value" if chosen.counts_from_one else "255 is void"
    return [
        f"in masks {values}; classes.txt has a class per line. In MMSegmentation:",
        f"dict(type='BaseSegDataset', data_root='{out}', {lists}{where}{zero})",
    ]


def _data_yaml(names: Sequence[str], *, validates: bool) -> str:
    lines = ["# Written by cpseg label. Paths are relative to this file; 255 in masks is ignored."]
    lines += ["train: train.txt"]
    if validates:
        lines += ["val: val.txt"]
    else:
        lines += ["val: train.txt  # no --validation was given: figures are of the training labels"]
    lines += ["masks_dir: annotations", "names:"]
    lines += [f"  {k}: {json.dumps(name, ensure_ascii=False)}" for k, name in enumerate(names)]
    return "\n".join(lines) + "\n"


def _mmseg_config(names: Sequence[str], *, suffix: str, validates: bool) -> str:
    palette = [list(voc_colour(index)) for index in range(len(names))]
    text = f"""\
# Written by cpseg label: a data set for the list _base_ of an MMSegmentation config.
# Set model = dict(decode_head=dict(num_classes={len(names)}),
#                  data_preprocessor=dict(size=crop_size)) in that config.
data_root = '{{{{ fileDirname }}}}'
crop_size = (512, 512)
metainfo = dict(
    classes={list(names)!r},
    palette={palette!r})
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        ann_file='names.txt',
        data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'),
        img_suffix={suffix!r},
        seg_map_suffix='.png',
        metainfo=metainfo,
        pipeline=train_pipeline))
"""
    if not validates:
        return (
            text
            + """\
# No --validation was given, so there is nothing to validate on. In the config that has this file
# in _base_ write:
# val_cfg = val_dataloader = val_evaluator = None
# test_cfg = test_dataloader = test_evaluator = None
"""
        )
    return (
        text
        + f"""\
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        ann_file='names_val.txt',
        data_prefix=dict(img_path='img_dir/val', seg_map_path='ann_dir/val'),
        img_suffix={suffix!r},
        seg_map_suffix='.png',
        metainfo=metainfo,
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
"""
    )
