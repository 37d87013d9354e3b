"""Argument checks: the only place that writes the standard messages.

Every message is one line, ``function: expected <what>, got <what>; <fix>``. Shapes and dtypes are
free to look at and always checked; values cost a pass over the data (and, on an accelerator, a
synchronisation) and are checked where data enters: ``Calibrator.update``, the file readers, the
command.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if hasattr(torch.compiler, "is_compiling"):
    is_compiling = torch.compiler.is_compiling
else:  # torch 2.1 and 2.2
    is_compiling = torch._utils.is_compiling

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = sys.float_info.max
MOST_CLASSES = 2**15  # where memory grows with the square of the classes or with bins of each


def message(where: str, expected: str, got: str, fix: str) -> str:
    """The standard error line."""
    got = " ".join(got.split()) if "\n" in got else got
    return f"{where}: expected {expected}, got {got}; {fix}"


def shape(tensor: Tensor) -> str:
    """``[2, 21, 64, 64]``, for messages."""
    return str(list(tensor.shape))


def check_choice(
    where: str, value: object, choices: Collection[str], *, name: str, fix: str = "choose one"
) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        expected = f"{name} among {', '.join(map(repr, choices))}"
        raise ValueError(message(where, expected, short(value), fix))


def is_whole(value: object, least: int = 1) -> bool:
    """An int that is no bool, ``least`` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_count(
    where: str, value: object, *, name: str, fix: str, least: int = 1, most: int | None = None
) -> None:
    """A whole number of things."""
    if not is_whole(value, least):
        raise ValueError(message(where, f"{name} as a whole number >= {least}", short(value), fix))
    if most is not None and value > most:  # type: ignore[operator]
        raise ValueError(message(where, f"{name} of at most {most}", short(value), fix))


def is_number(value: object, least: float = -_LARGEST, most: float = _LARGEST) -> bool:
    """A real number in [``least``, ``most``] that a float holds; NaN and bools are none.

    Infinity is one only where a limit is infinite.
    """
    if not isinstance(value, (int, float, Real)) or isinstance(value, bool):
        return False
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        return False
    return least <= value <= most  # type: ignore[operator]


def is_share(value: object, most: float = 1) -> bool:
    """A number in [0, ``most``]; NaN and bools are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= most  # type: ignore[operator]


def check_flag(where: str, value: object, *, name: str) -> None:
    """True or False; a tensor would have to be read."""
    if not isinstance(value, (bool, int, np.bool_)):
        raise TypeError(message(where, f"{name} as bool", short(value), "pass True or False"))


def check_share(where: str, value: object, *, name: str, fix: str) -> None:
    """A number in [0, 1]."""
    if not is_share(value):
        raise ValueError(message(where, f"{name} in [0, 1]", short(value), fix))


def check_float(
    where: str, tensor: object, *, name: str, fix: str = "convert it to float32"
) -> None:
    """A floating-point tensor of 16 bits or more."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(message(where, f"floating-point {name}", kind_of(tensor), fix))
    _check_wide(where, tensor, name=name)
    _check_strided(where, tensor, name=name)


def _check_wide(where: str, tensor: Tensor, *, name: str) -> None:
    """No float8: PyTorch has hardly a function for it."""
    if tensor.dtype not in _FLOATS:
        expected, fix = f"floating-point {name} of 16 bits or more", "convert it to float32"
        raise TypeError(message(where, expected, str(tensor.dtype), fix))


def _check_strided(where: str, tensor: Tensor, *, name: str) -> None:
    """No sparse tensor."""
    if tensor.layout != torch.strided:
        fix = "convert it with to_dense"
        raise ValueError(message(where, f"dense {name}", str(tensor.layout), fix))


def check_has_values(where: str, tensor: Tensor, *, name: str) -> None:
    """Not on the device meta, whose tensors have a shape alone. Looks at no value."""
    if tensor.device.type == "meta":
        fix = "make it on a device such as cpu"
        raise ValueError(message(where, f"{name} with values", "a tensor on device meta", fix))


