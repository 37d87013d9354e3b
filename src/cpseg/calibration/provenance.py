"""``Provenance``: where a calibration came from, as typed facts that are saved with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cpseg._internal.checks import is_share, is_whole, message
from cpseg.core.class_map import parse_class_map
from cpseg.core.mask_format import MaskFormat
from cpseg.core.score_reading import parse_reading


@dataclass(frozen=True)
class RecalibrationImages:
    """The images on which the recalibration was fitted.

    Attributes:
        images: their ids, sorted; None where a file does not say.
        folds: number of folds by which every calibration image got a map of the others; 0 for
            one map.
        disjoint: whether none of these images is a calibration image.
    """

    images: tuple[str, ...] | None
    folds: int
    disjoint: bool


@dataclass(frozen=True)
class SourcesRead:
    """The folders of scores that were read, where they were not those of one model alone.

    Attributes:
        folders: their names, in the order of the recalibration's sources.
        class_maps: JSON of the map from each model's classes to those wanted, or None.
        features: name of the folder of an encoder's features, or None.
        colour: whether the images themselves were a source.
    """

    folders: tuple[str, ...]
    class_maps: tuple[Mapping[str, Any] | None, ...]
    features: str | None
    colour: bool = False


@dataclass(frozen=True)
class GroupImages:
    """The images on which the groups of cells were learned.

    Attributes:
        images: their ids, sorted; None where a file does not say.
        learned_on: how many they were.
        disjoint: whether none of these images is a calibration image.
    """

    images: tuple[str, ...] | None
    learned_on: int
    disjoint: bool


@dataclass(frozen=True)
class ImageProfile:
    """What the images looked like to a calibration, an entry for each of at most 1,000 images.

    Attributes:
        kept: shares of the pixels that keep a label.
        largest: means over pixels of the largest probability, after the recalibration.
        in_sample: whether the thresholds were made on these images, so that each keeps at least
            what it would keep as a new image.
    """

    kept: tuple[float, ...]
    largest: tuple[float, ...]
    in_sample: bool


@dataclass(frozen=True)
class SourceImages:
    """A folder of scores made by cross-fitting: by models trained on some calibration images.

    Attributes:
        folder: its name.
        out_of_fold: number of calibration images that one of its models was trained on, each scored
            by another one.
        trained_on: number of images that its models were trained on, all together.
    """

    folder: str
    out_of_fold: int
    trained_on: int


@dataclass(frozen=True, eq=False)
class Provenance(Mapping[str, Any]):
    """Which images made a calibration, and how its data set was read.

    It is also a read-only mapping: the JSON object that a file keeps as ``extra``, which
    :meth:`to_json` returns. Two are equal where that JSON is.

    Attributes:
        images: ids of the calibration images, sorted; empty where they have no ids.
        certification_images: ids of the images used for the certificate, sorted.
        recalibration: the images used for the recalibration, or None.
        groups: the images used to learn groups, or None.
        sources_read: the folders of scores of several models, and of features, or None.
        class_map: JSON of the map from the model's classes to those of the data set, or None.
        masks: how masks are stored, or None for classes with 255 for void.
        fallback_shares: the proportion of cells with a finite threshold from each level of a
            fallback, finest level first; None without a fallback.
        profile: what the calibration images, or those of the certificate, looked like; None where
            it was not recorded. New images are compared with it.
        sources: the folders of scores that were cross-fitted on calibration images; with one of
            them nothing is promised in finite samples.
        readings: JSON of how the scores of each model were read (layout, logits, resolution);
            empty where as probabilities ``[K, H, W]`` at the image's size.
        other: entries of a file that this version does not know; they are written back.

    Example:
        >>> provenance = Provenance(images=("a", "b"), groups=GroupImages(("c",), 1, True))
        >>> provenance["groups"]
        {'learned_on': 1, 'apart': True, 'images': ['c']}
        >>> sorted(provenance.images_used)
        ['a', 'b', 'c']
    """

    images: tuple[str, ...] = ()
    certification_images: tuple[str, ...] = ()
    recalibration: RecalibrationImages | None = None
    groups: GroupImages | None = None
    class_map: Mapping[str, Any] | None = None
    masks: MaskFormat | None = None
    fallback_shares: Mapping[str, float] | None = None
    profile: ImageProfile | None = None
    sources: tuple[SourceImages, ...] = ()
    sources_read: SourcesRead | None = None
    readings: tuple[Mapping[str, Any], ...] = ()
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images_used(self) -> frozenset[str]:
        """All images that made the calibration or its certificate, as far as ids are known."""
        learned = () if self.groups is None else self.groups.images or ()
        recalibrated = () if self.recalibration is None else self.recalibration.images or ()
        return frozenset((*self.images, *self.certification_images, *recalibrated, *learned))

    def to_json(self) -> dict[str, Any]:
        """The JSON object that a calibration file keeps as ``extra``."""
        content: dict[str, Any] = {}
        if self.class_map is not None:
            content["class_map"] = dict(self.class_map)
        if self.masks is not None:
            content["masks"] = self.masks.to_json()
        if self.recalibration is not None:
            facts = {"apart": self.recalibration.disjoint, "folds": self.recalibration.folds}
            content["refitted"] = {**facts, **_images_entry(self.recalibration.images)}
        if self.groups is not None:
            facts = {"learned_on": self.groups.learned_on, "apart": self.groups.disjoint}
            content["groups"] = {**facts, **_images_entry(self.groups.images)}
        if self.images:
            content["images"] = list(self.images)
        if self.fallback_shares is not None:
            content["fallback"] = dict(self.fallback_shares)
        if self.certification_images:
            content["certifying_images"] = list(self.certification_images)
        if self.profile is not None:
            content["profile"] = {
                "kept": list(self.profile.kept),
                "largest": list(self.profile.largest),
                "in_sample": self.profile.in_sample,
            }
        if self.sources_read is not None:
            content["sources"] = {
                "folders": list(self.sources_read.folders),
                "class_maps": [each and dict(each) for each in self.sources_read.class_maps],
                "features": self.sources_read.features,
                "colour": self.sources_read.colour,
            }
        if self.readings:
            content["readings"] = [dict(each) for each in self.readings]
        if self.sources:
            content["cross_fitted"] = [asdict(source) for source in self.sources]
        return {**content, **self.other}

    @classmethod
    def from_json(cls, value: object, *, where: str = "Provenance.from_json") -> Provenance:
        """Read what :meth:`to_json` gave.

        Args:
            value: the parsed JSON object; entries that are not known are kept in ``other``.
            where: who asks, for messages: a file's name.

        Raises:
            ValueError: not an object, or an entry that this version knows with an unfit value.
        """
        if isinstance(value, Provenance):
            return value
        if not isinstance(value, Mapping):
            raise _unfit(where, "a JSON object as extra", value)
        content = dict(value)
        return cls(
            images=_images(where, "images", content.pop("images", [])),
            certification_images=_images(
                where, "certifying_images", content.pop("certifying_images", [])
            ),
            recalibration=_recalibration(where, content.pop("refitted", None)),
            groups=_groups(where, content.pop("groups", None)),
            class_map=_class_map(where, "class_map", content.pop("class_map", None)),
            masks=_masks(where, content.pop("masks", None)),
            fallback_shares=_shares(where, content.pop("fallback", None)),
            profile=_profile(where, content.pop("profile", None)),
            sources=_sources(where, content.pop("cross_fitted", [])),
            sources_read=_sources_read(where, content.pop("sources", None)),
            readings=_readings(where, content.pop("readings", [])),
            other=content,
        )

    def __getitem__(self, key: str) -> Any:
        return self.to_json()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_json())

    def __len__(self) -> int:
        return len(self.to_json())


def _images_entry(images: Sequence[str] | None) -> dict[str, list[str]]:
    return {} if images is None else {"images": list(images)}


def _images(where: str, name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(image, str) for image in value):
        raise _unfit(where, f"{name} as a list of image ids", value)
    return tuple(value)


def _recalibration(where: str, value: object) -> RecalibrationImages | None:
    if value is None:
        return None
    facts = _table(where, "refitted", value, {"apart", "folds"})
    if not isinstance(facts["apart"], bool) or not is_whole(facts["folds"], 0):
        raise _unfit(where, "refitted with apart as a bool and folds as a whole number", value)
    images = _images(where, "refitted images", facts["images"]) if "images" in facts else None
    return RecalibrationImages(images, facts["folds"], facts["apart"])


def _groups(where: str, value: object) -> GroupImages | None:
    if value is None:
        return None
    facts = _table(where, "groups", value, {"apart", "learned_on"})
    if not isinstance(facts["apart"], bool) or not is_whole(facts["learned_on"], 0):
        raise _unfit(where, "groups with apart as a bool and learned_on as a whole number", value)
    images = _images(where, "groups images", facts["images"]) if "images" in facts else None
    return GroupImages(images, facts["learned_on"], facts["apart"])


def _class_map(where: str, name: str, value: object) -> Mapping[str, Any] | None:
    if value is None:
        return None
    parse_class_map(value, where=f"{where} ({name})")
    return dict(value)  # type: ignore[call-overload,no-any-return]


def _masks(where: str, value: object) -> MaskFormat | None:
    if value is None:
        return None
    facts = _table(where, "masks", value, {"void", "map"})
    if not is_whole(facts["void"], 0):
        raise _unfit(where, "masks with void as a whole number", value)
    if not is_whole(facts.get("first_class", 0), 0):
        raise _unfit(where, "masks with first_class as a whole number", value)
    return MaskFormat.from_json(facts, where=f"{where} (masks)")


def _shares(where: str, value: object) -> Mapping[str, float] | None:
    if value is None:
        return None
    shares = _table(where, "fallback", value, set())
    if not all(map(is_share, shares.values())):
        raise _unfit(where, "fallback with a proportion for every level", value)
    return dict(shares)


def _profile(where: str, value: object) -> ImageProfile | None:
    if value is None:
        return None
    facts = _table(where, "profile", value, {"kept", "largest", "in_sample"})
    kept, largest = facts["kept"], facts["largest"]
    lists = isinstance(kept, (list, tuple)) and isinstance(largest, (list, tuple))
    if not lists or len(kept) != len(largest) or not all(map(is_share, (*kept, *largest))):
        raise _unfit(where, "profile with two lists of shares, as long as each other", value)
    if not isinstance(facts["in_sample"], bool):
        raise _unfit(where, "profile with in_sample as a bool", value)
    return ImageProfile(tuple(kept), tuple(largest), facts["in_sample"])


def _sources_read(where: str, value: object) -> SourcesRead | None:
    if value is None:
        return None
    facts = _table(where, "sources", value, {"folders", "class_maps", "features", "colour"})
    folders = _images(where, "folders of sources", facts["folders"])
    maps, features = facts["class_maps"], facts["features"]
    if not isinstance(maps, (list, tuple)) or len(maps) != len(folders):
        raise _unfit(where, "sources with a class map for each folder", value)
    if not isinstance(features, str | None) or not isinstance(facts["colour"], bool):
        raise _unfit(where, "sources with features as a folder's name, colour as a bool", value)
    parsed = tuple(_class_map(where, "sources", each) for each in maps)
    return SourcesRead(folders, parsed, features, facts["colour"])


def _sources(where: str, value: object) -> tuple[SourceImages, ...]:
    expected = "cross_fitted as a list of folders with out_of_fold and trained_on"
    if not isinstance(value, (list, tuple)):
        raise _unfit(where, expected, value)
    sources = []
    for entry in value:
        facts = _table(where, "cross_fitted", entry, {"folder", "out_of_fold", "trained_on"})
        counts = (facts["out_of_fold"], facts["trained_on"])
        if not isinstance(facts["folder"], str) or not all(is_whole(count, 1) for count in counts):
            raise _unfit(where, expected, value)
        sources.append(SourceImages(facts["folder"], *counts))
    return tuple(sources)


def _readings(where: str, value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, (list, tuple)):
        raise _unfit(where, "readings as a list", value)
    return tuple(parse_reading(each, where=f"{where} (readings)").to_json() for each in value)


def _table(where: str, name: str, value: object, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not keys <= set(value):
        expected = f"{name} with {', '.join(sorted(keys))}" if keys else f"{name} as a JSON object"
        raise _unfit(where, expected, value)
    return value


def _unfit(where: str, expected: str, value: object) -> ValueError:
    got = " ".join(repr(value).split())[:80]
    return ValueError(message(where, expected, got, "run cpseg calibrate anew"))
