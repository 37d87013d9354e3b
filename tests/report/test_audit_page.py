"""The page of an audit, as a person uses it in a browser, and the pictures for Label Studio."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.browser import CHROMIUM, Browser, Page
from tests.support.helpers import raises

from cpseg.files.audit_files import CLOSE_UP, Question, read_answers
from cpseg.files.id_lists import Pair
from cpseg.report.audit_page import audit_pictures, picture_of, write_audit_page

PLAN = "plan-7c"
NAMES = ["road", "sky", "<b>car</b>"]
SIZE = (60, 90)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def mask_of(name: str) -> np.ndarray:
    """A rectangle of 2 in 1 in 0."""
    mask = np.zeros(SIZE, np.uint8)
    mask[5:50, 5:80] = 1
    mask[20:30, 10:25] = 2
    return mask


def image_of(name: str) -> Image.Image:
    """Grey, with a red pixel at row 22, column 12 and a white one at the last row and column."""
    colours = np.full((*SIZE, 3), 128, np.uint8)
    colours[22, 12] = (255, 0, 0)
    colours[-1, -1] = 255
    return Image.fromarray(colours)


def questions(count: int) -> list[Question]:
    """The red pixel first, then others of two images."""
    places = [(22, 12), (59, 89), (0, 0), (40, 40)]
    places += [(7 * n % 60, 11 * n % 90) for n in range(4, count)]
    names = ["a.png", "b.png"]
    return [
        Question(n, names[n % 2], row, column, int(mask_of("")[row, column]))
        for n, (row, column) in enumerate(places[:count])
    ]


def write(path: Path, asked: Sequence[Question], **changed: Any) -> Path:
    given: dict[str, Any] = {
        "plan": PLAN,
        "questions": asked,
        "class_names": NAMES,
        "image": image_of,
        "mask": mask_of,
        "allowed": None,
        "title": "Audit of <out>",
        "statement": "At most 5 % & no more. Cannot tell counts as wrong.",
    }
    write_audit_page(path, **{**given, **changed})
    return path


def only_at(total: int, looks: dict[int, int]) -> list[int]:
    return [looks.get(n, -1) for n in range(total + 1)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Write a page, each with its own plan, and open it."""

    tabs = []

    def open_page(
        asked: Sequence[Question], *, width: int = 1280, touch: bool = False, **changed: Any
    ) -> Page:
        page = write(tmp_path / "audit.html", asked, plan=str(tmp_path), **changed)
        tabs.append(browser.open(page, width=width, height=844, touch=touch))
        return tabs[-1]

    yield open_page
    for tab in tabs:
        tab.close()


def given(page: Page) -> dict[int, str]:
    """The answers that the page would save, by number."""
    return {one["number"]: one["answer"] for one in page.evaluate("given().answers")}


# What a person does


@needs_browser
def test_answers_by_keyboard(show: Callable[..., Page]) -> None:
    page = show(questions(8))
    for key in ("y", "N", "u", "ArrowRight", "ArrowLeft", "ArrowDown"):
        page.key(key)
    words = ("yes", "no", "unsure", "yes", "no", "unsure")
    assert given(page) == dict(enumerate(words))
    assert page.text("where").startswith("Pixel 7 of 8 · row 42, column 66 · a.png")
    assert page.text("state") == "6 of 8 answered, 4 wrong (2 cannot tell)."


@needs_browser
def test_a_key_held_down_or_pressed_with_others_is_no_answer(show: Callable[..., Page]) -> None:
    page = show(questions(8))
    for more in ({"autoRepeat": True}, {"modifiers": 2}):
        what = {"key": "n", "text": "n", "windowsVirtualKeyCode": 78, **more}
        page.call("Input.dispatchKeyEvent", type="keyDown", **what)
    assert given(page) == {}


