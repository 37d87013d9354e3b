"""Formats on disk: score files, masks, id lists, and a data set made of them."""

from cpseg._internal.safe_files import atomic, read_tensors, write_tensors, write_text
from cpseg.core.class_map import ClassMap, parse_class_map, read_class_map
from cpseg.core.palette import Palette, parse_palette, read_palette
from cpseg.core.score_reading import ScoreReading
from cpseg.files.annotations import Annotated
from cpseg.files.brush_tasks import read_brush_tasks, write_brush_tasks
from cpseg.files.coco import read_coco, write_coco
from cpseg.files.cvat import read_cvat, write_cvat
from cpseg.files.dataset import ScoreFolder, Source
from cpseg.files.folds import Folds, cross_fit, read_folds, write_folds
from cpseg.files.geotiff import label_raster, read_mosaic, write_geotiff, write_mosaic
from cpseg.files.id_lists import Pair, read_ids, write_ids
from cpseg.files.masks import VOID, image_size, palette, read_image, read_mask, write_mask
from cpseg.files.run_folder import output_path
from cpseg.files.run_lengths import (
    decode_brush_rle,
    decode_coco_rle,
    encode_brush_rle,
    encode_coco_rle,
)
from cpseg.files.score_files import find_scores, read_features, read_scores, write_evidence
from cpseg.files.score_folder import ScoreRecord, record_scores

__all__ = [
    "VOID",
    "Annotated",
    "ClassMap",
    "Folds",
    "Pair",
    "Palette",
    "ScoreFolder",
    "ScoreReading",
    "ScoreRecord",
    "Source",
    "atomic",
    "cross_fit",
    "decode_brush_rle",
    "decode_coco_rle",
    "encode_brush_rle",
    "encode_coco_rle",
    "find_scores",
    "image_size",
    "label_raster",
    "output_path",
    "palette",
    "parse_class_map",
    "parse_palette",
    "read_brush_tasks",
    "read_class_map",
    "read_coco",
    "read_cvat",
    "read_features",
    "read_folds",
    "read_ids",
    "read_image",
    "read_mask",
    "read_mosaic",
    "read_palette",
    "read_scores",
    "read_tensors",
    "record_scores",
    "write_brush_tasks",
    "write_coco",
    "write_cvat",
    "write_evidence",
    "write_folds",
    "write_geotiff",
    "write_ids",
    "write_mask",
    "write_mosaic",
    "write_tensors",
    "write_text",
]
