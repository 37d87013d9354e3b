"""Loops built like those of UniMatch, UniMatch-V2 and AllSpark, small enough for a CPU.

Batches, cutmix, masks and losses have the structure of those codebases; what cpseg adds are the
lines that docs/integrations names, each in one place (``test_clients.py`` compares the texts).
"""

from __future__ import annotations

import math
import os
import random
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

import cpseg

K = 4
Config = dict[str, Any]


# --- data --------------------------------------------------------------------------------------


class Listed(Dataset[Any]):
    """Images of an id list: ``labelled``, ``whole`` (no augmentation) or ``unlabelled`` views.

    ``views`` is ``"unimatch"`` or ``"allspark"``. ``masks_u`` is the AllSpark patch: unlabelled
    images come with their mask, padded with 255 like a labelled one.
    """

    def __init__(
        self,
        root: Path,
        ids: Path,
        mode: str,
        size: int,
        *,
        nsample: int | None = None,
        views: str = "unimatch",
        masks_u: bool = False,
    ) -> None:
        self.ids = ids.read_text().splitlines()
        if nsample is not None:
            self.ids *= math.ceil(nsample / len(self.ids))
            self.ids = self.ids[:nsample]
        self.root, self.mode, self.size = root, mode, size
        self.views, self.masks_u = views, masks_u

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: int) -> Any:
        line = self.ids[item]
        img = Image.open(os.path.join(self.root, line.split(" ")[0])).convert("RGB")
        mask = Image.fromarray(np.array(Image.open(os.path.join(self.root, line.split(" ")[1]))))
        if self.mode == "whole":
            return (*normalize(img, mask), line)
        img, mask = resized(img, mask)
        ignore_value = 254 if self.mode == "unlabelled" else 255
        if self.masks_u:
            ignore_value = 255
        img, mask = cropped(img, mask, self.size, ignore_value)
        if self.mode == "labelled":
            return normalize(img, mask)
        if self.views == "allspark":
            if self.masks_u:
                return normalize(img, mask)
            return normalize(img)
        img, target = normalize(img, mask)
        ignore_mask = torch.zeros_like(target)
        ignore_mask[target == 254] = 255
        views = [img, strong(img), strong(img)]
        return (*views, ignore_mask, box(self.size), box(self.size))


def normalize(img: Image.Image, mask: Image.Image | None = None) -> Any:
    pixels = torch.from_numpy(np.array(img)).movedim(-1, 0).float() / 255
    if mask is None:
        return pixels
    return pixels, torch.from_numpy(np.array(mask)).long()


