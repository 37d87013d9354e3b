"""Is this what you think it is? A look at a data set and its scores before any work is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpseg._internal.checks import MOST_CLASSES
from cpseg.files.dataset import Progress, Source, quiet
from cpseg.files.id_lists import Pair
from cpseg.files.image_folders import masks_in
from cpseg.files.masks import image_size
from cpseg.files.score_files import find_scores, read_features
from cpseg.jobs import check_lists as lists
from cpseg.jobs.check_agreement import (
    Counts,
    agreement,
    agreement_findings,
    class_shares,
    confusions,
    joint_counts,
    mean_iou,
)
from cpseg.jobs.check_findings import (
    LEVELS,
    Check,
    Example,
    Finding,
    classes_text,
    counted,
    error,
    ok,
    percent,
    warning,
)
from cpseg.jobs.check_masks import VOID, Lookup, MaskFacts, RawMask, judge_values, read_raw_mask
from cpseg.jobs.check_scores import ScoreFacts, layout_of, read_raw_scores

Array = npt.NDArray[Any]
MOST_READ = 24  # labelled images whose scores are read
_MOST_BYTES = 10**9  # of scores read, where files are large
_FEWEST_READ = 6
_MORE_MASKS = 300  # read to look for classes that the others do not have
_PEEKED = 6  # unlabelled images whose scores are read
_EXAMPLES = 3
_MOST_SEARCHED = 1000  # images whose masks are looked for one by one
_SEEN = 0.005  # share of the pixels of unlabelled images at which a class is there


def check(
    source: Source,
    ids: str | Path,
    *,
    unlabelled: str | Path | None = None,
    everything: bool = False,
    progress: Progress = quiet,
) -> Check:
    """Look at a data set and its scores: is everything what the options say that it is?

    Of the labelled images at most 24, spread over the list, are read; of the others, it is seen
    whether their files are there. What the jobs would refuse is looked at as it is stored, so that
    the mistake can be named, and what it hides is looked at too.

    A numbering of classes other than the given one is reported only if it raises the agreement on
    the pixels of its classes by 10 points, a t-test over images is 99 % sure of it for a shift by
    one and 99.9 % for any other numbering, and it does so in four of five images with such pixels.

    Args:
        source: the data set and the scores.
        ids: id list of the labelled images.
        unlabelled: id list of the images to label.
        everything: read all labelled images.
        progress: wraps the loop over images.

    Returns:
        Findings, shares of classes, and examples to draw.

    Raises:
        ValueError: a list that cannot be read, or options for masks that exclude each other.
        FileNotFoundError: there is no such list.
    """
    source.mask_format  # noqa: B018  (refuses a first class beside a mask map)
    pairs, found = _labelled(source, ids)
    to_label = [] if unlabelled is None else source.read_ids(unlabelled, columns=1)
    located = lists.Located.of(source.models, pairs)
    found += lists.list_findings(source, pairs)
    found += lists.score_findings(source, located, pairs)
    located_more = lists.Located.of(source.models, to_label)
    if to_label:
        found += lists.unlabelled_findings(source, pairs, to_label, located_more)
    used = located.paths() | located_more.paths()
    found += lists.stray_findings(source, used, [*pairs, *to_label])

    look = _Look(source, located)
    sample = _spread(pairs, located, everything)
    for pair in progress(sample, len(sample), "check"):
        look.at(pair)
    scored = [pair for pair in to_label if pair.image in located_more.files[0]]
    look.peek(_evenly(scored, _PEEKED), located_more)
    if len(sample) < len(pairs) and sample:
        text = f"{len(sample)} of {len(pairs)} labelled images read; --all reads all"
        found.append(ok("read", text))
    found += look.findings(pairs)
    if used and look.largest:
        files = located_more.paths() if to_label else located.paths()
        count = len(to_label) if to_label else len(pairs)
        costs = lists.cost_findings(files, count, rate=look.rate, shape=look.largest)
        found += costs
    found.sort(key=lambda finding: LEVELS.index(finding.level))
    counts = look.counts
    none = counts is None or not counts.sum()
    return Check(
        findings=tuple(found),
        listed=len(pairs),
        read=len(sample),
        agreement=float("nan") if counts is None else agreement(counts),
        miou=float("nan") if counts is None else mean_iou(counts),
        shares=() if none or counts is None else class_shares(counts),
        examples=tuple(look.examples()),
    )


def _labelled(source: Source, ids: str | Path) -> tuple[list[Pair], list[Finding]]:
    """The labelled images, with or without masks; and what is wrong with the list."""
    pairs = source.read_ids(ids, columns=1)
    if source.masks is None:
        return pairs, []
    try:
        return source.read_ids(ids), []
    except (OSError, ValueError) as problem:  # an image without a mask, or with two
        if len(pairs) > _MOST_SEARCHED:
            return pairs, [error("masks-folder", str(problem))]
    found, without, reason = [], 0, ""
    for pair in pairs:
        try:
            mask = pair.mask or masks_in(source.masks, source.root, [pair.image])[0]
            found.append(Pair(pair.image, mask))
        except (OSError, ValueError) as problem:
            found.append(pair)
            without, reason = without + 1, reason or str(problem)
    if not without:
        return found, []
    text = f"{without} of {counted(len(pairs), 'labelled image')} have no mask in --masks: {reason}"
    return found, [error("masks-folder", text)]


def _spread(pairs: Sequence[Pair], located: lists.Located, everything: bool) -> list[Pair]:
    """The labelled images to read: those that have files, at even distances."""
    there = [p for p in pairs if any(p.image in files for files in located.files)]
    there = there or [pair for pair in pairs if pair.mask is not None]
    if everything or not there:
        return list(there)
    path = next((files[there[0].image] for files in located.files if there[0].image in files), None)
    most = MOST_READ
    if path is not None:
        images = max(1, *map(len, located.entries))  # in a file with those of all
        affordable = _MOST_BYTES * images // max(1, path.stat().st_size * len(located.files))
        most = min(MOST_READ, max(_FEWEST_READ, affordable))
    return _evenly(there, most)


def _evenly(items: Sequence[Pair], most: int) -> list[Pair]:
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most).round()]


@dataclass
class _Look:
    """What is read of images, and what follows."""

    source: Source
    located: lists.Located
    facts: list[ScoreFacts] = field(init=False)
    masks: MaskFacts = field(init=False)
    joints: list[list[Counts]] = field(init=False)  # of each model
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    raw_masks: dict[str, Array] = field(default_factory=dict)  # of examples
    argmax: dict[str, Array] = field(default_factory=dict)  # of examples, first model
    only: dict[str, int] = field(default_factory=dict)  # masks of one value: the value
    at_image_size: bool = True  # masks are of the size of images
    peeked: list[Counts] = field(default_factory=list)  # of classes in unlabelled images
    seen: list[Pair] = field(default_factory=list)
    largest: tuple[int, int, int] | None = None
    bytes_read: int = 0
    seconds: float = 0.0
    counts: Counts | None = None
    lookup: Lookup | None = None

    def __post_init__(self) -> None:
        several = len(self.source.models) > 1
        self.facts = [
            ScoreFacts(f"{model.probs.name}: " if several else "", model.class_map, model.reading)
            for model in self.source.models
        ]
        self.masks = MaskFacts(self.source)
        self.joints = [[] for _ in self.facts]

    @property
    def rate(self) -> float:
        """Bytes read per second."""
        return self.bytes_read / self.seconds if self.seconds else float("nan")

    # --- reading

    def at(self, pair: Pair) -> None:
        """Read the mask and the scores of a labelled image."""
        self.seen.append(pair)
        mask = self._mask(pair)
        size = mask.size if mask else self._image_size(pair)
        for number in range(len(self.facts)):
            stored = self._stored(self.located, number, pair)
            if stored is None:
                continue
            argmax = self._add(number, pair, stored, size)
            if argmax is None:
                continue
            if number == 0 and len(self.argmax) < MOST_READ:
                self.argmax[pair.image] = argmax
            classes = self.facts[number].num_classes
            if mask and mask.values is not None and classes and classes <= MOST_CLASSES:
                self.joints[number].append(joint_counts(mask.values, argmax, classes))
        if self.source.features is not None:
            self._features(pair)

    def _add(
        self, number: int, pair: Pair, stored: Array, size: tuple[int, int] | None
    ) -> Array | None:
        facts = self.facts[number]
        if size is None:  # neither mask nor image: take the scores at their word
            last = self.facts[number].reading.layout == "hwc"
            sides = stored.shape[:2] if last else stored.shape[1:]
            size = (sides[0], sides[1]) if stored.ndim == 3 else (0, 0)
        layout = self.facts[number].layout_of(stored.shape, size)
        classes = stored.shape[2 if layout.classes_last else 0] if stored.ndim == 3 else 0
        if layout.kind != "rank":
            this = (classes, *size)
            self.largest = max(self.largest or this, this, key=lambda each: np.prod(each))
        if classes > MOST_CLASSES:
            text = f"{pair.image}: {classes} classes in its scores {list(stored.shape)}"
            self._fail("classes", text)
            return None
        return facts.add(pair.image, stored, size)

    def _mask(self, pair: Pair) -> RawMask | None:
        if pair.mask is None or not (self.source.root / pair.mask).is_file():
            return None
        try:
            mask = read_raw_mask(self.source.root / pair.mask, self.source.mask_format)
        except (OSError, ValueError) as problem:
            self._fail("masks-unreadable", str(problem))
            return None
        self.masks.add(pair.mask, mask)
        if mask.values is not None:
            low, high = int(mask.values.min()), int(mask.values.max())
            if low == high:
                self.only[pair.mask] = low
            if len(self.raw_masks) < MOST_READ:
                self.raw_masks[pair.image] = mask.values
        size = self._image_size(pair)
        if size is not None and size != mask.size:
            self.at_image_size = False
            got = f"{pair.mask} is {mask.size[0]}x{mask.size[1]}, the image {size[0]}x{size[1]}"
            self.masks.other_size.append(got)
            self.masks.same_as_scores += self._scores_fit(pair, mask.size)
        return mask

    def _scores_fit(self, pair: Pair, size: tuple[int, int]) -> bool:
        """Whether all scores of an image have the size of its mask."""
        stored = [self._stored(self.located, n, pair) for n in range(len(self.facts))]
        shapes = [array.shape for array in stored if array is not None]
        return bool(shapes) and all(layout_of(s, size).kind == "same" for s in shapes)

    def _image_size(self, pair: Pair) -> tuple[int, int] | None:
        try:
            return image_size(self.source.root / pair.image)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as problem:
            self._fail("images-unreadable", str(problem))
            return None

    def _stored(self, located: lists.Located, number: int, pair: Pair) -> Array | None:
        """The scores of an image by a model as they are stored, or None."""
        path, entry = (each[number].get(pair.image) for each in (located.files, located.entries))
        if path is None:
            return None
        start = time.perf_counter()
        try:
            stored = read_raw_scores(Path(path), None if entry is None else str(entry))
        except (OSError, ValueError) as problem:
            self._fail("scores-unreadable", str(problem))
            return None
        self.seconds += time.perf_counter() - start
        self.bytes_read += stored.nbytes if entry else Path(path).stat().st_size
        return stored

    def _features(self, pair: Pair) -> None:
        assert self.source.features is not None
        try:
            files = find_scores(self.source.features, pair.image, kind="features")
            read_features(files)
        except (OSError, ValueError) as problem:
            self._fail("features", str(problem))

    def _fail(self, name: str, text: str) -> None:
        texts = self.unreadable.setdefault(name, [])
        if text not in texts:
            texts.append(text)

    def peek(self, pairs: Sequence[Pair], located: lists.Located) -> None:
        """Read the first model's scores of some unlabelled images."""
        for pair in pairs:
            stored = self._stored(located, 0, pair)
            if stored is None:
                continue
            size = self._image_size(pair) if self.at_image_size else None
            argmax = self._add(0, pair, stored, size)
            if argmax is not None:
                self.peeked.append(np.bincount(argmax.ravel()))

    # --- what follows

    def findings(self, pairs: Sequence[Pair]) -> list[Finding]:
        """What to say of all that was read."""
        found: list[Finding] = []
        for name, texts in self.unreadable.items():
            others = f" ({counted(len(texts) - 1, 'other')} alike)" if len(texts) > 1 else ""
            found.append(error(name, texts[0] + others))
        found += [each for facts in self.facts for each in facts.findings()]
        num_classes = self.facts[0].num_classes
        if num_classes is None or num_classes > MOST_CLASSES:
            return [*found, *self.masks.format_findings()]
        self._read_more_masks(pairs, num_classes)
        found += self.masks.format_findings()

        def agreed(lookup: Lookup) -> float:
            share = agreement(confusions(self.joints[0], lookup)) if self.joints[0] else 0.0
            return share if share == share else 0.0

        plain = self.masks.lookup(num_classes)
        void = [mask for mask, value in self.only.items() if plain[value] == VOID]
        self.lookup, more = judge_values(self.masks, void, num_classes, agreed)
        found += more
        if any(each.name == "classes" for each in more):
            return found
        for number, facts in enumerate(self.facts):
            if self.joints[number] and facts.num_classes == num_classes:
                counts = confusions(self.joints[number], self.lookup)
                self.counts = counts if number == 0 else self.counts
                found += agreement_findings(facts.prefix, counts)
        if not any(each.name in ("void-only", "data-set", "shift") for each in found):
            found += self._never_labelled(num_classes)
        return found

    def _read_more_masks(self, pairs: Sequence[Pair], num_classes: int) -> None:
        """Read masks of further images while there are classes that none has."""
        seen = {pair.image for pair in self.seen}
        others = [pair for pair in pairs if pair.mask and pair.image not in seen]
        lookup = self.masks.lookup(num_classes)
        for pair in _evenly(others, _MORE_MASKS):
            present = set(lookup[self.masks.counts > 0].tolist())
            if present >= set(range(num_classes)):
                return
            self._mask(pair)

    def _never_labelled(self, num_classes: int) -> list[Finding]:
        """Classes that no mask has."""
        assert self.lookup is not None
        present = set(self.lookup[self.masks.counts > 0].tolist())
        never = [each for each in range(num_classes) if each not in present]
        if not never or not self.masks.read or not present - {VOID}:
            return []
        text = f"{classes_text(never)} of the scores: in none of the {self.masks.read} masks read"
        if self.counts is not None:
            pooled = self.counts.sum((0, 1))
            text += f", but in {percent(pooled[never].sum() / max(1, pooled.sum()))} of the argmax"
        peeked = np.zeros(num_classes)
        for counts in self.peeked:
            peeked[: len(counts)] += counts[:num_classes] / counts.sum() / len(self.peeked)
        only = [each for each in never if peeked[each] >= _SEEN]
        found = []
        if only:
            said = f"{classes_text(only)}: {percent(peeked[only].sum())} of the argmax of "
            said += "unlabelled images, but in no labelled mask read: no threshold can be set"
            found.append(warning("only-unlabelled", said))
        if len(never) >= max(2, num_classes // 3):
            text += "; does the model have other classes? pass --class-map"
        rest = [each for each in never if each not in only]
        return [*found, *([warning("never-labelled", text)] if rest else [])]

    def examples(self) -> list[Example]:
        """Images to draw, at even distances among those that have most to show."""
        there = [pair for pair in self.seen if (self.source.root / pair.image).is_file()]
        both = [p for p in there if p.image in self.raw_masks and p.image in self.argmax]
        found = []
        for pair in _evenly(both or there, _EXAMPLES):
            values = self.raw_masks.get(pair.image)
            truth = None
            if values is not None:
                truth = values.astype(np.int64) if self.lookup is None else self.lookup[values]
            argmax = self.argmax.get(pair.image)
            found.append(Example(self.source.root / pair.image, truth, argmax))
        return found