@needs_browser
def test_answers_by_mouse_and_a_double_click_is_one(show: Callable[..., Page]) -> None:
    page = show(questions(8))
    for name in ("#yes", "#no", "#unsure"):
        page.click(name)
        page.click(name)
        page.evaluate("new Promise(done => setTimeout(done, 250))")
    assert given(page) == {0: "yes", 1: "no", 2: "unsure"}


@needs_browser
def test_answers_by_touch_at_the_width_of_a_phone(show: Callable[..., Page]) -> None:
    page = show(questions(8), width=390, touch=True)
    for name in ("#no", "#yes", "#unsure"):
        page.tap(name)
        page.evaluate("new Promise(done => setTimeout(done, 250))")
    page.tap("#undo")
    assert given(page) == {0: "no", 1: "yes"}


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_within_the_screen_and_large_enough(
    show: Callable[..., Page], width: int, scheme: str
) -> None:
    long = "a_very_long_name_of_a_class_without_any_space_" * 3
    page = show(
        questions(4), width=width, touch=width == 390, class_names=[long] * 3, title=long * 2
    )
    page.colours(scheme)
    page.evaluate("document.querySelector('details').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('body *')].filter(e => !e.closest('svg') &&
        e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)"""
    assert page.evaluate(outside) == []
    small = """[...document.querySelectorAll('button, .file, summary, input[type=text]')].filter(
        e => Math.min(e.getBoundingClientRect().width, e.getBoundingClientRect().height) < 44)
        .map(e => e.id)"""
    assert page.evaluate(small) == []
    for name in ("yes", "no", "unsure", "save", "where", "state"):
        assert contrast(page, name) >= 4.5, name


def contrast(page: Page, name: str) -> float:
    """Of an element's text and its background, as WCAG 2 has it."""
    code = """(e => {
        const ink = getComputedStyle(e).color;
        const solid = (c) => c !== 'rgba(0, 0, 0, 0)';
        while (!solid(getComputedStyle(e).backgroundColor)) e = e.parentElement;
        return [ink, getComputedStyle(e).backgroundColor];
    })(document.getElementById('NAME'))"""
    ink, back = page.evaluate(code.replace("NAME", name))
    light, dark = sorted((luminance(ink), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    values = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@needs_browser
def test_every_control_has_a_name_that_is_read_aloud(show: Callable[..., Page]) -> None:
    page = show(questions(4))
    page.evaluate("document.querySelector('details').open = true")
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    kinds = {"button", "image", "textbox", "progressbar"}
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if node.get("role", {}).get("value") in kinds and not node.get("ignored")
    ]
    assert len([kind for kind, _ in controls if kind == "button"]) >= 11
    assert [kind for kind, name in controls if not name] == []


@needs_browser
def test_undo_takes_back_one_answer_after_the_other(show: Callable[..., Page]) -> None:
    page = show(questions(8))
    for key in ("y", "n", "b", "y"):  # the second answer is changed
        page.key(key)
    assert given(page) == {0: "yes", 1: "yes"}
    page.key("Backspace")
    assert given(page) == {0: "yes", 1: "no"}
    assert page.text("where").startswith("Pixel 2 of 8")
    page.click("#undo")
    page.key("Backspace")
    page.key("Backspace")
    assert given(page) == {}
    assert page.evaluate("document.getElementById('undo').disabled")


@needs_browser
def test_going_back_and_forward_and_to_the_first_unanswered(show: Callable[..., Page]) -> None:
    page = show(questions(8))
    for key in ("y", "f", "n", "f", "f"):  # the second pixel is left out
        page.key(key)
    assert page.text("where").startswith("Pixel 6 of 8")
    assert page.text("state").startswith("1 of 8 answered, 0 wrong"), "a gap ends what counts"
    page.key("j")
    assert page.text("where").startswith("Pixel 2 of 8")
    page.key("u")
    assert page.text("state").startswith("3 of 8 answered, 2 wrong (1 cannot tell)")
    assert page.text("where").startswith("Pixel 4 of 8"), "the next without an answer"
    page.key("b")
    pressed = "document.getElementById('no').getAttribute('aria-pressed')"
    assert page.evaluate(pressed) == "true", "an answer given before is shown"


@needs_browser
def test_a_pixel_drawn_twice_is_asked_once(show: Callable[..., Page]) -> None:
    asked = questions(6)
    asked[3] = asked[0]._replace(number=3)
    page = show(asked)
    assert page.text("where").startswith("Pixel 1 of 5, drawn 2 times")
    for key in "nyy":
        page.key(key)
    assert given(page) == {0: "no", 1: "yes", 2: "yes", 3: "no"}
    assert page.text("state") == "4 of 6 answered, 2 wrong."


# How many more


@needs_browser
def test_how_many_answers_are_needed_before_at_and_after_a_look(show: Callable[..., Page]) -> None:
    page = show(questions(8), allowed=only_at(8, {2: 0, 4: 1, 8: 2}))

    def says(words: str) -> None:
        assert page.text("state").partition(". ")[2] == words

    says("At least 2 more answers are needed, if all are right.")
    page.key("y")
    says("At least 1 more answer is needed, if all are right.")
    page.key("n")  # the first look does not certify
    says("At least 2 more answers are needed, if all are right.")
    page.key("y")
    page.key("n")  # nor does the second
    says("At least 4 more answers are needed, if all are right.")
    page.key("u")
    says("The bound cannot be certified any more with this plan.")
    page.key("Backspace")
    page.key("Backspace")
    ready = "document.getElementById('save').classList.contains('ready')"
    assert not page.evaluate(ready)
    page.key("y")
    says("Certified with 4 answers: you may stop.")
    assert page.evaluate(ready)
    for key in "nnnn":
        page.key(key)
    says("Certified with 4 answers: you may stop.")
    for _ in range(5):
        page.key("Backspace")
    for key in "nnyyy":
        page.key(key)
    says("The planned answers are all given, and the bound is not certified.")


@needs_browser
def test_without_a_rule_for_looks_only_the_count_is_shown(show: Callable[..., Page]) -> None:
    page = show(questions(2))
    page.key("n")
    assert page.text("state") == "1 of 2 answered, 1 wrong."
    page.key("y")
    assert page.text("state") == "2 of 2 answered, 1 wrong. The planned answers are all given."


# Keeping and saving


@needs_browser
def test_answers_survive_closing_the_browser(tmp_path: Path) -> None:
    page = write(tmp_path / "audit.html", questions(8))
    other = write(tmp_path / "other.html", questions(8), plan="another plan")
    with Browser(tmp_path / "profile") as started:
        tab = started.open(page)
        for key in "yn":
            tab.key(key)
        tab.evaluate("document.querySelector('details').open = true")
        tab.click("#who")
        tab.type("Anna")
    with Browser(tmp_path / "profile") as started:
        tab = started.open(page)
        assert given(tab) == {0: "yes", 1: "no"}
        assert tab.evaluate("given().who") == "Anna"
        assert tab.text("where").startswith("Pixel 3 of 8"), "it goes on where one stopped"
        assert given(started.open(other)) == {}, "answers belong to a plan"


@needs_browser
def test_the_same_page_in_two_tabs_has_the_same_answers(
    browser: Browser, show: Callable[..., Page], tmp_path: Path
) -> None:
    first = show(questions(8))
    second = browser.open(tmp_path / "audit.html")
    first.key("n")
    wait_until(second, "answers[0] === 'no'")
    second.key("f")
    second.key("y")
    wait_until(first, "answers[1] === 'yes'")
    assert given(first) == given(second) == {0: "no", 1: "yes"}
    second.close()


@needs_browser
def test_where_the_browser_keeps_nothing_the_page_says_so_and_goes_on(
    browser: Browser, show: Callable[..., Page], tmp_path: Path
) -> None:
    page = show(questions(8))
    refuse = "Storage.prototype.setItem = () => { throw new DOMException('no') }"
    page.call("Page.addScriptToEvaluateOnNewDocument", source=refuse)
    page.go(tmp_path / "audit.html")
    page.key("y")
    assert page.text("warning").startswith("This browser keeps no answers for this page: save")
    assert not page.evaluate("document.getElementById('warning').hidden")
    assert given(page) == {0: "yes"}


@needs_browser
def test_the_saved_file_holds_the_answers_and_loads_again(
    browser: Browser, show: Callable[..., Page], tmp_path: Path
) -> None:
    asked = questions(8)
    asked[3] = asked[0]._replace(number=3)
    page = show(asked)
    for key in "ynu":
        page.key(key)
    page.evaluate("document.querySelector('details').open = true")
    page.click("#who")
    page.type("Antó")
    page.key("n")  # a letter of the name is no answer
    browser.downloads_to(tmp_path)
    page.click("#save")
    while browser.wait_for("Browser.downloadProgress")["state"] != "completed":
        pass
    saved = tmp_path / "answers-Antón.json"
    assert json.loads(saved.read_text("utf-8"))["who"] == "Antón"
    answers = read_answers(saved, str(tmp_path), asked)
    assert answers.answer == given(page) == {0: "yes", 1: "no", 2: "unsure", 3: "yes"}

    page.evaluate("document.activeElement.blur()")
    for key in ("j", "Backspace", "Backspace", "Backspace", "n"):
        page.key(key)
    assert given(page) == {0: "no", 3: "no"}
    page.choose_file("#load", saved)
    wait_until(page, "!document.getElementById('warning').hidden")
    assert given(page) == answers.answer
    said = "Loaded 3 new answers from answers-Antón.json; 1 took the place of another answer."
    assert page.text("warning") == said
    page.key("Backspace")
    assert given(page) == {0: "no", 3: "no"}, "loading can be taken back"


@needs_browser
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"plan": "x", "answers": []}', "they are for another plan"),
        ('{"plan": PLAN, "answers": [{"number": 0, "image": "z"}]}', "a pixel is not in this plan"),
        ('{"plan": PLAN, "answers": [{"num', "it is no file of answers, or a damaged one"),
        ('{"plan": PLAN, "answers": 5}', "it is no file of answers, or a damaged one"),
    ],
)
def test_a_file_that_does_not_belong_is_not_loaded(
    show: Callable[..., Page], tmp_path: Path, content: str, reason: str
) -> None:
    page = show(questions(4))
    wrong = tmp_path / "w.json"
    wrong.write_text(content.replace("PLAN", json.dumps(str(tmp_path))))
    page.choose_file("#load", wrong)
    wait_until(page, "!document.getElementById('warning').hidden")
    assert page.text("warning") == f"Nothing was loaded from w.json: {reason}."
    assert given(page) == {}


