"""``doctor``: what is set up in a pipeline, whether gradients pass through it rightly, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from ..accelerators import seeded
from ..ambient import full_precision
from ..carried import Carrier
from ..errors import BackdriftError, InputError, UnsupportedError
from .checkup import front
from .checkup.arguments import accepted
from .checkup.calls import compiled_rows, wrong_layers
from .checkup.gradient import Subject, difference_rows, finite_row, plain_rows, pull
from .checkup.needs import planned_rows, small_rows
from .checkup.networks import network_rows
from .checkup.plainly import hushed, quiet
from .checkup.rows import Checkup, Row
from .checkup.setup import setup_rows
from .checkup.small import find_small_call
from .checkup.verdicts import split_refusal
from .differentiable import DifferentiableRun
from .refusals import plain_class
from .shadow import Train, networks, trained_parameters

__all__ = ["Checkup", "Row", "doctor"]


def doctor(
    pipe: Any,
    *,
    train: Train = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    directions: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **call: Any,
) -> Checkup:
    """Examine a pipeline as it is set up now, and measure its gradients on a small call.

    First everything is named that is known to stand in the way of gradients, and what becomes of it: all that
    :func:`~backdrift.differentiable` would refuse, not only the first. If nothing is refused, a call of two steps at
    the smallest size that the pipeline takes is differentiated: beside plain autograd through the undecorated call
    (the same bits where that is promised), and beside finite differences along random directions, by the noise, by
    the prompt embeddings and by the weights that ``train`` names. Last, what one call and a whole run need.

    Nothing of the pipeline is changed, nothing is downloaded, and random numbers outside go on as they were. What
    cannot be run is said in a row. It takes some fifty times as long as a small call.

    Args:
        pipe: any diffusers pipeline that is loaded.
        train: which weights get gradients, as in :func:`~backdrift.differentiable`.
        height, width: of the small call in pixels; by default the smallest that work.
        num_inference_steps: of the small call; by default 2, or 4 if 2 do not run.
        directions: along how many random directions finite differences are taken, each; at least 1. 0 leaves them out.
        seed: of everything random.
        progress: called with a few words before each part.
        call: more arguments of the pipeline's call (``prompt_embeds=``, ``image=`` …).

    Returns:
        The rows: ``print()`` shows a table; ``.ok``, ``.refused``, ``.failed``; ``.to_dict()`` for a file.

    Raises:
        InputError: an argument that the pipeline does not take, or a number out of range.

    Example:
        >>> checkup = bd.doctor(pipe)
        >>> print(checkup)
        >>> checkup["by the noise"].figures["relative error"]
    """
    if directions < 0:
        raise InputError(f"directions={directions} must be at least 0")
    if num_inference_steps is not None and num_inference_steps < 1:
        raise InputError(f"num_inference_steps={num_inference_steps} must be at least 1")
    tell = progress or (lambda words: None)
    rows = _Rows()
    parts = networks(pipe).values() if hasattr(pipe, "__dict__") else ()
    carried = Carrier([layer for network in parts for layer in network.modules()]).now()
    with seeded(seed), hushed(), nullcontext() if carried is None else carried.restored():
        _look(pipe, train, rows, tell)
        if not rows.refused:
            options = (height, width, num_inference_steps)
            _measure(pipe, train, options, directions, seed, call, rows, tell)
    return Checkup(plain_class(type(pipe)).__name__, tuple(rows.rows))


class _Rows:
    """Rows as they are found; what goes wrong in finding them is a row as well."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @property
    def refused(self) -> bool:
        return any(row.status == "refused" for row in self.rows)

    def add(self, topic: str, title: str, make: Callable[[], Iterator[Row] | Row]) -> None:
        """Add what ``make`` returns; if it raises, that it could not be looked at."""
        try:
            made = make()
            for row in [made] if isinstance(made, Row) else made:
                self.rows.append(row)
        except torch.cuda.OutOfMemoryError:
            self.rows.append(
                Row("skipped", topic, title, "out of memory", "smaller height= and width=, or a larger card")
            )
        except Exception as problem:  # the doctor tells, it does not crash
            line = (str(problem).strip().splitlines() or [""])[0]
            self.rows.append(Row("skipped", topic, title, f"{type(problem).__name__}: {line}"))


