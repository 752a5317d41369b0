"""Spec strings: ``name:argument``, your own ``file.py:function``, and weighted sums of them.

    spec   = term { "+" term }
    term   = [ "-" ] [ number "*" ] loss
    loss   = name [ ":" argument ] | path ".py:" function

Some arguments end in an option in parentheses: ``class:seven (logit)``. A ``+`` inside an argument must be quoted:
``clip:"one + one" + 0.1*brightness``.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from .base import FunctionLoss, Loss
from .registry import find
from .weighted import WeightedSum

_NUMBER = re.compile(r"\s*(-?)\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*)?\s*")
_FILE = re.compile(r"(.+\.py):([A-Za-z_]\w*)$")


def resolve(spec: str | Callable[..., Tensor] | Mapping[Any, float] | Sequence[tuple[float, Any]]) -> Loss:
    """The loss that ``spec`` means.

    Args:
        spec: A spec string such as ``"mse:target.png"``, ``"0.5*clip:a blue two + class:two"`` or
            ``"my_losses.py:sharpness"``; a :class:`Loss`; any callable ``f(images)`` or
            ``f(images, prompts)`` that returns one value per sample; a mapping from any of these to
            its weight in the sum; or a list of pairs ``(weight, any of these)``.

    Raises:
        InputError: When a name is unknown, an argument cannot be used, a file is missing or a weight is not a
            finite number.
    """
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, str):
        return _sum([_term(text) for text in _split(spec)])
    if isinstance(spec, Mapping):
        return _sum([(_weight(weight, part), resolve(part)) for part, weight in spec.items()])
    if isinstance(spec, Sequence):
        return _sum([_pair(entry) for entry in spec])
    return FunctionLoss(spec)


def _sum(terms: list[tuple[float, Loss]]) -> Loss:
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    return WeightedSum(terms)


def _pair(entry: Any) -> tuple[float, Loss]:
    if not isinstance(entry, list | tuple) or len(entry) != 2 or isinstance(entry[0], str):
        raise InputError(
            "A list of losses holds pairs (weight, loss), as in [(10, 'pickscore'), (0.5, 'aesthetic')]; got the "
            f"entry {entry!r}."
        )
    return _weight(*entry), resolve(entry[1])


def _weight(given: Any, part: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, Real) or not math.isfinite(given):
        raise InputError(f"The weight of the loss {part!r} must be a finite number, got {given!r}.")
    return float(given)


def _split(text: str) -> list[str]:
    """Cut at the pluses that are neither quoted nor part of a leading number such as ``1e+3*``."""
    parts, start, quote, position = [], 0, "", 0
    while position < len(text):
        if position == start and (number := _NUMBER.match(text, position)) and number.end() > position:
            position = number.end()
            continue
        letter = text[position]
        if quote:
            quote = "" if letter == quote else quote
        elif letter == '"':
            quote = letter
        elif letter == "+":
            parts.append(text[start:position])
            start = position + 1
        position += 1
    if quote:
        raise InputError(f"A quotation mark in the loss {text!r} is not closed.")
    return [*parts, text[start:]]


def _term(text: str) -> tuple[float, Loss]:
    number = _NUMBER.match(text)
    assert number is not None  # the pattern also matches the empty string
    weight = float(number[2] or 1) * (-1 if number[1] else 1)
    body = text[number.end() :].strip()
    if not body:
        raise InputError(f"An empty term in a loss: {text!r}. Write for instance 0.5*brightness + class:two.")
    if not math.isfinite(weight):
        raise InputError(f"The weight of the loss {text!r} is not finite.")
    if file := _FILE.match(_unquote(body)):
        return weight, from_file(Path(file[1]), file[2])
    name, _, argument = body.partition(":")
    if hint := _misplaced(name.strip()):
        raise InputError(f"The term {body!r} of the loss cannot be read. {hint}")
    loss = find(name.strip()).from_text(_unquote(argument.strip()))
    loss.spec = body
    return weight, loss


def _misplaced(name: str) -> str:
    """What to write instead where a weight or a sign is not where it belongs; "" where it is."""
    words = r"([a-z][\w-]*)"
    if found := re.match(rf"{words}\s*\*\s*(\S+)", name):
        return f"A weight stands before its loss: {found[2]}*{found[1]}."
    if found := re.match(rf"(-?[\d.]+)\s*{words}", name):
        return f"Between a weight and its loss stands a star: {found[1]}*{found[2]}."
    if found := re.match(rf"-\s*{words}", name):
        return f"A minus stands before the weight, as in -2*{found[1]}."
    if found := re.match(rf"{words}\s+-\s*(.+)", name):
        return f"Terms are added: {found[1]} + -{found[2]}."
    return ""


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text


def from_file(path: Path, function: str) -> Loss:
    """The loss ``function`` (a callable or a :class:`Loss`) of the Python file ``path``.

    Raises:
        InputError: When the file is missing, cannot be imported, or has nothing callable of that name.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"The loss file {str(path)!r} does not exist (seen from {Path.cwd()}).")
    module_spec = importlib.util.spec_from_file_location(f"backdrift_user_loss_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"The loss file {str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"The loss file {str(path)!r} fails on import: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise InputError(
            f"The loss file {str(path)!r} has no callable {function!r}; it has: {', '.join(names) or 'none'}."
        )
    if isinstance(found, type):
        found = found()
    loss = found if isinstance(found, Loss) else FunctionLoss(found)
    loss.spec = f"{path}:{function}"
    return loss