def resized(img: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    factor = random.uniform(0.5, 2)
    size = (max(1, round(img.width * factor)), max(1, round(img.height * factor)))
    return img.resize(size, Image.Resampling.BILINEAR), mask.resize(size, Image.Resampling.NEAREST)


def cropped(
    img: Image.Image, mask: Image.Image, size: int, ignore_value: int
) -> tuple[Image.Image, Image.Image]:
    border = (0, 0, max(0, size - img.width), max(0, size - img.height))
    img = ImageOps.expand(img, border, fill=0)
    mask = ImageOps.expand(mask, border, fill=ignore_value)
    x, y = random.randint(0, img.width - size), random.randint(0, img.height - size)
    place = (x, y, x + size, y + size)
    img, mask = img.crop(place), mask.crop(place)
    if random.random() < 0.5:
        img, mask = ImageOps.mirror(img), ImageOps.mirror(mask)
    return img, mask


def strong(img: Tensor) -> Tensor:
    return (img * random.uniform(0.5, 1.5)).clamp(max=1)


def box(size: int) -> Tensor:
    """A cutmix box, or none."""
    mask = torch.zeros(size, size)
    if random.random() < 0.7:
        y, x = random.randint(0, size // 2), random.randint(0, size // 2)
        mask[y : y + size // 2, x : x + size // 2] = 1
    return mask


def loader(data: Dataset[Any], cfg: Config, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, cfg["batch_size"], shuffle=True, drop_last=True, generator=generator)


# --- models ------------------------------------------------------------------------------------


class Net(nn.Module):
    """A DeepLab in small: features at a quarter, perturbed if wanted, logits at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)
        )
        self.head = nn.Conv2d(8, K, 1)

    def forward(self, x: Tensor, need_fp: bool = False, comp_drop: bool = False) -> Any:
        size, features = x.shape[-2:], self.backbone(x)
        if need_fp:
            both = torch.cat([features, nn.functional.dropout2d(features, 0.5)])
            return self.decode(both, size).chunk(2)
        if comp_drop:  # channels that one half loses, the other has
            first, second = features.chunk(2)
            kept = 2 * torch.bernoulli(0.5 * torch.ones_like(first[:, :, :1, :1]))
            features = torch.cat([first * kept, second * (2 - kept)])
        return self.decode(features, size)

    def decode(self, features: Tensor, size: torch.Size) -> Tensor:
        return interpolate(self.head(features), size, mode="bilinear", align_corners=False)


class AllSpark(nn.Module):
    """Features at 1/32, a memory of ``(image_size // 32 + 1) ** 2`` cells, two equal halves."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 33, 32, 16)
        self.head = nn.Conv2d(8, K, 1)
        self.register_buffer("memory", torch.zeros(K, (image_size // 32 + 1) ** 2))
        self.pseudo_prob_map: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        e4 = self.backbone(x)
        if self.training:
            labelled, unlabelled = e4.split(len(e4) // 2)
            assert self.pseudo_prob_map is not None
            with torch.no_grad():
                small = interpolate(self.pseudo_prob_map, e4.shape[-2:], mode="bilinear")
                self.memory.copy_(small.flatten(2).mean(0))
            attended = labelled + unlabelled.mean((-2, -1), keepdim=True)
            e4 = torch.cat([attended, unlabelled])
        return interpolate(self.head(e4), x.shape[-2:], mode="bilinear", align_corners=False)


# --- loops -------------------------------------------------------------------------------------


def begin(epoch: int, cfg: Config) -> None:
    """Every epoch draws the same, whether the run was stopped before it or not."""
    random.seed(cfg["seed"] + epoch)
    torch.manual_seed(cfg["seed"] + epoch)


def save(folder: Path, **parts: Any) -> None:
    torch.save(parts, folder / "latest.pth")


def latest(folder: Path) -> dict[str, Any] | None:
    file = folder / "latest.pth"
    return torch.load(file, weights_only=True) if file.exists() else None


def supervised(
    root: Path, ids: Path, folder: Path, cfg: Config, *, patched: bool = False
) -> list[float]:
    """``supervised.py`` and ``train_baseline_sup.py``: the labelled list alone; mean losses."""
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    torch.manual_seed(cfg["seed"])
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), cfg["lr"], momentum=0.9)
    trainset = Listed(root, ids, "labelled", cfg["crop_size"])
    history = []
    for epoch in range(cfg["stop"]):
        begin(epoch, cfg)
        model.train()
        losses = []
        for img, mask in loader(trainset, cfg, epoch):
            pred = model(img)
            if patched:
                loss = criterion(pred, mask) if (mask != 255).any() else 0 * pred.sum()
            else:
                loss = criterion(pred, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        history.append(float(np.mean(losses)))
        save(folder, model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
    return history


def unimatch(
    root: Path,
    ids_x: Path,
    ids_u: Path,
    folder: Path,
    cfg: Config,
    *,
    cal: cpseg.OnlineThreshold | None = None,
    weight: float | str | None = None,
) -> list[dict[str, float]]:
    """``unimatch.py``; ``weight`` is a number, or ``"schedule"`` for the line of Stage II."""
    criterion_l = nn.CrossEntropyLoss(ignore_index=255)
    criterion_u = nn.CrossEntropyLoss(reduction="none")
    trainset_u = Listed(root, ids_u, "unlabelled", cfg["crop_size"])
    trainset_l = Listed(root, ids_x, "labelled", cfg["crop_size"], nsample=len(trainset_u))
    torch.manual_seed(cfg["seed"])
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), cfg["lr"], momentum=0.9)
    first, history = 0, []
    checkpoint = latest(folder)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["epoch"] + 1
        if "cal" in checkpoint:
            cal.load_state_dict(checkpoint["cal"])
    for epoch in range(first, cfg["stop"]):
        begin(epoch, cfg)
        loaders = [loader(trainset_l, cfg, epoch)]
        loaders += [loader(trainset_u, cfg, epoch), loader(trainset_u, cfg, epoch + 999)]
        for (
            (img_x, mask_x),
            (img_u_w, img_u_s1, img_u_s2, ignore_mask, cutmix_box1, cutmix_box2),
            (img_u_w_mix, img_u_s1_mix, img_u_s2_mix, ignore_mask_mix, _, _),
        ) in zip(*loaders, strict=True):
            with torch.no_grad():
                model.eval()
                pred_mix = model(img_u_w_mix).detach()
                conf_mix, mask_mix = pred_mix.softmax(dim=1).max(dim=1)[0], pred_mix.argmax(dim=1)
            model.train()
            preds, preds_fp = model(torch.cat((img_x, img_u_w)), need_fp=True)
            pred_x, pred_u_w = preds.split([len(img_x), len(img_u_w)])
            pred_u_w_fp = preds_fp[len(img_x) :]
            if cal is not None:
                cfg["conf_thresh"] = cal.update(pred_x, mask_x).sync().threshold()
            strong_views = (
                mixed(img_u_s1, img_u_s1_mix, cutmix_box1),
                mixed(img_u_s2, img_u_s2_mix, cutmix_box2),
            )
            pred_u_s1, pred_u_s2 = model(torch.cat(strong_views)).chunk(2)
            pred_u_w = pred_u_w.detach()
            conf_u_w, mask_u_w = pred_u_w.softmax(dim=1).max(dim=1)[0], pred_u_w.argmax(dim=1)

            def consistency(
                pred: Tensor,
                cutmix_box: Tensor,
                own: tuple[Tensor, ...] = (mask_u_w, conf_u_w, ignore_mask),
                other: tuple[Tensor, ...] = (mask_mix, conf_mix, ignore_mask_mix),
            ) -> Tensor:
                mask, conf, ignore = (
                    mixed(a, b, cutmix_box) for a, b in zip(own, other, strict=True)
                )
                kept = (conf >= cfg["conf_thresh"]) & (ignore != 255)
                return (criterion_u(pred, mask) * kept).sum() / (ignore != 255).sum().item()

            loss_x = criterion_l(pred_x, mask_x)
            loss_u_s1 = consistency(pred_u_s1, cutmix_box1)
            loss_u_s2 = consistency(pred_u_s2, cutmix_box2)
            loss_u_w_fp = consistency(pred_u_w_fp, torch.zeros_like(cutmix_box1))
            loss_u = loss_u_s1 * 0.25 + loss_u_s2 * 0.25 + loss_u_w_fp * 0.5
            if weight is None:
                loss = (loss_x + loss_u_s1 * 0.25 + loss_u_s2 * 0.25 + loss_u_w_fp * 0.5) / 2.0
            else:
                w = weight
                if weight == "schedule":
                    start = 3 * cfg["epochs"] // 4
                    w = 0.01 * math.exp(-5 * max(0, (epoch - start) / (cfg["epochs"] - start)))
                loss = (1 - w) * loss_x + w * loss_u
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept = (conf_u_w >= cfg["conf_thresh"]) & (ignore_mask != 255)
            history.append(
                {
                    "loss": loss.item(),
                    "loss_x": loss_x.item(),
                    "loss_u": loss_u.item(),
                    "mask": float(kept.sum() / (ignore_mask != 255).sum()),
                    "thresh": float(cfg["conf_thresh"]),
                }
            )
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if cal is not None:
            checkpoint["cal"] = cal.state_dict()
        save(folder, **checkpoint, epoch=epoch)
    return history


def mixed(own: Tensor, other: Tensor, cutmix_box: Tensor) -> Tensor:
    """``other`` inside the box."""
    inside = cutmix_box if own.ndim == 3 else cutmix_box.unsqueeze(1)
    return torch.where(inside == 1, other, own)


def unimatch_v2(
    root: Path,
    ids_x: Path,
    ids_u: Path,
    folder: Path,
    cfg: Config,
    *,
    cal: cpseg.OnlineThreshold | None = None,
    weight: float | str | None = None,
) -> list[dict[str, float]]:
    """``unimatch_v2.py``: an EMA teacher, complementary dropout, cutmix with the flipped batch."""
    criterion_l = nn.CrossEntropyLoss(ignore_index=255)
    criterion_u = nn.CrossEntropyLoss(reduction="none")
    trainset_u = Listed(root, ids_u, "unlabelled", cfg["crop_size"])
    trainset_l = Listed(root, ids_x, "labelled", cfg["crop_size"], nsample=len(trainset_u))
    torch.manual_seed(cfg["seed"])
    model = Net()
    model_ema = deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), cfg["lr"])
    first, history = 0, []
    checkpoint = latest(folder)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        model_ema.load_state_dict(checkpoint["model_ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["epoch"] + 1
        if "cal" in checkpoint:
            cal.load_state_dict(checkpoint["cal"])
    for epoch in range(first, cfg["stop"]):
        begin(epoch, cfg)
        model.train()
        loaders = loader(trainset_l, cfg, epoch), loader(trainset_u, cfg, epoch)
        for i, ((img_x, mask_x), batch_u) in enumerate(zip(*loaders, strict=True)):
            img_u_w, img_u_s1, img_u_s2, ignore_mask, cutmix_box1, cutmix_box2 = batch_u
            with torch.no_grad():
                pred_u_w = model_ema(img_u_w).detach()
                conf_u_w, mask_u_w = pred_u_w.softmax(dim=1).max(dim=1)[0], pred_u_w.argmax(dim=1)
            views = [
                mixed(img, img.flip(0), cutmix_box)
                for img, cutmix_box in ((img_u_s1, cutmix_box1), (img_u_s2, cutmix_box2))
            ]
            pred_x = model(img_x)
            if cal is not None:
                cfg["conf_thresh"] = cal.update(model_ema(img_x), mask_x).sync().threshold()
            preds = model(torch.cat(views), comp_drop=True).chunk(2)
            losses = []
            for pred, cutmix_box in zip(preds, (cutmix_box1, cutmix_box2), strict=True):
                mask, conf, ignore = (
                    mixed(x, x.flip(0), cutmix_box) for x in (mask_u_w, conf_u_w, ignore_mask)
                )
                kept = (conf >= cfg["conf_thresh"]) & (ignore != 255)
                losses.append((criterion_u(pred, mask) * kept).sum() / (ignore != 255).sum().item())
            loss_x = criterion_l(pred_x, mask_x)
            loss_u_s = (losses[0] + losses[1]) / 2.0
            if weight is None:
                loss = (loss_x + loss_u_s) / 2.0
            else:
                w = weight
                if weight == "schedule":
                    start = 3 * cfg["epochs"] // 4
                    w = 0.01 * math.exp(-5 * max(0, (epoch - start) / (cfg["epochs"] - start)))
                loss = (1 - w) * loss_x + w * loss_u_s
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ratio = min(1 - 1 / (epoch * len(loaders[1]) + i + 1), 0.996)
            pairs = zip(
                chain(model.parameters(), model.buffers()),
                chain(model_ema.parameters(), model_ema.buffers()),
                strict=True,
            )
            with torch.no_grad():
                for own, ema in pairs:
                    ema.copy_(ema * ratio + own.detach() * (1 - ratio))
            row = {"loss": loss.item(), "loss_x": loss_x.item(), "loss_u": loss_u_s.item()}
            history.append({**row, "thresh": float(cfg["conf_thresh"])})
        checkpoint = {"model": model.state_dict(), "model_ema": model_ema.state_dict()}
        checkpoint["optimizer"] = optimizer.state_dict()
        if cal is not None:
            checkpoint["cal"] = cal.state_dict()
        save(folder, **checkpoint, epoch=epoch)
    return history


def allspark(
    root: Path,
    ids_x: Path,
    ids_u: Path,
    cfg: Config,
    *,
    masks_u: bool = False,
    weight: float | str | None = None,
    cal: cpseg.OnlineThreshold | None = None,
) -> list[dict[str, float]]:
    """``train_allspark.py``; ``masks_u`` are the four lines of Stage I."""
    criterion_l = nn.CrossEntropyLoss(ignore_index=255)
    criterion_u = nn.CrossEntropyLoss(ignore_index=255)
    size = cfg["crop_size"]
    trainset_u = Listed(root, ids_u, "unlabelled", size, views="allspark", masks_u=masks_u)
    trainset_l = Listed(root, ids_x, "labelled", size, nsample=len(trainset_u))
    torch.manual_seed(cfg["seed"])
    model = AllSpark(size)
    optimizer = torch.optim.SGD(model.parameters(), cfg["lr"], momentum=0.9)
    history = []
    for epoch in range(cfg["stop"]):
        begin(epoch, cfg)
        loaders = loader(trainset_l, cfg, epoch), loader(trainset_u, cfg, epoch)
        for (img_x, mask_x), batch_u in zip(*loaders, strict=True):
            img_u_s, mask_u = batch_u if masks_u else (batch_u, None)
            with torch.no_grad():
                model.eval()
                pred_u_pseudo = model(img_u_s).detach()
                model.pseudo_prob_map = pred_u_pseudo
                pseudo_label = pred_u_pseudo.argmax(dim=1)
            model.train()
            preds = model(torch.cat((img_x, img_u_s)))
            pred_x, pred_u = preds.split([len(img_x), len(img_u_s)])
            loss_x = criterion_l(pred_x, mask_x)
            if mask_u is not None:
                loss_u = criterion_u(pred_u, mask_u) if (mask_u != 255).any() else 0 * pred_u.sum()
            elif cal is not None:
                cal.update(pred_x, mask_x).sync()
                pseudo_label = pseudo_label.masked_fill(~cal.gate(pred_u_pseudo), 255)
                kept = pseudo_label != 255
                loss_u = criterion_u(pred_u, pseudo_label) if kept.any() else 0 * pred_u.sum()
            else:
                loss_u = criterion_u(pred_u, pseudo_label)
            if weight is None:
                loss = (loss_x + loss_u) / 2.0
            else:
                w = weight
                if weight == "schedule":
                    start = 3 * cfg["epochs"] // 4
                    w = 0.01 * math.exp(-5 * max(0, (epoch - start) / (cfg["epochs"] - start)))
                loss = (1 - w) * loss_x + w * loss_u
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            row = {"loss": loss.item(), "loss_x": loss_x.item(), "loss_u": loss_u.item()}
            row["kept"] = float((pseudo_label != 255).float().mean())
            history.append(row)
    return history
