"""``cpseg export`` and ``cpseg import``: the loop of correction, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.support import folders
from tests.support.folders import VOID, DataSet, command, done, files, refused

from cpseg.files import read_ids

NAMES = ("sky", "road", "car", "tree")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """Six images, ``labels`` as ``cpseg label`` leaves them, and the names of the classes."""
    made = folders.make(tmp_path / "data", sizes=((12, 16), (7, 1), (1, 1)))
    out = made.root.parent / "labels"
    for image, scores in made.scores.items():
        path = out / "masks" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.where(scores.max(0) > 0.6, scores.argmax(0), VOID).astype(np.uint8)
        if image.endswith(("2.png", "5.png")):
            values[:] = 1  # of one pixel: never void alone
        Image.fromarray(values).save(path)
    (out / "ids.txt").write_text("".join(f"{image} ?\n" for image in made.images))
    (out / "run.json").write_text(json.dumps({"root": str(made.root)}))
    (made.root.parent / "names.txt").write_text("\n".join(NAMES))
    return made


def values(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


SUFFIX = {"coco": ".json", "label-studio": ".json", "cvat": ".zip"}


def accept(path: Path) -> None:
    """What Label Studio exports once predictions were accepted as they are."""
    tasks = json.loads(path.read_text())
    for task in tasks:
        task["annotations"] = [{"result": task.pop("predictions")[0]["result"]}]
    path.write_text(json.dumps(tasks))


@pytest.mark.parametrize("form", SUFFIX)
def test_labels_go_out_and_come_back(form: str, data: DataSet, capsys: Capture) -> None:
    base = data.root.parent
    file, names = base / f"f{SUFFIX[form]}", ["--names", base / "names.txt"]
    said = done(command(capsys, "export", base / "labels", "--to", form, *names, "-o", file)).out
    assert said.splitlines()[0] == f"{file}: 6 images of 6, 4 classes"
    assert said.splitlines()[-1] == (
        f"when the masks are corrected: cpseg import FILE --from {form} --labels {base}/labels "
        f"--names {base}/names.txt -o CORRECTED"
    )
    if form == "label-studio":
        assert f"{base}/f.xml: the labelling configuration\n" in said
        accept(file)
    if form == "cvat":
        assert "needs these labels: sky, road, car, tree, void\n" in said
    words = ["--from", form, "--labels", base / "labels", *names]
    said = done(command(capsys, "import", file, *words, "-o", base / "back")).out
    assert said.splitlines()[:2] == [
        f"{base}/back: ids.txt and masks of 6 images",
        "0.0 % of their labels were changed, and 0 pixels without a label got one",
    ]
    pairs = read_ids(base / "back" / "ids.txt")
    assert [pair.image for pair in pairs] == data.images
    for image, mask in pairs:
        assert mask == str(base / "back" / "masks" / image)
        assert np.array_equal(values(Path(mask)), values(base / "labels" / "masks" / image))
    assert (base / "back" / "classes.txt").read_text().splitlines() == list(NAMES)
    plain = ["--root", data.root, "--ids", data.ids, *names]
    said = done(command(capsys, "import", file, "--from", form, *plain, "-o", base / "two")).out
    assert "changed" not in said
    assert files(base / "two" / "masks") == files(base / "back" / "masks")


def test_corrected_masks_calibrate(tmp_path: Path, capsys: Capture) -> None:
    """Label, export a random draw, correct, import, calibrate on the corrected masks."""
    data = folders.make(tmp_path / "data", count=8)
    labelled, rest = data.images[:4], data.images[4:]
    train, pool = data.list_ids("l.txt", labelled), data.list_ids("u.txt", rest, masks=False)
    rule, out, file = tmp_path / "c.safetensors", tmp_path / "labels", tmp_path / "f.json"
    options = ["--alpha", "none", "--background", "none", "-o"]
    done(command(capsys, "calibrate", *data.options(ids=train), *options, rule))
    done(command(capsys, "label", *data.options(ids=pool, calibration=rule), "-o", out))
    drawn = ["--draw", 3, "--seed", 1, "-o", file]
    said = done(command(capsys, "export", out, "--to", "coco", *drawn)).out
    assert f"{file}: 3 images, drawn at random from 4, 4 classes\n" in said
    content = json.loads(file.read_text())
    assert [each["name"] for each in content["categories"]] == [f"class {k}" for k in range(4)]
    first = content["images"][0]
    truth = data.labels[first["file_name"]]
    own = [each for each in content["annotations"] if each["image_id"] == first["id"]]
    content["annotations"] = [each for each in content["annotations"] if each not in own]
    for k in range(4):  # a person paints the first image anew
        runs, last, flat = [], False, (truth == k).ravel(order="F").tolist()
        for value in flat:
            if value != last or not runs:
                runs += [0, 1] if value and not runs else [1]
                last = value
            else:
                runs[-1] += 1
        entry = {"category_id": k + 1, "image_id": first["id"], "id": 1000 + k}
        content["annotations"].append({**entry, "segmentation": {"size": [12, 16], "counts": runs}})
    file.write_text(json.dumps(content))
    back = tmp_path / "back"
    said = done(command(capsys, "import", file, "--from", "coco", "--labels", out, "-o", back)).out
    assert "1 other images are not in" in said
    assert "drawn at random" in said
    pairs = read_ids(back / "ids.txt")
    assert np.array_equal(values(Path(str(pairs[0].mask))), truth)
    before = values(out / "masks" / pairs[0].image)
    changed = ((truth != VOID) & (truth != before)).sum()
    total = (truth != VOID).sum() + 2 * 12 * 16
    assert f"{100 * changed / total:.1f} % of their labels were changed" in said
    again = data.options(ids=back / "ids.txt")
    done(command(capsys, "calibrate", *again, *options, tmp_path / "again.safetensors"))


def test_a_draw_is_random_and_the_same_again(data: DataSet, capsys: Capture) -> None:
    base = data.root.parent

    def drawn(*words: object) -> list[str]:
        options = ["--to", "coco", "--names", base / "names.txt", *words, "-o", base / "f.json"]
        done(command(capsys, "export", base / "labels", *options))
        content = json.loads((base / "f.json").read_text())
        return [each["file_name"] for each in content["images"]]

    assert drawn("--draw", 3) == drawn("--draw", 3, "--seed", 0)
    several = {tuple(drawn("--draw", 2, "--seed", seed)) for seed in range(8)}
    assert len(several) > 2
    assert all(sorted(each) == list(each) for each in several)
    some = data.list_ids("some.txt", data.images[2:4])
    assert drawn("--ids", some) == data.images[2:4]
    assert set(drawn("--ids", some, "--draw", 1)) < set(data.images[2:4])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "coco"], "names: expected names of the classes, got none; pass a file of names"),
        (["--to", "cvat", "--uncompressed"], "--uncompressed: expected --to coco, got cvat"),
        (["--to", "cvat", "--prefix", "x"], "--prefix: expected --to label-studio, got cvat"),
        (["--to", "cvat", "--seed", "1"], "--seed: expected --draw, got none"),
        (["--to", "cvat", "--names", "NAMES", "--draw", "7"], "export: expected draw of at most 6"),
        (["--to", "cvat", "--names", "TWO"], "expected labels in 0..1 or 255, one name for each"),
        (["--to", "cvat", "--names", "NAMES", "--ids", "OTHER"], "other.png, which is none"),
        (["--to", "voc"], "'voc'"),
    ],
)
def test_exports_that_are_refused(
    words: list[str], says: str, data: DataSet, capsys: Capture
) -> None:
    base = data.root.parent
    (base / "two.txt").write_text("sky\nroad\n")
    (base / "other.txt").write_text("other.png\n")
    paths = {"NAMES": "names.txt", "TWO": "two.txt", "OTHER": "other.txt"}
    given = [base / paths[word] if word in paths else word for word in words]
    refused(command(capsys, "export", base / "labels", *given, "-o", base / "f"), says)
    assert not (base / "f").exists()


def exported(data: DataSet, capsys: Capture) -> dict[str, object]:
    """The content of a COCO file of all images."""
    base = data.root.parent
    options = ["--to", "coco", "--names", base / "names.txt", "--uncompressed", "-o"]
    done(command(capsys, "export", base / "labels", *options, base / "f.json"))
    content: dict[str, object] = json.loads((base / "f.json").read_text())
    return content


def back(data: DataSet, capsys: Capture, content: object, *words: object) -> folders.Result:
    base = data.root.parent
    (base / "f.json").write_text(json.dumps(content))
    given = words or ("--labels", base / "labels", "--names", base / "names.txt")
    return command(capsys, "import", base / "f.json", "--from", "coco", *given, "-o", base / "back")


def test_images_are_found_by_what_tools_call_them(data: DataSet, capsys: Capture) -> None:
    content = exported(data, capsys)
    for number, image in enumerate(content["images"]):  # type: ignore[arg-type,var-annotated]
        name = Path(image["file_name"])
        image["file_name"] = [name.name, f"uploads/{name.name}", str(name.with_suffix(".jpg"))][
            number % 3
        ]
    done(back(data, capsys, content))
    pairs = read_ids(data.root.parent / "back" / "ids.txt")
    assert [pair.image for pair in pairs] == data.images


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("images/99.png", "expected names of the known images, got 'images/99.png', which is none"),
        ("", "expected names of the known images, got '', which is none"),
        ("../..", "expected names of the known images, got '../..', which is none"),
        ("images/00.jpg", "every image once, got images/00.png and images/00.jpg for images/00"),
    ],
)
def test_images_that_are_not_known(name: str, says: str, data: DataSet, capsys: Capture) -> None:
    content = exported(data, capsys)
    content["images"][3]["file_name"] = name  # type: ignore[index]
    refused(back(data, capsys, content), says)
    assert not (data.root.parent / "back" / "ids.txt").exists()


def test_a_name_that_several_images_have(data: DataSet, capsys: Capture) -> None:
    base = data.root.parent
    content = exported(data, capsys)
    content["images"][0]["file_name"] = "00.png"  # type: ignore[index]
    (base / "both.txt").write_text("a/00.png\nb/00.png\nimages/01.png\n")
    words = ["--root", data.root, "--ids", base / "both.txt", "--names", base / "names.txt"]
    refused(back(data, capsys, content, *words), "'00.png', which is a/00.png and b/00.png")


def test_a_mask_of_another_size_than_its_image(data: DataSet, capsys: Capture) -> None:
    content = exported(data, capsys)
    first = content["images"][0]  # type: ignore[index]
    first["height"] = 13
    content["annotations"] = [  # type: ignore[index]
        {**each, "segmentation": {"size": [13, 16], "counts": [0, 13 * 16]}}
        for each in content["annotations"][:1]  # type: ignore[index]
    ]
    refused(back(data, capsys, content), "expected a mask 12x16 like images/00.png, got 13x16")
    base = data.root.parent
    words = ["--root", data.root, "--ids", data.ids, "--names", base / "names.txt"]
    refused(back(data, capsys, content, *words), "expected a mask 12x16 like images/00.png")
    (data.root / "images" / "00.png").unlink()
    refused(back(data, capsys, content, *words), "images/00.png: No such file")


def test_images_without_a_label_are_left_out(data: DataSet, capsys: Capture) -> None:
    content = exported(data, capsys)
    content["annotations"] = [  # type: ignore[index]
        each
        for each in content["annotations"]
        if each["image_id"] != 1  # type: ignore[attr-defined]
    ]
    result = back(data, capsys, content)
    assert result.code == 0
    assert "warning: 1 images without a labelled pixel were left out: images/00.png" in result.err
    assert "masks of 5 images" in result.out
    content["annotations"] = []
    (data.root.parent / "back").rename(data.root.parent / "first")
    refused(back(data, capsys, content), "expected images with labels, got 6 images without one")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected the folder that was exported (--labels), or --root and --ids, got neither"),
        (["--root", "R"], "expected the folder that was exported (--labels), or --root and --ids"),
        (["--labels", "L"], "names: expected names of the classes, got none"),
        (
            ["--labels", "L", "--from", "cvat", "--overlap", "last"],
            "--overlap: expected --from coco",
        ),
        (["--labels", "L", "--names", "N", "-o", "L"], "a new or empty folder, got one with"),
        (["--labels", "L", "--names", "SHORT"], "expected a class among sky, got 'road'"),
    ],
)
def test_imports_that_are_refused(
    words: list[str], says: str, data: DataSet, capsys: Capture
) -> None:
    base = data.root.parent
    exported(data, capsys)
    (base / "short.txt").write_text("sky\n")
    paths = {
        "R": data.root,
        "L": base / "labels",
        "N": base / "names.txt",
        "SHORT": base / "short.txt",
    }
    given = [paths.get(word, word) for word in words]
    form = [] if "--from" in words else ["--from", "coco"]
    result = command(capsys, "import", base / "f.json", *form, "-o", base / "back", *given)
    refused(result, says)


def test_names_come_from_beside_the_scores(data: DataSet, capsys: Capture) -> None:
    base = data.root.parent
    facts = {"root": str(data.root), "probs": str(data.probs)}
    (base / "labels" / "run.json").write_text(json.dumps(facts))
    (data.probs / "classes.txt").write_text("\n".join(NAMES))
    done(command(capsys, "export", base / "labels", "--to", "coco", "-o", base / "f.json"))
    content = json.loads((base / "f.json").read_text())
    assert [each["name"] for each in content["categories"]] == list(NAMES)


@pytest.mark.parametrize("mosaic", [True, False])
def test_geotiff_goes_out_and_comes_back(mosaic: bool, tmp_path: Path, capsys: Capture) -> None:
    rasterio = pytest.importorskip("rasterio")
    root, out = tmp_path / "data", tmp_path / "labels"
    rng = np.random.default_rng(0)
    masks = {}
    for number in range(3):
        name = f"tiles/{number}.tif"
        masks[name] = rng.choice([0, 1, VOID], (4, 6)).astype(np.uint8)
        path = out / "masks" / f"tiles/{number}.png"
        for each in (path, root / name):
            each.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(masks[name]).save(path)
        profile = {"driver": "GTiff", "count": 5, "height": 4, "width": 6, "dtype": "uint16"}
        transform = rasterio.Affine(2, 0, 100 + 12 * number, 0, -2, 900)
        with rasterio.open(root / name, "w", crs="EPSG:3035", transform=transform, **profile):
            pass
    (out / "ids.txt").write_text("".join(f"{name} ?\n" for name in masks))
    (out / "run.json").write_text(json.dumps({"root": str(root)}))
    (tmp_path / "names.txt").write_text("field\nwater\n")
    names = ["--names", tmp_path / "names.txt"]
    target = tmp_path / ("whole.tif" if mosaic else "maps")
    done(command(capsys, "export", out, "--to", "geotiff", *names, "-o", target))
    if not mosaic:
        assert sorted(files(target)) == sorted(masks)
        with rasterio.open(target / "tiles/2.tif") as made:
            assert np.array_equal(made.read(1), masks["tiles/2.tif"])
            assert (made.crs, made.transform.c) == ("EPSG:3035", 124)
        return
    with rasterio.open(target, "r+") as made:
        assert made.shape == (4, 18)
        values_ = made.read(1)
        assert np.array_equal(values_, np.hstack(list(masks.values())))
        values_[0, 0] = 1  # corrected in a map tool
        made.write(values_, 1)
    words = ["--from", "geotiff", "--labels", out, *names, "-o", tmp_path / "back"]
    done(command(capsys, "import", target, *words))
    for image, mask in read_ids(tmp_path / "back" / "ids.txt"):
        wanted = masks[image].copy()
        wanted[0, 0] = 1 if image == "tiles/0.tif" else wanted[0, 0]
        assert np.array_equal(values(Path(str(mask))), wanted)


PAGE = Path(__file__).parents[2] / "docs" / "exchange.md"


def geo_data(folder: Path) -> None:
    """What the page's commands start from: ``R`` with GeoTIFFs, ``P``, lists, names and a rule."""
    import rasterio

    rng = np.random.default_rng(0)
    lists: dict[str, list[str]] = {"labelled.txt": [], "unlabelled.txt": []}
    for number in range(64):
        name = f"{number:02d}"
        image, mask, scores = (
            folder / f"{place}/{name}{suffix}"
            for place, suffix in (("R/images", ".tif"), ("R/masks", ".png"), ("P", ".tif"))
        )
        truth = rng.integers(0, 3, (3, 4))
        odds = np.exp(rng.normal(size=(3, 3, 4)) + 2 * (np.arange(3)[:, None, None] == truth))
        transform = rasterio.Affine(1, 0, 1000 + 4 * number, 0, -1, 1000)
        for path, bands in ((image, np.zeros((3, 3, 4))), (scores, 255 * odds / odds.sum(0))):
            path.parent.mkdir(parents=True, exist_ok=True)
            profile = {"driver": "GTiff", "count": 3, "height": 3, "width": 4, "dtype": "uint8"}
            with rasterio.open(path, "w", crs="EPSG:3035", transform=transform, **profile) as made:
                made.write(bands.astype(np.uint8))
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth.astype(np.uint8)).save(mask)
        line = f"images/{name}.tif masks/{name}.png\n"
        lists["labelled.txt" if number < 20 else "unlabelled.txt"].append(line)
    for name, lines in lists.items():
        (folder / name).write_text("".join(lines))
    (folder / "names.txt").write_text("field\nwater\nwood\n")


