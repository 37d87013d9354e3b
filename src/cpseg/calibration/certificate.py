"""``Certificate``: what was proven about the labels that a calibration keeps, in plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cpseg._internal import words
from cpseg._internal.checks import message
from cpseg._internal.fields import (
    Valid,
    among,
    count,
    list_of,
    or_none,
    rate,
    read_fields,
    share,
    table_of,
    truth,
    whole,
)

METHODS = words.CERTIFICATES
PVALUES = words.PVALUES
PER = words.CERTIFIED_PER
# What else a file may hold: conformal risk control, and older certificates, which counted an image
# that keeps nothing as one without an error.
_ALL_PER = (*PER, "pixels", "any image")

_METHOD_NAMES = {"ltt": "Learn-then-Test", "crc": "conformal risk control"}


@dataclass(frozen=True, repr=False)
class Certificate:
    """What was proven, on how many images, and what was seen on them.

    Void pixels do not count, and the labelled pixels of an image stand for all of them.

    Attributes:
        method: ``"ltt"`` (Learn-then-Test) or ``"crc"`` (conformal risk control).
        pvalue: ``"betting"`` or ``"hoeffding-bentkus"``; None for ``"crc"``.
        max_error: the bound on the error.
        delta: 1 - confidence; None for ``"crc"``, which bounds an expectation.
        certified: whether any rule (of any class) is certified; if not, nothing is kept.
        alpha: the level chosen; None per class, or where not certified.
        num_images: number of certification images, which are disjoint from the calibration images.
        mean_error: seen on these images under the rule: the mean over images that keep a label of
            the share that is wrong (``"crc"``: over all images, of the pixels with a wrong label);
            None where not certified.
        kept: mean share of an image's pixels that keep a label.
        p_value: that of the level chosen, or of the strictest where none is; None per class and
            for ``"crc"``.
        beside: what the other p-value gives, ``alpha`` and ``kept``; for information, since the
            better of two is not a certificate. None for ``"crc"``.
        classes: per class ``certified``, ``alpha``, ``mean_error``, ``kept``, ``p_value`` of its
            own level; None where one level holds for all.
        needed_images: the fewest images with which ``max_error`` could be certified, where these
            were too few.
        lowest_error: the lowest ``max_error`` that these images would have certified, where they
            did not certify the one asked for. To use it, certify it on new images.
        per: what is bounded: ``"labels"``, the share of wrong labels among all kept; ``"image"``,
            its mean over images that keep a label; ``"pixels"`` (``"crc"``), the mean share of an
            image's pixels; ``"any image"`` (older files), the mean over images where
            one that keeps nothing counts as one without an error: a weak statement.
        pooled_error: seen on these images: wrong labels among all kept; None where not certified
            and in older files.
        max_pixels: where images differ in size: ``per="labels"`` is about images of at most so many
            pixels.
        larger_images: how many certification images were larger and not counted.
    """

    method: str
    pvalue: str | None
    max_error: float
    delta: float | None
    certified: bool
    alpha: float | None
    num_images: int
    mean_error: float | None
    kept: float
    p_value: float | None = None
    beside: Mapping[str, Any] | None = None
    classes: tuple[Mapping[str, Any], ...] | None = None
    needed_images: int | None = None
    lowest_error: float | None = None
    per: str = "labels"
    pooled_error: float | None = None
    max_pixels: int | None = None
    larger_images: int = 0

    @property
    def verdict(self) -> str:
        """``"certified at 5 %"``, or that it is not."""
        return f"{'' if self.certified else 'not '}certified at {_percent(self.max_error)}"

    def __repr__(self) -> str:
        parts = [
            self.verdict,
            self.method if self.method == "crc" else f"{self.method} per {self.per}",
            self.pvalue,
            None if self.delta is None else f"{_percent(1 - self.delta)} confidence",
            f"{self.num_images} images",
            None if self.alpha is None else f"alpha {self.alpha:g}",
            None if self.classes is None else f"{len(self.classes)} classes",
            f"{_percent(self.kept)} kept",
        ]
        return f"Certificate({', '.join(filter(None, parts))})"

    def __str__(self) -> str:
        """One sentence."""
        images = f"{self.num_images} image{'s' * (self.num_images != 1)}"
        how = _METHOD_NAMES[self.method] + (f", {self.pvalue}" if self.pvalue else "")
        sure = "" if self.delta is None else f", with {_percent(1 - self.delta)} confidence"
        if not self.certified:
            return f"{images}: {self._why_not(sure, how)}"
        text = self._statement() + sure + " over the draw of these images"
        text += " and a new one" * (self.method == "crc")
        if self.classes is not None:
            some = sum(bool(row["certified"]) for row in self.classes)
            together = " and all classes at once" * (self.method == "ltt")
            text = f"of each of {some} classes out of {len(self.classes)}{together}, {text}"
        level = "" if self.alpha is None else f", alpha {self.alpha:g}"
        return f"{images}: {text} ({how}); seen: {self._seen()}{level}{self._sizes()}"

    def _statement(self) -> str:
        """What is bounded, and by how much."""
        limit = _percent(self.max_error)
        if self.per == "labels":
            return f"of all labels kept, at most {limit} are wrong"
        if self.per == "image":
            return (
                f"of the labels that an image keeps, at most {limit} are wrong on average over "
                "images that keep one, every such image weighing the same (of all labels it may "
                "be more)"
            )
        if self.per == "pixels":
            return (
                f"a label is kept and wrong on average in at most {limit} of an image's pixels "
                "(of the labels kept it may be more)"
            )
        return (
            f"the labels kept are wrong on average in at most {limit} of an image's kept pixels, "
            "where an image that keeps none counts as 0 % wrong: of all labels kept more may be "
            "wrong, so certify anew"
        )

    def _seen(self) -> str:
        """What was seen: both shares, whichever is bounded."""
        pooled, mean = _percent(self.pooled_error), _percent(self.mean_error)
        kept = f"{_percent(self.kept)} of the pixels kept"
        if self.per == "any image":
            return f"{mean} wrong, {_percent(self.kept)} kept"
        if self.per == "pixels":
            return f"{mean} of an image's pixels, {pooled} of all labels kept are wrong, {kept}"
        return f"{pooled} of all labels kept are wrong (mean over images {mean}), {kept}"

    def _sizes(self) -> str:
        if self.max_pixels is None:
            return ""
        text = f"; for images of at most {self.max_pixels} pixels"
        some = self.larger_images
        return text + (f", {some} larger one{'s' * (some != 1)} not counted" if some else "")

    def _why_not(self, sure: str, how: str) -> str:
        of_class = "" if self.classes is None else " for any class"
        text = f"an error of {_percent(self.max_error)} cannot be certified{of_class}{sure} ({how}"
        text += f", per {self.per}); " if self.method == "ltt" else "); "
        if self.needed_images is not None:
            text += f"that needs at least {self.needed_images} images without any error"
        elif self.lowest_error is None:
            text += "no error could be on these images"
        else:
            text += (
                f"the lowest error that these images would have certified is "
                f"{_percent(self.lowest_error)}, and a level chosen by looking at them needs new "
                "images"
            )
        return text + "; an audit of the labels (cpseg audit) needs no labelled images"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_json` reads them; an older certificate as it was read."""
        content = asdict(self)
        if _of_an_older_file(_older(content)) == content:
            return _older(content)
        return content

    @classmethod
    def from_json(cls, value: object, *, where: str = "certificate") -> Certificate:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: a field is missing, unknown, or has an impossible value.
        """
        fix = "run cpseg certify anew"
        names = {field.name for field in fields(cls)}
        if isinstance(value, dict) and set(value) == names - _NEW_FIELDS:
            value = _of_an_older_file(value)
        if not isinstance(value, dict) or set(value) != names:
            got = str(sorted(value)) if isinstance(value, dict) else repr(value)
            expected = "a certificate with its fields and no others"
            raise ValueError(message(where, expected, got[:80], fix))
        read_fields(where, value, _FIELDS, fix=fix)
        # Only what belongs together makes a sentence.
        tests = value["method"] == "ltt"
        if (value["pvalue"] is None, value["delta"] is None) != (not tests, not tests):
            got = f"{value['pvalue']!r} and {value['delta']!r} with {value['method']!r}"
            raise ValueError(message(where, "pvalue and delta that fit the method", got, fix))
        if tests == (value["per"] == "pixels"):
            got = f"{value['per']!r} with {value['method']!r}"
            raise ValueError(message(where, "per that fits the method", got, fix))
        if value["certified"] and value["mean_error"] is None:
            raise ValueError(message(where, "the mean_error of a certified rule", "None", fix))
        classes = value["classes"]
        return cls(**{**value, "classes": None if classes is None else tuple(classes)})


def _older(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that older files have."""
    kept = {name: field for name, field in value.items() if name not in _NEW_FIELDS}
    if kept["classes"] is not None:
        rows = [{n: v for n, v in row.items() if n != "pooled_error"} for row in kept["classes"]]
        kept["classes"] = tuple(rows)
    return kept