def check_bool(where: str, tensor: object, *, name: str, fix: str) -> None:
    """A bool tensor."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        raise TypeError(message(where, f"bool {name}", kind_of(tensor), fix))
    _check_strided(where, tensor, name=name)


def check_classes(
    where: str, num_classes: int, known: int | None, *, fix: str = "use the scores of one model"
) -> None:
    """As many classes as before; ``known`` is None before the first."""
    if known not in (None, num_classes):
        raise ValueError(message(where, f"{known} classes as before", str(num_classes), fix))


def kind_of(value: object) -> str:
    """The dtype of a tensor or the type of anything else, for messages."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def short(value: object) -> str:
    """The value in at most 80 characters of one line, for messages."""
    if isinstance(value, Tensor):  # not every tensor has values to write
        return f"a tensor {value.dtype} {shape(value)}"
    try:
        return " ".join(repr(value).split())[:80]
    except ValueError:  # an int of more digits than Python writes
        return f"a huge {type(value).__name__}"


def check_probs(where: str, probs: Tensor, *, name: str = "probs") -> None:
    """Class scores: floating point, ``[B, K, H, W]`` or ``[K, H, W]``, nothing empty."""
    if not isinstance(probs, Tensor):
        got, fix = type(probs).__name__, "convert it with torch.as_tensor"
        raise TypeError(message(where, f"{name} as a tensor", got, fix))
    if not probs.is_floating_point():
        fix = "divide uint8 maps by 255 and convert the rest to float32"
        raise TypeError(message(where, f"floating-point {name}", str(probs.dtype), fix))
    _check_wide(where, probs, name=name)
    _check_strided(where, probs, name=name)
    if probs.ndim not in (3, 4):
        fix = "pass class scores with a class axis"
        raise ValueError(message(where, f"{name} [B, K, H, W] or [K, H, W]", shape(probs), fix))
    check_not_empty(where, probs, name=name)


def check_not_empty(where: str, tensor: Tensor, *, name: str) -> None:
    """No axis of length 0, and values."""
    check_has_values(where, tensor, name=name)
    if 0 in tensor.shape:
        fix = "skip empty batches"
        raise ValueError(message(where, f"at least one element in {name}", shape(tensor), fix))


def check_integer(where: str, labels: Tensor, *, name: str = "labels") -> None:
    """An integer tensor, of any width."""
    if not isinstance(labels, Tensor):
        got, fix = type(labels).__name__, "convert them with torch.as_tensor"
        raise TypeError(message(where, f"{name} as a tensor", got, fix))
    if labels.dtype not in _INTEGERS:
        fix = "convert them to an integer dtype"
        raise TypeError(message(where, f"integer {name}", str(labels.dtype), fix))
    _check_strided(where, labels, name=name)


def check_labels(where: str, labels: Tensor, probs: Tensor, *, name: str = "labels") -> None:
    """Integer labels of the size and on the device of ``probs``."""
    check_integer(where, labels, name=name)
    expected = (*probs.shape[:-3], *probs.shape[-2:])
    if labels.shape != expected:
        raise ValueError(
            message(
                where,
                f"{name} {list(expected)} for probs {shape(probs)}",
                shape(labels),
                "resize the labels (nearest) or pass scores at the labels' size",
            )
        )
    check_same_device(where, labels, probs, name=name, reference="probs")


def check_same_device(
    where: str, tensor: Tensor, other: Tensor, *, name: str, reference: str
) -> None:
    """Two tensors that meet lie on one device."""
    if tensor.device != other.device:
        expected = f"{name} on the device of {reference} ({other.device})"
        raise ValueError(message(where, expected, str(tensor.device), "move one with .to(device)"))


def check_same_shape(where: str, tensor: Tensor, other: Tensor, *, name: str, ref: str) -> None:
    """Two tensors of the same shape, without broadcasting."""
    if tensor.shape != other.shape:
        expected = f"{name} of the shape of {ref} {shape(other)}"
        raise ValueError(message(where, expected, shape(tensor), "resize one of them (nearest)"))


_MOST_DECIMALS = 300  # about those of the smallest float


