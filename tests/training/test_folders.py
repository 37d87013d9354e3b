"""Rows of a data set on disk: what the tensor functions give for the files of the command."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support import folders
from tests.support.folders import DataSet, complains
from tests.support.helpers import same
from torch.utils.data import DataLoader

from cpseg import Calibration, PseudoLabelled, WeakAugmentation, certainty
from cpseg.core.class_map import ClassMap
from cpseg.files.dataset import ScoreFolder, Source
from cpseg.jobs.calibrate import calibrate
from cpseg.jobs.compact import compact
from cpseg.jobs.label import label
from cpseg.jobs.recalibrate import RecalibrationOptions


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    made = folders.make(tmp_path / "data", count=6, sizes=((12, 16), (16, 12)))
    made.list_ids("labelled.txt", made.images[:2])
    made.list_ids("unlabelled.txt", made.images[2:], masks=False)
    return made


def thresholds(data: DataSet, source: Source | None = None) -> Calibration:
    source = source or Source(data.root, data.probs)
    ids = data.root / "labelled.txt"
    return calibrate(source, ids, alpha=0.3, background=None, grid=(4, 4))


def rows(data: DataSet, calibration: object, **more: object) -> PseudoLabelled:
    settings = {"labelled": data.root / "labelled.txt", "probs": data.probs, **more}
    return PseudoLabelled.from_folders(  # type: ignore[call-overload]
        data.root, data.root / "unlabelled.txt", calibration=calibration, **settings
    )


def picture(data: DataSet, image: str) -> np.ndarray:
    return np.array(Image.open(data.root / image)).transpose(2, 0, 1).astype(np.float32) / 255


def test_rows_are_images_labels_and_certainty(data: DataSet) -> None:
    calibration = thresholds(data)
    found = rows(data, calibration)
    assert len(found) == 6
    for index, image in enumerate(data.images):
        pixels, labels, weight = found[index]
        assert np.array_equal(pixels, picture(data, image))
        assert labels.dtype == torch.int64
        if index < 2:
            assert np.array_equal(labels, data.labels[image])
            assert np.array_equal(weight, (data.labels[image] != 255).astype(np.float32))
        else:
            probs = torch.from_numpy(data.scores[image])
            assert same(labels, calibration.pseudo_labels(probs))
            assert same(weight, certainty(probs, calibration))
    assert all(same(x, y) for x, y in zip(found[-1], found[5], strict=True))
    with pytest.raises(IndexError):
        found[6]
    assert len(list(found)) == 6  # a for loop ends


def test_labels_are_the_masks_of_the_command(data: DataSet, tmp_path: Path) -> None:
    calibration = thresholds(data)
    calibration.save(tmp_path / "c.safetensors")
    source = Source(data.root, data.probs)
    label(source, data.root / "unlabelled.txt", calibration, tmp_path / "out")
    for (_, labels, _), image in zip(
        rows(data, tmp_path / "c.safetensors", labelled=None), data.images[2:], strict=True
    ):
        assert np.array_equal(labels, np.array(Image.open(tmp_path / "out" / "masks" / image)))


def test_several_sources_and_features_are_those_of_the_command(tmp_path: Path) -> None:
    data = folders.make(tmp_path / "data", count=12, sizes=((12, 16), (16, 12)))
    data.list_ids("labelled.txt", data.images[:10])
    data.list_ids("unlabelled.txt", data.images[10:], masks=False)
    other, features = tmp_path / "student", tmp_path / "features"
    draws = np.random.default_rng(5)
    for image in data.images:
        height, width = data.labels[image].shape
        scores = draws.dirichlet(np.ones(3), (height, width)).transpose(2, 0, 1)  # other classes
        hot = (data.labels[image] == np.arange(4)[:, None, None]).astype(float)
        coarse = hot.reshape(4, height // 4, 4, width // 4, 4).mean((2, 4))  # worth its use
        for folder, values in ((other, scores), (features, coarse)):
            place = (folder / image).with_suffix(".npy")
            place.parent.mkdir(parents=True, exist_ok=True)
            np.save(place, values.astype(np.float32))
    models = [data.probs, other]
    source = Source(
        data.root,
        models[0],
        others=(ScoreFolder(other),),
        features=features,
        unlabelled=data.root / "unlabelled.txt",
        components=3,
    )
    options = RecalibrationOptions("dirichlet", share=0.5, context=(), num_classes=4)
    calibration = calibrate(
        source,
        data.root / "labelled.txt",
        alpha=0.3,
        background=None,
        grid=(4, 4),
        recalibration=options,
    )
    label(source, data.root / "unlabelled.txt", calibration, tmp_path / "out")
    found = rows(data, calibration, labelled=None, probs=models, features=features)
    for (_, labels, _), image in zip(found, data.images[10:], strict=True):
        assert np.array_equal(labels, np.array(Image.open(tmp_path / "out" / "masks" / image)))
    with pytest.raises(ValueError, match="the encoder's features, as calibrated"):
        rows(data, calibration, labelled=None, probs=models)
    with pytest.raises(ValueError, match="2 folders of scores, as calibrated: probs, student"):
        rows(data, calibration, labelled=None, features=features)


def as_uint8(path: Path, probs: np.ndarray) -> None:
    np.savez(path.with_suffix(".npz"), probs=np.round(probs * 255).astype(np.uint8))


def as_half(path: Path, probs: np.ndarray) -> None:
    torch.save(torch.from_numpy(probs).half(), path.with_suffix(".pt"))


@pytest.mark.parametrize(("write", "unit"), [(as_uint8, 1 / 510), (as_half, 1e-3)])
@pytest.mark.parametrize("by_name", [False, True])
def test_score_files_are_found_and_read_as_by_the_command(
    data: DataSet, tmp_path: Path, write: Callable[..., None], unit: float, by_name: bool
) -> None:
    """A sub-folder like that of the images or none, uint8 as p = u / 255."""
    calibration, other = thresholds(data), tmp_path / "scores"
    for image in data.images:
        place = other / (Path(image).name if by_name else image)
        place.parent.mkdir(parents=True, exist_ok=True)
        write(place, data.scores[image])
    found, plain = rows(data, calibration, probs=other), rows(data, calibration)
    for index in range(2, 6):
        probs = found.scores(index - 2)
        assert float((probs - plain.scores(index - 2)).abs().max()) <= unit * 1.01
        assert same(found[index][1], calibration.pseudo_labels(probs))


def test_evidence_gives_the_same_rows(data: DataSet, tmp_path: Path) -> None:
    calibration = thresholds(data)
    compact(Source(data.root, data.probs), data.ids, tmp_path / "evidence", background=None)
    short = rows(data, calibration, probs=tmp_path / "evidence")
    for one, other in zip(short, rows(data, calibration), strict=True):
        assert all(same(x, y) for x, y in zip(one, other, strict=True))


def test_the_class_map_and_mask_values_of_the_calibration_are_used(data: DataSet) -> None:
    for image in data.images:
        stored = np.where(data.labels[image] == 255, 0, np.minimum(data.labels[image], 3) + 1)
        Image.fromarray(stored.astype(np.uint8)).save(data.mask_file(image))
    swapped = ClassMap((1, 0, 2, 3))
    source = Source(data.root, data.probs, class_map=swapped, first_class=1)
    calibration = thresholds(data, source)
    found = rows(data, calibration)
    assert np.array_equal(found[0][1], data.labels[data.images[0]])
    mapped = torch.from_numpy(data.scores[data.images[4]])[[1, 0, 2, 3]]
    assert same(found[4][1], calibration.pseudo_labels(mapped))


def test_dictionaries_carry_the_rows_under_the_names_of_models(data: DataSet) -> None:
    calibration = thresholds(data)
    plain, named = rows(data, calibration), rows(data, calibration, as_dict=True)
    assert len(named) == 6
    for index in (0, 5):
        row = named[index]
        assert list(row) == ["pixel_values", "labels", "weights"]
        assert all(same(x, y) for x, y in zip(row.values(), plain[index], strict=True))


def test_normalisation_comes_after_the_transform(data: DataSet) -> None:
    def brighter(
        image: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert float(image.min()) >= 0
        assert float(image.max()) <= 1
        return image / 2, labels, weight

    mean, std = (0.5, 0.25, 0.0), (0.5, 0.2, 1.0)
    found = rows(data, thresholds(data), transform=brighter, mean=mean, std=std)[3][0]
    want = picture(data, data.images[3]) / 2
    for channel in range(3):
        want[channel] = (want[channel] - mean[channel]) / std[channel]
    assert np.allclose(found, want, atol=1e-6)


def test_labelled_images_are_repeated_and_win(data: DataSet) -> None:
    data.list_ids("unlabelled.txt", data.images[1:], masks=False)  # image 1 is in both lists
    found = rows(data, thresholds(data), repeat_labelled=3)
    assert len(found) == 2 * 3 + 4
    truth = [data.labels[image] for image in data.images[:2]] * 3
    assert all(np.array_equal(found[index][1], each) for index, each in enumerate(truth))


def test_labelled_images_alone_for_validation(data: DataSet) -> None:
    labelled = data.root / "labelled.txt"
    found = PseudoLabelled.from_folders(
        data.root, None, data.probs, thresholds(data), labelled=labelled
    )
    assert [row[1].tolist() for row in found] == [data.labels[x].tolist() for x in data.images[:2]]
    with pytest.raises(ValueError, match="neither ids nor labelled"):
        PseudoLabelled.from_folders(data.root, None, data.probs, thresholds(data))


def test_workers_load_batches(data: DataSet) -> None:
    augment = WeakAugmentation(8)
    found = rows(data, thresholds(data), transform=augment, as_dict=True)
    again = pickle.loads(pickle.dumps(found))  # what a worker is sent where it is not forked
    assert len(again) == len(found) == 6
    loader = DataLoader(found, batch_size=3, num_workers=2)
    shapes = [{name: tuple(x.shape) for name, x in batch.items()} for batch in loader]
    assert shapes == [{"pixel_values": (3, 3, 8, 8), "labels": (3, 8, 8), "weights": (3, 8, 8)}] * 2


def test_rows_in_memory_take_labelled_images_too() -> None:
    image = torch.zeros(3, 1, 2)
    threshold = torch.full((1, 1), 0.9)
    calibration = Calibration(threshold, torch.tensor([[9]]), 0.1, 9, 2, ignore_index=7)
    labelled = [(image, torch.tensor([[1, 7]], dtype=torch.uint8))]
    found = PseudoLabelled([], lambda index: image, calibration, labelled=labelled)
    assert len(found) == 1
    _, labels, weight = found[0]
    assert labels.tolist() == [[1, 7]]
    assert weight.tolist() == [[1.0, 0.0]]
    wrong = PseudoLabelled(
        [], lambda i: image, calibration, labelled=[(image, torch.ones(2, 2).int())]
    )
    with pytest.raises(ValueError, match="labels at the size of image 0") as caught:
        wrong[0]
    complains(caught.value, "PseudoLabelled", "resize the labels")


def test_bad_input_is_named(data: DataSet, tmp_path: Path) -> None:
    calibration = thresholds(data)
    where = "PseudoLabelled.from_folders"

    def refused(place: object, *parts: str, **more: object) -> None:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            rows(data, calibration, **more)
        complains(caught.value, place, *parts)

    refused(where, "repeat_labelled as a whole number >= 1", "got 0", repeat_labelled=0)
    refused(where, "a list of labelled images", labelled=None, repeat_labelled=2)
    refused(where, "a folder as probs", "nowhere", probs=tmp_path / "nowhere")
    refused(where, "folders of scores", "got none", probs=[])
    refused(where, "as calibrated", "pass one probs= and no", probs=[data.probs, data.probs])
    refused(where, "as calibrated", "and no features=", features=data.probs)
    refused("PseudoLabelled", "mean and std", "one of them", mean=(0.5,))
    refused("PseudoLabelled", "std as positive numbers", mean=(0.5,), std=(0,))
    images = data.list_ids("images.txt", data.images[:2], masks=False)
    refused(f"{images}, line 1", "'image mask'", labelled=images)
    refused("masks=", "a folder", "nowhere", labelled=images, masks=tmp_path / "nowhere")
    short = rows(data, calibration, mean=(0.1, 0.2), std=(1, 1))
    with pytest.raises(ValueError, match="mean and std of 3 channels, got 2"):
        short[0]
    with pytest.raises(TypeError, match="a Calibration"):
        PseudoLabelled([], lambda index: torch.zeros(1), "c")  # type: ignore[arg-type]
    path = data.score_file(data.images[3])
    np.save(path, data.scores[data.images[3]][:, :4])
    with pytest.raises(ValueError, match="image's size") as error:
        rows(data, calibration)[3]
    complains(error.value, path)
    data.mask_file(data.images[1]).unlink()
    refused(data.root / "labelled.txt", f"a mask of {data.images[1]}", "no file")
    (data.root / data.images[3]).unlink()
    refused(where, f"an image {data.images[3]}", labelled=None)
    path.unlink()
    refused(data.probs, "no such file", "03", labelled=None)


def test_a_calibration_of_other_classes_is_refused(data: DataSet) -> None:
    wrong = replace(thresholds(data), num_classes=5)
    with pytest.raises(ValueError, match="5 classes"):
        rows(data, wrong)[2]
