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

_METHOD_NAMES = {"ltt": "Learn-then-Test", "crc": "conformal risk control"}


@dataclass(frozen=True, repr=False)
class Certificate:
    """What was proven, on how many images, and what was seen on them.

    The error of an image is the share of wrong labels among those kept (``"ltt"``), or the share
    of its pixels that carry a wrong label (``"crc"``); void pixels do not count.

    Attributes:
        method: ``"ltt"`` (Learn-then-Test) or ``"crc"`` (conformal risk control).
        pvalue: ``"betting"`` or ``"hoeffding-bentkus"``; None for ``"crc"``.
        max_error: the bound on the mean error of an image.
        delta: 1 - confidence; None for ``"crc"``, which bounds an expectation.
        certified: whether any rule (of any class) is certified; if not, nothing is kept.
        alpha: the level chosen; None per class, or where not certified.
        num_images: number of certification images, which are disjoint from the calibration images.
        mean_error: mean error of these images under the rule; None where not certified.
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

    @property
    def verdict(self) -> str:
        """``"certified at 5 %"``, or that it is not."""
        return f"{'' if self.certified else 'not '}certified at {_percent(self.max_error)}"

    def __repr__(self) -> str:
        parts = [
            self.verdict,
            self.method,
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
        sure = "" if self.delta is None else f" with {_percent(1 - self.delta)} confidence"
        if not self.certified:
            of_class = "" if self.classes is None else " for any class"
            text = f"{images}: an error of {_percent(self.max_error)} cannot be certified{of_class}"
            text += f"{sure} ({how}); "
            if self.needed_images is not None:
                return text + f"that needs at least {self.needed_images} images without any error"
            if self.lowest_error is None:
                return text + "no error could be on these images"
            lowest = _percent(self.lowest_error)
            return text + (
                f"the lowest error that these images would have certified is {lowest}, "
                "and a level chosen by looking at them needs new images"
            )
        limit = f"in at most {_percent(self.max_error)} of"
        if self.method == "ltt":
            text = f"the labels kept are wrong on average {limit} an image's kept pixels,{sure} "
            text += "over the draw of these images"
        else:
            text = f"a label is kept and wrong on average {limit} an image's pixels, "
            text += "over the draw of these images and a new one"
        if self.classes is not None:
            some = sum(bool(row["certified"]) for row in self.classes)
            together = " and all classes at once" * (self.method == "ltt")
            text = f"of each of {some} classes out of {len(self.classes)}{together}, {text}"
        seen = f"{_percent(self.mean_error)} wrong, {_percent(self.kept)} kept"
        level = "" if self.alpha is None else f", alpha {self.alpha:g}"
        return f"{images}: {text} ({how}); seen: {seen}{level}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, *, where: str = "certificate") -> Certificate:
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: a field is missing, unknown, or has an impossible value.
        """
        fix = "run cpseg certify anew"
        names = {field.name for field in fields(cls)}
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
        if value["certified"] and value["mean_error"] is None:
            raise ValueError(message(where, "the mean_error of a certified rule", "None", fix))
        classes = value["classes"]
        return cls(**{**value, "classes": None if classes is None else tuple(classes)})


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


_ROW: dict[str, Valid] = {
    "certified": truth,
    "alpha": or_none(rate),
    "mean_error": or_none(share),
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
}