def check_alpha(where: str, alpha: object, *, name: str = "alpha") -> Fraction:
    """A rate strictly between 0 and 1, as the exact decimal that the caller wrote."""
    fix = "pass a rate such as 0.05"
    try:
        text = str(alpha)
        exponent = text.lower().partition("e")[2]
        small = bool(exponent) and int(exponent) < -_MOST_DECIMALS
        large = bool(exponent) and int(exponent) > _MOST_DECIMALS
        # Fraction writes 10 to that power out, which takes minutes where it has millions of digits.
        exact = None if small or large else Fraction(text)
    except (ValueError, ZeroDivisionError):
        exact, small = None, False
    if small:
        expected = f"{name} of at most {_MOST_DECIMALS} decimals"
        raise ValueError(message(where, expected, short(alpha), fix))
    if exact is None or not 0 < exact < 1:
        raise ValueError(message(where, f"{name} in (0, 1)", short(alpha), fix))
    return exact


def check_background(where: str, background: int | None, num_classes: int) -> None:
    """``None`` or a class index that leaves at least one other class."""
    if background is None:
        return
    if isinstance(background, bool) or not isinstance(background, int):
        fix = "pass the index of the dominant class, or None where every class counts"
        raise TypeError(message(where, "background as int or None", short(background), fix))
    if not 0 <= background < num_classes:
        expected = f"background in 0..{num_classes - 1} or None"
        fix = "pass the index of the dominant class, or None where every class counts"
        raise ValueError(message(where, expected, short(background), fix))
    if num_classes == 1:
        fix = "pass background=None, or the scores of the other classes too"
        raise ValueError(message(where, "a class besides the background", "1 class", fix))


def check_ignore_index(where: str, ignore_index: object, num_classes: int = 0) -> None:
    """The void value: an int of 64 bits that is no class; without classes, any such int."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        fix = "pass the label of void pixels, such as 255"
        raise TypeError(message(where, "ignore_index as int", short(ignore_index), fix))
    if not -(2**63) <= ignore_index < 2**63:
        expected = "an ignore_index of 64 bits"
        raise ValueError(message(where, expected, short(ignore_index), "pass ignore_index=-1"))
    if 0 <= ignore_index < num_classes:
        expected = f"an ignore_index outside the classes 0..{num_classes - 1}"
        raise ValueError(message(where, expected, str(ignore_index), "pass ignore_index=-1"))


def check_threshold(where: str, threshold: Tensor | float, probs: Tensor) -> Tensor:
    """A number or tensor ``[]``, ``[H, W]`` or ``[K, H, W]`` that belongs to ``probs``."""
    if isinstance(threshold, (int, float)) and not isinstance(threshold, bool):
        if isinstance(threshold, int) and not -_LARGEST <= threshold <= _LARGEST:
            expected, fix = "a threshold that a float holds", "pass math.inf for every class"
            raise ValueError(message(where, expected, short(threshold), fix))
        return torch.tensor(threshold, dtype=torch.float32, device=probs.device)
    if not isinstance(threshold, Tensor):
        fix = "pass the threshold of a Calibration or a number"
        got = short(threshold) if isinstance(threshold, bool) else type(threshold).__name__
        raise TypeError(message(where, "a threshold as a tensor or a number", got, fix))
    if not threshold.is_floating_point():
        fix = "pass the threshold of a Calibration or a number"
        raise TypeError(message(where, "a float32 threshold", str(threshold.dtype), fix))
    _check_wide(where, threshold, name="threshold")
    _check_strided(where, threshold, name="threshold")
    allowed = (torch.Size(()), probs.shape[-2:], probs.shape[-3:])
    if threshold.shape not in allowed:
        expected = f"threshold [], {list(allowed[1])} or {list(allowed[2])}"
        fix = "bring it to the image's size with Calibration.resize"
        raise ValueError(
            message(where, f"{expected} for probs {shape(probs)}", shape(threshold), fix)
        )
    check_same_device(where, threshold, probs, name="threshold", reference="probs")
    return threshold.to(torch.float32)


_ONE_AS_BITS = {
    torch.float16: (torch.int16, 0x3C00),
    torch.bfloat16: (torch.int16, 0x3F80),
    torch.float32: (torch.int32, 0x3F800000),
    torch.float64: (torch.int64, 0x3FF0000000000000),
}


def in_unit_interval(values: Tensor) -> Tensor:
    """Bool ``[]``: every value lies in [0, 1]; NaN does not. No synchronisation."""
    return (values.amin() >= 0) & (values.amax() <= 1)


def surely_in_unit_interval(values: Tensor) -> bool:
    """Whether every value lies in [0, 1], in a faster way that is not sure of -0.0. Synchronises.

    Non-negative floats sort like their bits, and NaN lies above 1: integers need no care for NaN.
    """
    integers, one = _ONE_AS_BITS[values.dtype]
    least, most = values.view(integers).aminmax()
    return int(least) >= 0 and int(most) <= one


def check_unit_interval(
    where: str, values: Tensor, *, name: str, fix: str, interval: str = "[0, 1]"
) -> None:
    """Raise where a value is NaN or lies outside [0, 1]. Synchronises on an accelerator.

    ``interval`` names the original range of values that were scaled to [0, 1].
    """
    if surely_in_unit_interval(values):
        return
    if not bool(in_unit_interval(values)):
        low, high = float(values.amin()), float(values.amax())
        got = f"values from {low:.4g} to {high:.4g}"
        if low != low:
            got = "NaN"
        if low != low and SCORES_FIX in fix:  # no matter of logits
            fix = "find what made it, such as half precision or a division by zero"
        elif low >= 0 and SCORES_FIX in fix:
            fix = f"{fix}; divide percentages by 100"
        if interval != "[0, 1]":
            got = "values outside"
        raise ValueError(message(where, f"{name} in {interval}", got, fix))


def check_label_values(
    where: str, labels: Tensor, num_classes: int, ignore_index: int, *, name: str = "labels"
) -> None:
    """Raise where a label is neither a class nor void. Synchronises on an accelerator."""
    stray = labels_outside(labels, num_classes, ignore_index)
    if bool(stray.any()):
        expected = f"{name} in 0..{num_classes - 1} or {ignore_index} (ignore_index)"
        got = str(int(labels[stray][0]))
        raise ValueError(message(where, expected, got, "map other values to ignore_index"))


def labels_outside(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Bool, where a label is neither a class nor void."""
    index = labels.to(torch.int64)
    return ((index < 0) | (index >= num_classes)) & (index != ignore_index)


