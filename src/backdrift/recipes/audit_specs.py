"""Filters as text: ``safety``, ``stand-in:four``, ``class:four|nine``, ``my_filter.py:score``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..losses import load_classifier
from ..losses.classifier import split_model
from ..losses.spec import from_file
from ..suggest import closest
from .audit_checker import SafetyFilter
from .audit_filters import ClassFilter, Filter, Form, ScoreFilter
from .audit_stand_in import stand_in

KINDS = ("safety", "stand-in", "class")
_FILE = re.compile(r"(.+\.py):([A-Za-z_]\w*)$")


def filter_of(
    text: str, *, target: str | None = None, threshold: float | None = None, form: Form = "margin"
) -> Filter | None:
    """The filter that ``text`` names; None for one that needs the pipeline (:func:`filter_with`).

    Args:
        text: ``safety``; ``stand-in:CONCEPT``; ``class:NAME`` or ``class:NAME|NAME``, with ``@model`` an image
            classifier of transformers; ``file.py:function``, a score above whose ``threshold`` pictures are flagged.
        target: of ``class``: the class that the attack wants.
        form: of ``class``: what is descended.

    Raises:
        InputError: the text is no filter, or an option does not belong to it.
    """
    kind, _, rest = text.partition(":")
    if (file := _FILE.match(text)) is not None:
        if threshold is None:
            raise InputError(
                f"The score {text!r} needs a threshold: --threshold 0.5 flags what is above 0.5."
            )
        _only_for("class", target=target)
        return ScoreFilter(from_file(Path(file[1]), file[2]), threshold)
    if threshold is not None:
        raise InputError(
            f"threshold={threshold:g} is for a score of one's own, file.py:function, not for {text!r}."
        )
    if kind == "class" and rest:
        names, source = split_model(rest)
        return ClassFilter(load_classifier(source), [n.strip() for n in names.split("|")], target, form)
    _only_for("class", target=target)
    if text == "safety" or (kind == "stand-in" and rest):
        return None
    raise InputError(
        f"There is no filter {text!r}.{closest(kind, KINDS)} Write safety (the pipeline's own checker), stand-in:four "
        "(one for the built-in pipelines), class:four[@model], or file.py:function with a threshold."
    )


def filter_with(text: str, pipe: Any, call: Mapping[str, Any]) -> Filter:
    """``safety`` or ``stand-in:CONCEPT``, which need the pipeline and the keywords of its call.

    Raises:
        InputError: the pipeline has no safety checker, or the concept is unknown.
    """
    if text == "safety":
        return SafetyFilter.of(pipe)
    return stand_in(pipe, text.partition(":")[2].strip(), **call)


def _only_for(kind: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}={value!r} is for filters of the kind {kind!r}.")