def _look(pipe: Any, train: Train, rows: _Rows, tell: Callable[[str], None]) -> None:
    """What can be said without running anything."""
    tell("looking at the pipeline")
    rows.add("pipeline", "pipeline", lambda: front.class_row(pipe))
    rows.add("pipeline", "versions", front.versions_row)
    if rows.refused and not hasattr(pipe, "components"):
        return
    rows.add("pipeline", "schedulers", lambda: front.scheduler_rows(pipe))
    if not rows.refused:
        rows.add("pipeline", "noise", lambda: front.noise_row(pipe))
        rows.add("pipeline", "embeddings", lambda: front.embeddings_row(pipe))
    rows.add("pipeline", "weights", lambda: front.weights_row(pipe, train))
    rows.add("networks", "networks", lambda: network_rows(pipe))
    rows.add("set-up", "set-up", lambda: setup_rows(pipe))
    if not rows.refused:
        try:
            DifferentiableRun(pipe, train=train)
        except BackdriftError as error:  # by a check that has no row of its own
            rows.rows.append(Row("refused", "set-up", "differentiable", *split_refusal(str(error))))


def _measure(
    pipe: Any,
    train: Train,
    options: tuple[int | None, int | None, int | None],
    directions: int,
    seed: int,
    given: dict[str, Any],
    rows: _Rows,
    tell: Callable[[str], None],
) -> None:
    """A small call, its gradients, and what they cost."""
    unknown = set(given) - set(accepted(pipe))
    if unknown:
        raise InputError(f"{plain_class(type(pipe)).__name__} takes no argument {min(unknown)!r}")
    own = quiet(pipe)
    tell("looking for the smallest call")
    try:
        encoders = any(name.startswith("text_encoder") for name in trained_parameters(pipe, train))
        small = find_small_call(own, given, *options, seed, encode=not encoders)
    except UnsupportedError as problem:
        told = f"no small call runs, with no gradients asked for: {problem}"
        advice = "hand in what it needs: bd.doctor(pipe, image=…, height=…)"
        rows.rows.append(Row("skipped", "gradient", "small call", told, advice))
        return
    subject = Subject(own, small, train, seed)
    with full_precision():  # whose rounding finite differences can tell from an error
        _differentiate(subject, directions, rows, tell)


def _differentiate(subject: Subject, directions: int, rows: _Rows, tell: Callable[[str], None]) -> None:
    """The small call's gradients, beside plain autograd and finite differences, and what they cost."""
    tell(f"differentiating {subject.call.words}")
    try:
        ours, most = pull(subject, "min"), pull(subject, "max")
    except torch.cuda.OutOfMemoryError:
        rows.add("gradient", "small call", _raise(torch.cuda.OutOfMemoryError()))
        return
    except BackdriftError as error:  # refused for what is in the call
        rows.rows.append(Row("refused", "gradient", "small call", *split_refusal(str(error))))
        return
    except Exception as problem:
        line = (str(problem).strip().splitlines() or [""])[0]
        told = f"samples without gradients, but with them: {type(problem).__name__}: {line}"
        rows.rows.append(Row("failed", "gradient", "small call", told, "report this pipeline to backdrift"))
        return
    rows.add("gradient", "finite", lambda: finite_row(subject, ours))
    tell("comparing with plain autograd")
    rows.add("gradient", "beside plain autograd", lambda: plain_rows(subject, ours))
    rows.add("gradient", "compiled backward", lambda: compiled_rows(subject))
    if directions and rows.rows and not any(r.title == "finite" and r.status == "failed" for r in rows.rows):
        tell("comparing with finite differences")
        rows.add("gradient", "finite differences", lambda: difference_rows(subject, ours, directions))
        wrong = {r.title for r in rows.rows if r.title.startswith("by the ") and r.status == "failed"}
        if wrong:
            tell("looking for the layer that is wrong")
            rows.add("gradient", "where", lambda: _where(subject, wrong))
    tell("counting memory")
    rows.add("memory and time", "small call", lambda: small_rows(subject, ours, most))
    rows.add("memory and time", "at the model's own size", lambda: planned_rows(subject))


def _where(subject: Subject, wrong: set[str]) -> Row:
    found = wrong_layers(subject)
    if found:
        told = f"the backward pass is not that of the forward pass in {', '.join(found[:6])}"
        advice = (
            "torch.autograd.gradcheck on it; a custom autograd.Function or kernel there is the first suspect"
        )
        return Row("failed", "gradient", "where", told, advice)
    if wrong == {"by the weights"}:
        told = "by its inputs every network is right: it is in a layer whose weights are trained"
        return Row(
            "warning", "gradient", "where", told, "torch.autograd.gradcheck on the layers that train= names"
        )
    told = "every network by itself is right: it is in the pipeline's or the scheduler's code"
    advice = "look for .detach(), .data, rounding and in-place writes between the networks' calls"
    return Row("warning", "gradient", "where", told, advice)


def _raise(error: Exception) -> Callable[[], Row]:
    def make() -> Row:
        raise error

    return make
