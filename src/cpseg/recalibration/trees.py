"""``Trees``: extremely randomised trees over the features of a pixel, as tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpseg._internal.checks import is_whole, message, shape
from cpseg.recalibration.features import FLOOR
from cpseg.recalibration.fit import Pixels

COUNT = 40
DEPTH = 12  # at most: few pixels would go deeper, and all would wait for them
LEAST_PIXELS = 15  # in a leaf
SHARE_OF_FEATURES = 0.25  # tried for a split
MOST_PIXELS = 30_000  # fitted on: more make larger trees, hardly better ones
_PREFIX = "trees."
_TENSORS = ("feature", "threshold", "child", "leaf", "share", "root")
_ROWS = 2**14  # pixels that go down the trees at a time


@dataclass(frozen=True, repr=False)
class Trees:
    """A forest whose answer is the mean of its trees' class shares.

    The nodes of all trees lie one after the other. A pixel goes from a node to its first child
    where the node's feature is at most the threshold, to the second else; a leaf is its own child.

    Attributes:
        feature: int64 ``[N]``, the column that a node looks at.
        threshold: float32 ``[N]``.
        child: int64 ``[N, 2]``.
        leaf: int64 ``[N]``, for a leaf the row of ``share``.
        share: float32 ``[L, P]``, of the present classes among the pixels of a leaf, floored.
        root: int64 ``[T]``.
        depth: steps after which every pixel is in a leaf.
        columns: number of features.

    Reference:
        Geurts, Ernst & Wehenkel (2006), Extremely randomized trees.
    """

    feature: Tensor
    threshold: Tensor
    child: Tensor
    leaf: Tensor
    share: Tensor
    root: Tensor
    depth: int
    columns: int

    def __repr__(self) -> str:
        return f"Trees({len(self.root)} trees, {len(self.share)} leaves, {self.columns} features)"

    @classmethod
    def fit(cls, pixels: Pixels, classes: int, *, seed: int) -> Trees:
        """Grow the trees with scikit-learn.

        Args:
            pixels: what to fit on; every image weighs the same.
            classes: number of present classes.
            seed: of the random splits. They also depend on the version of scikit-learn.

        Raises:
            ImportError: scikit-learn is missing; names the extra.
        """
        try:
            from sklearn.ensemble import ExtraTreesClassifier
        except ImportError as error:
            raise ImportError(
                'recalibration by trees needs scikit-learn: pip install "cpseg[trees]"'
            ) from error
        forest = ExtraTreesClassifier(
            COUNT,
            max_depth=DEPTH,
            min_samples_leaf=LEAST_PIXELS,
            max_features=SHARE_OF_FEATURES,
            random_state=seed,
        )
        weights = pixels.weights / pixels.weights.mean()
        forest.fit(pixels.features.numpy(), pixels.labels.numpy(), weights.numpy())
        parts: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(5)]
        roots, nodes, leaves = [], 0, 0
        for each in forest.estimators_:
            tree = each.tree_
            own = np.arange(tree.node_count)
            is_leaf = tree.children_left < 0
            children = np.stack([tree.children_left, tree.children_right], 1)
            children[is_leaf] = own[is_leaf, None]
            shares = np.full((int(is_leaf.sum()), classes), 0.0)
            value = tree.value[is_leaf, 0]
            shares[:, forest.classes_] = value / value.sum(1, keepdims=True)
            shares = np.maximum(shares, FLOOR)
            for part, values in zip(
                parts,
                (
                    np.where(is_leaf, 0, tree.feature),
                    np.where(is_leaf, np.inf, tree.threshold),
                    children + nodes,
                    np.where(is_leaf, np.cumsum(is_leaf) - 1 + leaves, 0),
                    shares / shares.sum(1, keepdims=True),
                ),
                strict=True,
            ):
                part.append(values)
            roots.append(nodes)
            nodes, leaves = nodes + tree.node_count, leaves + len(shares)
        feature, threshold, child, leaf, share = (
            torch.from_numpy(np.concatenate(part)) for part in parts
        )
        return cls(
            feature.long(),
            threshold.float(),
            child.long(),
            leaf.long(),
            share.float(),
            torch.tensor(roots),
            max(each.get_depth() for each in forest.estimators_),
            pixels.features.shape[1],
        )

    def __call__(self, features: Tensor) -> Tensor:
        """The mean share of every present class.

        Args:
            features: float32 ``[n, F]``.

        Returns:
            float32 ``[n, P]``, summing to 1.
        """
        return torch.cat([self._of(rows) for rows in torch.split(features, _ROWS)])

    def _of(self, features: Tensor) -> Tensor:
        node = self.root.expand(len(features), -1)
        for _ in range(self.depth):
            goes_right = features.gather(1, self.feature[node]) > self.threshold[node]
            node = self.child[node, goes_right.long()]
        return self.share[self.leaf[node]].mean(1)

    def to(self, device: torch.device | str) -> Trees:
        """The same trees on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that changes its result."""
        content = b"".join(part.cpu().numpy().tobytes() for part in self.tensors().values())
        return hashlib.sha256(content).hexdigest()[:16]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a file."""
        return {f"{_PREFIX}{name}": getattr(self, name) for name in _TENSORS}

    @classmethod
    def from_parts(
        cls,
        where: str,
        tensors: Mapping[str, Tensor],
        depth: object,
        *,
        columns: int,
        classes: int,
        fix: str,
    ) -> Trees:
        """What :meth:`tensors` and the depth describe.

        Raises:
            ValueError: a part is missing, damaged or does not fit the others.
        """
        parts = {name: tensors.get(f"{_PREFIX}{name}") for name in _TENSORS}
        missing = [name for name, part in parts.items() if part is None]
        if missing or not is_whole(depth, 0):
            got = f"none of '{missing[0]}'" if missing else f"depth {depth!r}"
            raise ValueError(message(where, "the trees of its method", got, fix))
        made = cls(**parts, depth=depth, columns=columns)  # type: ignore[arg-type]
        nodes, leaves = len(made.threshold), len(made.share)
        limits = {
            "feature": (made.feature, (nodes,), columns),
            "child": (made.child, (nodes, 2), nodes),
            "leaf": (made.leaf, (nodes,), leaves),
            "root": (made.root, (len(made.root),), nodes),
        }
        for name, (part, size, below) in limits.items():
            if part.dtype != torch.int64 or tuple(part.shape) != size or not _inside(part, below):
                expected = f"int64 'trees.{name}' {list(size)} below {below}"
                raise ValueError(message(where, expected, f"{part.dtype} {shape(part)}", fix))
        floats = (made.threshold, made.share)
        fits = tuple(made.share.shape) == (leaves, classes) and made.threshold.ndim == 1
        if not fits or any(p.dtype != torch.float32 or bool(p.isnan().any()) for p in floats):
            expected = f"float32 'trees.share' [L, {classes}] and thresholds"
            raise ValueError(message(where, expected, shape(made.share), fix))
        return made


def _inside(part: Tensor, below: int) -> bool:
    return part.numel() > 0 and bool(((part >= 0) & (part < below)).all())
