"""A data set on disk: images, masks and the scores of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cpseg._internal.checks import message, name_file_in_errors
from cpseg._internal.distributed import shard
from cpseg._internal.hashing import digest
from cpseg._internal.threads import in_order
from cpseg.core.channels import join_channels
from cpseg.core.class_map import ClassMap
from cpseg.core.feature_projection import FeatureProjection
from cpseg.core.mask_format import MaskFormat
from cpseg.core.palette import Palette
from cpseg.core.score_reading import ScoreReading
from cpseg.core.selection import Evidence
from cpseg.files.id_lists import Pair, read_ids
from cpseg.files.labels import read_labels
from cpseg.files.masks import VOID, image_size, read_image
from cpseg.files.model_scores import ScoreFolder as ScoreFolder
from cpseg.files.model_scores import as_json as as_json
from cpseg.files.score_arrays import entry_of
from cpseg.files.score_files import (
    PLAIN,
    find_scores,
    no_probabilities,
    read_features,
    read_scores,
    read_shape,
)

MOST_PROJECTED = 500  # images on which components of features are found

Progress = Callable[[Iterable[Pair], int, str], Iterable[Pair]]


def quiet(items: Iterable[Pair], count: int, title: str) -> Iterable[Pair]:
    """No progress bar."""
    return items


def announce(progress: Progress, images: int) -> None:
    """Tell a progress with a method ``expect`` how many images all passes of a job read."""
    expect = getattr(progress, "expect", None)
    if expect is not None:
        expect(images)


Files = tuple[Path, ...]  # of an image: scores of every model, its features, the image itself


@dataclass(frozen=True)
class Source:
    """A data set on disk with the scores of a model, or of several.

    Attributes:
        root: the folder that id lists are relative to.
        probs: the folder of score files, or one file with the scores of all images.
        class_map: from the model's classes to the data set's, or None where they are the same.
        mask_map: from the values in masks to the data set's classes, where they differ.
        void: the value of void pixels in masks; labels have 255 there.
        device: the device of the tensors.
        others: score files of more models, to be mapped together by a recalibration.
        features: a folder with an image encoder's features ``[C, h, w]`` of every image, or None.
        unlabelled: id list of the images that will be labelled, on which (and on the labelled
            ones) principal components of the features are found.
        components: how many at most.
        colour: whether the images themselves are a source, by their colours.
        projection: the components, once they are known.
        classes: number of classes of every model, once it is known: all files must have it.
        masks: a folder with the mask of every image, for id lists that name none, or None.
        palette: the colours of the values in masks, or None for masks that hold values.
        first_class: the value of class 0 in masks; smaller values are void.
        reading: layout, logits and resolution of the scores in ``probs``.
        workers: how many threads read files, and write them; with 1 the calling thread does.
    """

    root: Path
    probs: Path
    class_map: ClassMap | None = None
    mask_map: ClassMap | None = None
    void: int = VOID
    device: str = "cpu"
    others: tuple[ScoreFolder, ...] = ()
    features: Path | None = None
    unlabelled: Path | None = None
    components: int = 64
    colour: bool = False
    projection: FeatureProjection | None = None
    classes: tuple[int, ...] | None = None
    masks: Path | None = None
    palette: Palette | None = None
    first_class: int = 0
    reading: ScoreReading = PLAIN
    workers: int = 1

    def read_ids(self, path: str | Path, *, columns: int = 2) -> list[Pair]:
        """The images of an id list or a folder of this data set; see :func:`cpseg.files.read_ids`.

        Raises:
            ValueError: a list that is none.
            FileNotFoundError: there is no such file, or an image has no mask.
        """
        return read_ids(path, columns=columns, root=self.root, masks=self.masks)

    @property
    def models(self) -> tuple[ScoreFolder, ...]:
        """The score files of every model."""
        return (ScoreFolder(self.probs, self.class_map, self.reading), *self.others)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder of scores."""
        return tuple(model.probs for model in self.models)

    @property
    def is_single(self) -> bool:
        """Whether there are the scores of one model alone."""
        return not self.others and self.features is None and not self.colour

    def with_recorded_class_map(self, recorded: Any) -> Source:
        """The source with the class map that its model's calibration was made with."""
        return replace(self, class_map=self.models[0].with_recorded_map(recorded).class_map)

    def with_recorded_readings(self, recorded: Sequence[Any]) -> Source:
        """The source with scores read as they were for a calibration, an entry for each model.

        Raises:
            ValueError: they are to be read in another way.
        """
        pairs = zip(self.models, recorded, strict=False)
        models = [model.with_recorded_reading(each) for model, each in pairs]
        models += self.models[len(models) :]
        return replace(self, reading=models[0].reading, others=tuple(models[1:]))

    @property
    def _reads_images(self) -> bool:
        """Whether the image itself is among the files of an image: its size, colours or id."""
        needs = (model.reading.upsample or model.is_one_file for model in self.models)
        return self.colour or any(needs)

    def _readings(self) -> list[dict[str, Any]]:
        """JSON of all readings, empty where all are plain."""
        readings = [model.reading for model in self.models]
        return [] if all(each.is_plain for each in readings) else [r.to_json() for r in readings]

    @property
    def mask_format(self) -> MaskFormat:
        """How masks are stored."""
        return MaskFormat(self.void, self.mask_map, self.palette, self.first_class)

    def with_mask_format(self, stored: MaskFormat) -> Source:
        """The source with masks that are stored in another way."""
        return replace(
            self,
            void=stored.void,
            mask_map=stored.map,
            palette=stored.palette,
            first_class=stored.first_class,
        )

    def facts(self) -> dict[str, Any]:
        """What the provenance of a calibration records of the data set, as JSON."""
        facts: dict[str, Any] = {}
        if not self.is_single:
            facts["sources"] = {
                "folders": [folder.name for folder in self.folders],
                "class_maps": [as_json(model.class_map) for model in self.models],
                "features": self.features and self.features.name,
                "colour": self.colour,
            }
        elif self.class_map is not None:
            facts["class_map"] = self.class_map.to_json()
        if self._readings():
            facts["readings"] = self._readings()
        if not self.mask_format.is_plain:
            facts["masks"] = self.mask_format.to_json()
        return facts

    def identity(self) -> dict[str, Any]:
        """What tells a run's scores from another's, as JSON; without the first class map."""
        found: dict[str, Any] = {"probs": str(self.probs.resolve())}
        if self.others:
            found["others"] = [str(folder.resolve()) for folder in self.folders[1:]]
            found["maps_of_others"] = [as_json(model.class_map) for model in self.others]
        if self.features is not None:
            found["features"] = str(self.features.resolve())
            found["projection"] = self.projection and self.projection.fingerprint
        if self.colour:
            found["colour"] = True
        if self._readings():
            found["readings"] = self._readings()
        return found

    def locate(self, pairs: Sequence[Pair]) -> dict[Pair, Files]:
        """The files of every image, before any work is done.

        Raises:
            FileNotFoundError: an image has none in a folder, which is named.
            ValueError: two images would share one.
        """
        files: dict[Pair, Files] = {}
        owner: dict[tuple[Path, str | None], str] = {}
        models, reads_images = self.models, self._reads_images
        one_file = [model.is_one_file for model in models]
        for pair in pairs:
            found = [
                model.probs if whole else find_scores(model.probs, pair.image)
                for model, whole in zip(models, one_file, strict=True)
            ]
            if self.features is not None:
                found.append(find_scores(self.features, pair.image, kind="features"))
            if reads_images:
                found.append(self.root / pair.image)
            for number, path in enumerate(found):
                whole = number < len(models) and one_file[number]
                place = (path, entry_of(path, pair.image) if whole else None)
                if place in owner:
                    got = f"{owner[place]} and {pair.image}"
                    fix = "lay the folder out like the images, with their subfolders"
                    raise ValueError(message(str(path), "scores of one image", got, fix))
                owner[place] = pair.image
            files[pair] = tuple(found)
        return files

    def scores(self, files: Path | Files) -> Tensor | Evidence:
        """The scores of an image, in the classes of the data set.

        Of several sources the channels of all, as :meth:`cpseg.Recalibration.join` gives them.
        """
        files = (files,) if isinstance(files, Path) else files
        image = self._image_of(files)
        first = self._scores(0, files[0], image)
        if self.is_single or isinstance(first, Evidence):
            return first
        parts = [first]
        for number, path in enumerate(files[1 : len(self.models)], 1):
            more = self._scores(number, path, image)
            if isinstance(more, Evidence):
                raise no_probabilities(path)
            parts.append(more)
        last = files[len(self.models) :]
        components = None if self.features is None else self._components(last[0])
        colour = read_image(last[-1]).to(self.device) / 255 if self.colour else None
        return join_channels(parts, components, colour)

    def _image_of(self, files: Files) -> Path | None:
        """The image itself, where it is among the files that :meth:`locate` gave."""
        if not self._reads_images:
            return None
        if len(files) <= len(self.models):
            expected, got = "the files of an image as located", "its score files alone"
            raise ValueError(message(str(files[0]), expected, got, "pass those of Source.locate"))
        return files[-1]

    def _entry_of(self, model: ScoreFolder, path: Path, image: Path | None) -> str | None:
        """The key of an image's scores in a file with those of all images."""
        if image is None or path != model.probs:
            return None
        below = image.is_relative_to(self.root)
        return entry_of(path, str(image.relative_to(self.root) if below else image))

    def _components(self, path: Path) -> Tensor:
        assert self.projection is not None, "fitted by LabelledImages.open, or of the calibration"
        features = read_features(path, device=self.device)
        with name_file_in_errors(path):
            return self.projection.to(self.device)(features)

    def _scores(self, number: int, path: Path, image: Path | None) -> Tensor | Evidence:
        """The scores of one model, in the classes wanted."""
        model = self.models[number]
        scores = read_scores(
            path,
            device=self.device,
            reading=model.reading,
            size=image_size(image) if image is not None and model.reading.upsample else None,
            entry=self._entry_of(model, path, image),
            mapped=True,
        )
        class_map = model.class_map
        if isinstance(scores, Evidence):
            if self.is_single and scores.class_map != fingerprint(class_map):
                expected = f"evidence made with {'this' if class_map else 'no'} class map"
                got = f"evidence made with {'another' if scores.class_map else 'no'} class map"
                fix = "run cpseg compact with the calibration's"
                raise ValueError(message(str(path), expected, got, fix))
            return scores
        if class_map is not None:
            with name_file_in_errors(path):
                scores = class_map(scores)
        if self.classes is not None and len(scores) != self.classes[number]:
            expected = f"{self.classes[number]} classes like the first image"
            got, fix = f"{len(scores)}", "use the scores of one model"
            raise ValueError(message(str(path), expected, got, fix))
        return scores

    def probabilities(self, files: Path | Files) -> Tensor:
        """The probabilities ``[K, H, W]`` in a file, or channels of several; no evidence."""
        scores = self.scores(files)
        if isinstance(scores, Evidence):
            raise no_probabilities(files if isinstance(files, Path) else files[0])
        return scores

    def shape(self, files: Path | Files) -> tuple[int, int, int]:
        """Classes, height and width of an image's first score file, from its header alone."""
        files = (files,) if isinstance(files, Path) else files
        return self._shape(self.models[0], files[0], self._image_of(files))

    def num_classes_of(self, files: Files) -> tuple[int, ...]:
        """Number of classes of every model, from the headers of an image's score files."""
        pairs = zip(self.models, files, strict=False)
        image = self._image_of(files)
        return tuple(self._shape(model, path, image)[0] for model, path in pairs)

    def _shape(self, model: ScoreFolder, path: Path, image: Path | None) -> tuple[int, int, int]:
        entry = self._entry_of(model, path, image)
        num_classes, height, width = read_shape(path, reading=model.reading, entry=entry)
        if image is not None and model.reading.upsample:
            height, width = image_size(image)
        if model.class_map is not None:
            with name_file_in_errors(path):
                model.class_map.check_source(num_classes, str([num_classes, height, width]))
            num_classes = model.class_map.num_classes
        return num_classes, height, width

    def with_projection(self, labelled: Sequence[Pair]) -> Source:
        """The source with principal components of its features, where it has features.

        They are found on the labelled and the unlabelled images together, at most
        ``MOST_PROJECTED`` of them, chosen by name.

        Raises:
            ValueError: no list of unlabelled images, or features that do not suffice.
            FileNotFoundError: an image has no file of features.
        """
        if self.features is None or self.projection is not None:
            return self
        where = str(self.features)
        if self.unlabelled is None:
            expected = "the list of the unlabelled images, to find components of features on"
            fix = "pass --unlabelled LIST, or Source(unlabelled=...)"
            raise ValueError(message(where, expected, "none", fix))
        names = {pair.image for pair in (*labelled, *self.read_ids(self.unlabelled, columns=1))}
        chosen = sorted(names, key=lambda name: digest(["features", name]))[:MOST_PROJECTED]
        paths = [find_scores(self.features, name, kind="features") for name in sorted(chosen)]
        depth = 0

        def features() -> Iterator[Tensor]:
            nonlocal depth
            for path in paths:
                found = read_features(path, device=self.device)
                depth = depth or len(found)
                if len(found) != depth:
                    expected, got = f"features of {depth} channels like the first", f"{len(found)}"
                    raise ValueError(message(str(path), expected, got, "use one encoder"))
                yield found

        fitted = FeatureProjection.fit(features(), components=self.components)
        return replace(self, projection=fitted)

    def check_masks(self, pairs: Sequence[Pair], where: str) -> None:
        """Every labelled image has its mask.

        Raises:
            FileNotFoundError: there is no such file.
        """
        for pair in pairs:
            path = self.root / str(pair.mask)
            if not path.is_file():
                expected, fix = f"a mask of {pair.image}", "check the list, or remove the line"
                raise FileNotFoundError(message(where, expected, f"{path}, which is no file", fix))

    def labels(self, pair: Pair, num_classes: int, size: tuple[int, int]) -> Tensor:
        """The true labels of an image, void as 255."""
        assert pair.mask is not None
        path = self.root / pair.mask
        return read_labels(path, self.mask_format, num_classes, size).to(self.device)


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images with the score file of each: the one way to go through them.

    Attributes:
        source: the data set and the scores; components of features are known.
        pairs: the images and their masks.
        paths: the files of every image.
        num_source: number of classes in the score files, after the source's class map; of all
            models together where there are several.
        num_classes: number of classes in the masks; another number where a recalibration maps
            the model's classes onto those of the data set. Of several models that of the first.
        size: height and width of the first image's scores.
        progress: wraps the loops over images.
        sources: number of classes of every model.
    """

    source: Source
    pairs: list[Pair]
    paths: Mapping[Pair, Files]
    num_source: int
    num_classes: int
    size: tuple[int, int]
    progress: Progress = quiet
    sources: tuple[int, ...] = ()

    @classmethod
    def open(
        cls, source: Source, pairs: Sequence[Pair], *, progress: Progress = quiet
    ) -> LabelledImages:
        """Locate every score file; the first one says how many classes there are.

        Raises:
            FileNotFoundError: an image has no score file.
            ValueError: two images share one, the first holds evidence, or one image is listed
                under two names, by a symbolic link: it would count twice.
        """
        pairs = list(pairs)
        check_distinct(source.root, pairs)
        paths = source.locate(pairs)
        first = paths[pairs[0]]
        num_classes, height, width = source.shape(first)
        sources = source.num_classes_of(first)
        source = replace(source.with_projection(pairs), classes=sources)
        size = (height, width)
        return cls(source, pairs, paths, sum(sources), num_classes, size, progress, sources)

    def read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Probabilities ``[K, H, W]`` and true labels ``[H, W]`` of an image, void as 255.

        Raises:
            ValueError: another number of classes than the first image, or bad files.
        """
        probs = self.source.probabilities(self.paths[pair])
        return probs, self.source.labels(pair, self.num_classes, (probs.shape[1], probs.shape[2]))

    def feed(
        self,
        update: Callable[[Pair, Tensor, Tensor], object],
        pairs: Sequence[Pair],
        title: str,
        *,
        every_rank: bool = False,
    ) -> None:
        """Read images one after the other and hand each to ``update(pair, probs, labels)``.

        An error that ``update`` raises names the image's score file.

        Args:
            update: what takes the image.
            pairs: images among :attr:`pairs`.
            title: of the progress bar; no bar where there are no images.
            every_rank: every rank reads all of these images; by default each reads its shard.
        """
        mine, count = (pairs, len(pairs)) if every_rank else shard(pairs)
        if not pairs:
            return
        with closing(in_order(self.read, mine, self.source.workers)) as read:
            for pair, (probs, labels) in zip(self.progress(mine, count, title), read, strict=True):
                with name_file_in_errors(self.paths[pair][0]):
                    update(pair, probs, labels)