def wait_until(page: Page, condition: str) -> None:
    code = f"new Promise(done => {{ const t = setInterval(() => {{ if ({condition}) "
    page.evaluate(code + "{ clearInterval(t); done() } }, 10) })")


# What is seen


@needs_browser
def test_the_pixel_itself_is_seen_in_the_middle_of_its_frame(
    show: Callable[..., Page], tmp_path: Path
) -> None:
    page = show(questions(2))
    for zoom in range(3):
        page.evaluate("new Promise(done => setTimeout(done, 200))")
        page.screenshot(tmp_path / "shot.png")
        shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
        box = page.evaluate(
            "(r => [r.x, r.y, r.width, r.height])"
            "(document.querySelector('#close svg').getBoundingClientRect())"
        )
        x, y = round(box[0] + box[2] / 2), round(box[1] + box[3] / 2)
        red, green, blue = shot[y, x]
        assert red > 150, zoom
        assert max(green, blue) < 90, zoom
        beside = shot[y, x + (30, 50, 70)[zoom]]  # beyond the frame, on the cross hair or not
        assert np.ptp(beside) < 60, zoom
        page.key("+")


@needs_browser
def test_the_outline_goes_along_the_edges_of_the_region_and_can_be_hidden(
    show: Callable[..., Page],
) -> None:
    page = show(questions(2))
    path = "document.querySelector('#close .outline').getAttribute('d')"
    assert page.text("class") == "<b>car</b>"
    assert page.evaluate(path) == "M10 20h15M10 30h15M10 20v10M25 20v10"
    whole = "document.querySelector('#over .outline').getAttribute('d')"
    assert page.evaluate(whole) == page.evaluate(path), "a small image is one cell a pixel"
    page.key("o")
    assert page.evaluate(path) == ""
    page.click("#outline")
    assert page.evaluate(path) != ""