@pytest.mark.ci
def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """What people do in the tools is to accept everything."""
    pytest.importorskip("rasterio")
    monkeypatch.chdir(tmp_path)
    geo_data(tmp_path)
    labelled = ["--root", "R", "--ids", "labelled.txt", "--probs", "P"]
    options = ["--alpha", "0.3", "--variant", "image", "--background", "none"]
    done(command(capsys, "calibrate", *labelled, *options, "-o", "c.safetensors"))
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("cpseg ")]
    assert len(lines) == 13
    for line in lines:
        words = line.split()[1:]
        if "corrected.zip" in words:
            Path("to-correct.zip").rename("corrected.zip")
        if "export.json" in words:
            Path("tasks.json").rename("export.json")
            accept(Path("export.json"))
        result = command(capsys, *words)
        assert result.code == 0, (line, result.err)
    code = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
    (tmp_path / "scores.tif").write_bytes((tmp_path / "P" / "30.tif").read_bytes())
    exec(compile(code, str(PAGE), "exec"), {})
    labels = [Image.open(path) for path in ("labels.tif", "OUT/masks/images/30.png")]
    assert np.array_equal(*map(np.array, labels))
    wanted = files(tmp_path / "FROM-COCO" / "masks")
    assert len(wanted) == 44
    for name in ("FROM-LS", "FROM-CVAT", "FROM-MAP"):
        assert files(tmp_path / name / "masks") == wanted
    assert len(read_ids(tmp_path / "CORRECTED" / "ids.txt")) == 40