def check_generator(where: str, generator: object, device: torch.device) -> None:
    """None, or a generator on the device where it draws."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        expected, fix = "generator as torch.Generator or None", "pass torch.Generator()"
        raise TypeError(message(where, expected, short(generator), fix))
    if generator.device.type != device.type:
        expected, got = f"a generator on {device.type}", f"one on {generator.device.type}"
        fix = f"make it with torch.Generator('{device.type}')"
        raise ValueError(message(where, expected, got, fix))


SCORES_FIX = "apply softmax or sigmoid to logits, and bound a head that sums over queries"


def check_image_ids(
    where: str, ids: str | Sequence[str] | None, count: int, seen: Collection[str]
) -> list[str] | None:
    """A name for every image of a batch, none of them twice or seen before."""
    if ids is None:
        return None
    names = [ids] if isinstance(ids, str) else list(ids) if isinstance(ids, Iterable) else []
    if len(names) != count or not all(isinstance(name, str) for name in names):
        expected = f"ids as {count} strings, one per image"
        raise ValueError(message(where, expected, short(ids), "name every image of the batch"))
    twice = [name for name, number in Counter(names).items() if number > 1 or name in seen]
    if twice:
        raise ValueError(message(where, "every image once", f"'{twice[0]}' twice", "remove one"))
    return names


def check_other(where: str, own: object, other: object) -> None:
    """What ``merge`` may take: another object of the same kind."""
    kind = type(own).__name__
    if not isinstance(other, type(own)):
        fix = f"merge {kind.lower()}s"
        raise TypeError(message(where, f"a {kind}", type(other).__name__, fix))
    if other is own:
        expected = f"another {kind.lower()}"
        raise ValueError(message(where, expected, "itself", "merge each one once"))


def check_alike(where: str, own: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The settings of two objects that are merged."""
    for name, value in own.items():
        if theirs[name] != value:
            expected, got = f"the same {name} ({value})", str(theirs[name])
            raise ValueError(message(where, expected, got, "build both alike"))


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