@needs_browser
def test_far_out_the_whole_image_surrounds_the_close_up(show: Callable[..., Page]) -> None:
    size = (600, 1000)
    mask = np.zeros(size, np.uint8)
    mask[250:400, 300:800] = 1
    page = show(
        [Question(0, "a.png", 300, 500, 1)],
        image=lambda name: Image.new("RGB", size[::-1]),
        mask=lambda name: mask,
    )
    path = "document.querySelector('#close .outline').getAttribute('d')"
    assert page.evaluate(path) == "M400 250h201M400 400h201", "no border of its own at its sides"
    for _ in range(5):
        page.key("-")
    assert re.fullmatch(r"close-up, \d+ × 641 pixels", page.text("width"))
    corners = [float(x) for x in re.findall(r"[\d.]+", page.evaluate(path))]
    assert min(corners[0::3]) == pytest.approx(300, abs=4)
    boxes = page.evaluate(
        "[...document.querySelectorAll('#close image')].map(e => "
        "['x', 'y', 'width', 'height'].map(name => Number(e.getAttribute(name))))"
    )
    assert boxes == [[0, 0, 1000, 600], [400, 200, 201, 201]]
    assert page.evaluate("document.getElementById('out').disabled")
    page.click("#in")
    assert re.fullmatch(r"close-up, \d+ × 321 pixels", page.text("width"))