def _of_an_older_file(value: dict[str, Any]) -> dict[str, Any]:
    """A certificate of cpseg before 0.6 with the fields of today: it says what it had proven."""
    per = "pixels" if value["method"] == "crc" else "any image"
    classes = value["classes"]
    if isinstance(classes, (list, tuple)):
        classes = tuple(
            {**row, "pooled_error": None} if isinstance(row, dict) else row for row in classes
        )
    new = {"per": per, "pooled_error": None, "max_pixels": None, "larger_images": 0}
    return {**value, **new, "classes": classes}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


_ROW: dict[str, Valid] = {
    "certified": truth,
    "alpha": or_none(rate),
    "mean_error": or_none(share),
    "pooled_error": or_none(share),
    "kept": share,
    "p_value": or_none(share),
}
_FIELDS: dict[str, Valid] = {
    **_ROW,
    "method": among(METHODS),
    "pvalue": or_none(among(PVALUES)),
    "max_error": rate,
    "delta": or_none(rate),
    "num_images": whole,
    "beside": or_none(table_of({"pvalue": among(PVALUES), "alpha": or_none(rate), "kept": share})),
    "classes": or_none(list_of(table_of(_ROW))),
    "needed_images": or_none(whole),
    "lowest_error": or_none(rate),
    "per": among(_ALL_PER),
    "max_pixels": or_none(whole),
    "larger_images": count,
}
_NEW_FIELDS = {"per", "pooled_error", "max_pixels", "larger_images"}
