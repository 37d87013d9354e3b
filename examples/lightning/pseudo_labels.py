"""Labelled and pseudo-labelled images in Lightning: a data module, a module, and a command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

import cpseg

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class PseudoLabels(lightning.LightningDataModule):
    """Crops of labelled and pseudo-labelled images, and whole validation images.

    Args:
        root: the folder that id lists are relative to.
        ids: id list of the unlabelled images.
        probs: folder of score files.
        calibration: file written by ``cpseg calibrate``.
        labelled: id list of labelled images with masks, or None.
        validation: id list of validation images with masks, or None.
        crop: side of the crops for training.
        batch_size: rows per step.
        workers: processes that read rows.
        repeat_labelled: how often every labelled image occurs in an epoch.
    """

    def __init__(
        self,
        root: str | Path,
        ids: str | Path,
        probs: str | Path,
        calibration: str | Path,
        *,
        labelled: str | Path | None = None,
        validation: str | Path | None = None,
        crop: int = 512,
        batch_size: int = 4,
        workers: int = 4,
        repeat_labelled: int = 1,
    ) -> None:
        super().__init__()
        self.root, self.ids, self.probs = root, ids, probs
        self.calibration = cpseg.Calibration.load(calibration)
        self.labelled, self.validation = labelled, validation
        self.crop, self.repeat_labelled = crop, repeat_labelled
        self.batch_size, self.workers = batch_size, workers

    @property
    def num_classes(self) -> int:
        """The number of classes of the calibration."""
        assert self.calibration.num_classes is not None
        return self.calibration.num_classes

    def setup(self, stage: str | None = None) -> None:
        """Find all files; every process of a training run does this once."""
        self.train_rows = cpseg.PseudoLabelled.from_folders(
            self.root,
            self.ids,
            self.probs,
            self.calibration,
            labelled=self.labelled,
            repeat_labelled=self.repeat_labelled,
            transform=cpseg.WeakAugmentation(self.crop),
            mean=MEAN,
            std=STD,
            as_dict=True,
        )
        if self.validation is not None:
            self.validation_rows = cpseg.PseudoLabelled.from_folders(
                self.root,
                None,
                self.probs,
                self.calibration,
                labelled=self.validation,
                mean=MEAN,
                std=STD,
                as_dict=True,
            )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches of crops."""
        return DataLoader(
            self.train_rows,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Whole images one by one; nothing where there is no list."""
        if self.validation is None:
            return []
        return DataLoader(self.validation_rows, 1, num_workers=self.workers)


class Segmentation(lightning.LightningModule):
    """A network trained on labels that are weighted by their certainty.

    Args:
        network: from images ``[B, 3, H, W]`` to logits ``[B, K, h, w]``, or to an output of
            transformers with ``logits``.
        num_classes: K.
        lr: learning rate of AdamW.
    """

    def __init__(self, network: nn.Module, num_classes: int, *, lr: float = 6e-5) -> None:
        super().__init__()
        self.network, self.lr = network, lr
        self.register_buffer("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64))

    def logits(self, images: Tensor) -> Tensor:
        """Logits at the size of the images."""
        output = self.network(images)
        logits = getattr(output, "logits", output)
        return interpolate(logits, size=images.shape[-2:], mode="bilinear")

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Cross-entropy of the pixels that have a label, times their certainty."""
        loss = cpseg.pseudo_label_loss(
            self.logits(batch["pixel_values"]), batch["labels"], certainty=batch["weights"]
        )
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start to count anew."""
        self.confusion.zero_()

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Count true and predicted classes."""
        predicted = self.logits(batch["pixel_values"]).argmax(1)
        self.confusion += cpseg.confusion_matrix(
            predicted, batch["labels"], num_classes=len(self.confusion)
        )

    def on_validation_epoch_end(self) -> None:
        """The mIoU over the images of all processes."""
        confusion = self.all_gather(self.confusion).reshape(-1, *self.confusion.shape).sum(0)
        self.log("val_miou", cpseg.mean_iou(confusion), prog_bar=True, rank_zero_only=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def segformer(name: str, num_classes: int) -> nn.Module:
    """A SegFormer by its name on the hub, or a small random one for the name ``random``."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    if name == "random":
        sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
        sizes["num_attention_heads"] = [1, 1, 2, 2]
        return SegformerForSemanticSegmentation(SegformerConfig(num_labels=num_classes, **sizes))
    return SegformerForSemanticSegmentation.from_pretrained(name, num_labels=num_classes)


def main(words: list[str] | None = None) -> None:
    """Train by the command's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("root", "ids", "probs", "calibration"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--labelled", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--network", default="nvidia/mit-b0", help="or 'random'")
    for name, default in (("crop", 512), ("batch-size", 4), ("workers", 4), ("epochs", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeat-labelled", type=int, default=1)
    options = vars(parser.parse_args(words))
    network, epochs = options.pop("network"), options.pop("epochs")
    data = PseudoLabels(**options)
    model = Segmentation(segformer(network, data.num_classes), data.num_classes)
    lightning.Trainer(max_epochs=epochs).fit(model, data)


if __name__ == "__main__":
    main()