@needs_browser
def test_nothing_is_fetched_and_nothing_fails(browser: Browser, show: Callable[..., Page]) -> None:
    page = show(questions(4), class_names=["</script><script>alert(1)</script>"] * 3)
    for key in "yynn":
        page.key(key)
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
    kinds = {event.get("method") for event in browser.events}
    assert not kinds & {"Runtime.exceptionThrown", "Page.javascriptDialogOpening"}
    assert page.text("class") == "</script><script>alert(1)</script>"


@needs_browser
def test_400_pixels_of_large_images_are_answered_without_stalling(
    browser: Browser, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    image = coarse.resize((4000, 3000), Image.Resampling.BICUBIC)
    mask = (np.indices((3000, 4000)).sum(0) // 500 % 3).astype(np.uint8)
    places = np.stack([rng.integers(0, 3000, 400), rng.integers(0, 4000, 400)], 1).tolist()
    asked = [
        Question(n, f"{n % 5}.jpg", row, column, int(mask[row, column]))
        for n, (row, column) in enumerate(places)
    ]
    opened = []

    def open_image(name: str) -> Image.Image:
        opened.append(name)
        return image.copy()

    page = tmp_path / "large.html"
    write(page, asked, image=open_image, mask=lambda name: mask, allowed=only_at(400, {400: 12}))
    assert sorted(opened) == [f"{n}.jpg" for n in range(5)]
    text = page.read_text("utf-8")
    assert max(map(len, text.splitlines())) < 200_000, "no large picture"
    assert len(text) < 40e6

    tab = browser.open(page)
    decoded = "[...document.querySelectorAll('image')].map(e => e.href.baseVal.length)"
    assert max(tab.evaluate(decoded)) < 200_000
    begun = time.monotonic()
    for _ in range(400):
        tab.key("y")
    spent = time.monotonic() - begun
    assert tab.text("state").startswith("400 of 400 answered, 0 wrong. Certified with 400")
    print(f"{1000 * spent / 400:.1f} ms an answer, with the time of the protocol")


# What is written


def test_the_text_is_escaped_and_there_is_no_address_in_it(tmp_path: Path) -> None:
    text = write(tmp_path / "audit.html", questions(4)).read_text("utf-8")
    assert text.count("Audit of &lt;out&gt;") == 2
    assert "5 % &amp; no more" in text
    assert "@" not in re.sub(r"@media[^{]*|<script.*?</script>", "", text, flags=re.DOTALL)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}


def test_questions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    page = tmp_path / "audit.html"
    asked = questions(4)
    where = "write_audit_page"
    with raises(ValueError, where, "numbered 0, 1, 2 in order, got numbers \\[1, 2, 3\\]"):
        write(page, asked[1:])
    with raises(ValueError, where, "expected questions, got none"):
        write(page, [])
    with raises(ValueError, where, "expected 5 entries in allowed, got 4"):
        write(page, asked, allowed=[-1] * 4)
    with raises(ValueError, "a.png", r"expected a mask \[60, 90\] like the image, got \[90, 60\]"):
        write(page, asked, mask=lambda name: mask_of(name).T)
    with raises(ValueError, "a.png", "expected label 2 at row 22 column 12, got label 0"):
        write(page, asked, mask=lambda name: mask_of(name) * 0)
    with raises(ValueError, "a.png", "label 2 at row 99 column 12, got a mask"):
        write(page, [asked[0]._replace(row=99)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F", "I"])
def test_images_of_every_kind_are_shown(tmp_path: Path, mode: str) -> None:
    values = np.where(np.indices(SIZE)[1] < 45, 0, 255).astype(np.uint8)
    made = Image.fromarray(values)
    if mode == "I;16":
        made = Image.fromarray(values.astype(np.uint16) * 257)
    elif mode in ("F", "I"):
        made = Image.fromarray(values.astype({"F": np.float32, "I": np.int32}[mode]) * 30)
    else:
        made = made.convert(mode)
    assert made.mode == mode
    question = questions(1)[0]
    write(tmp_path / "audit.html", [question], image=lambda name: made)
    picture = np.asarray(Image.open(io.BytesIO(picture_of(question, made, mask_of("")))))
    half = CLOSE_UP // 2 * 6
    assert picture[half + 48, half - 48].max() < 20  # left of the pixel, off the cross hair
    assert picture[half + 48, half + 6 * 36].min() > 235


def test_a_picture_for_label_studio_shows_the_pixel_in_the_middle_of_its_square() -> None:
    red, corner = questions(2)
    for question, colour in ((red, (255, 0, 0)), (corner, (255, 255, 255))):
        picture = Image.open(io.BytesIO(picture_of(question, image_of(""), mask_of(""))))
        scale = picture.height // CLOSE_UP
        start = CLOSE_UP // 2 * scale
        shown = np.asarray(picture)[start + 1 : start + scale - 1, start + 1 : start + scale - 1]
        assert np.abs(shown.astype(int) - colour).max() < 60, "the pixel is not hidden"
    beyond = np.asarray(picture)[-20, picture.height - 20]  # the corner of the image is long past
    assert np.abs(beyond.astype(int) - 200).max() < 8


def test_pictures_are_made_once_for_each_pixel_and_images_opened_once() -> None:
    asked = questions(6)
    asked[3] = asked[0]._replace(number=3)
    opened = []

    def open_image(name: str) -> Image.Image:
        opened.append(name)
        return image_of(name)

    shown = []

    def progress(items: Iterable[Pair], count: int, title: str) -> Iterable[Pair]:
        shown.append((count, title))
        return items

    made = audit_pictures(asked, open_image, mask_of, progress=progress)
    assert shown == [(2, "images")]
    assert sorted(made) == [0, 1, 2, 4, 5]
    assert sorted(opened) == ["a.png", "b.png"]
    assert made[0] == picture_of(asked[0], image_of(""), mask_of(""))