def check_distinct(root: Path, pairs: Sequence[Pair]) -> None:
    """Every listed image is another file.

    Raises:
        ValueError: one file has two names, by a symbolic link.
    """
    folders: dict[str, str] = {}  # what a folder really is; there are few
    owner: dict[str, str] = {}
    for pair in pairs:
        path = os.path.join(root, pair.image)
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        file = os.path.join(folders[folder], name)
        if os.path.islink(file):
            file = os.path.realpath(file)
        if file in owner:
            got = f"{owner[file]} and {pair.image}, which are one file"
            raise ValueError(message("id list", "every image once", got, "remove one of them"))
        owner[file] = pair.image


def read_example(
    source: Source, pair: Pair, path: Path, num_classes: int, num_source: int | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities and true labels of an image, as many classes as the other images have.

    Args:
        source: the data set and the scores.
        pair: the image and its mask.
        path: its score file.
        num_classes: number of classes in the masks.
        num_source: number of classes in the score files, where it is another.
    """
    source = replace(source, classes=(num_classes if num_source is None else num_source,))
    probs = source.probabilities(path)
    return probs, source.labels(pair, num_classes, (probs.shape[1], probs.shape[2]))


def fingerprint(class_map: ClassMap | None) -> str | None:
    """Of a class map, by which evidence knows it."""
    return None if class_map is None else digest(class_map.to_json())
