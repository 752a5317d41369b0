"""Rows on memory and time: of single calls, of whole runs as planned, and what the small runs took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor

from ...planning.choices import Choices
from ...planning.plan import make_plan, words
from ...planning.search import option
from ..load import noise as drawn_noise
from ..offloaded import execution_device
from ..rehearsal import rehearse
from .arguments import accepted
from .gradient import Pulled, Subject
from .rows import Row
from .small import SmallCall

TOPIC = "memory and time"
STEPS = 30


def small_rows(subject: Subject, ours: Pulled, plain: Pulled) -> Iterator[Row]:
    """What was held and how long it took at the small size."""
    least, most = ours.stats, plain.stats
    assert least is not None
    assert most is not None
    yield Row(
        "ok", TOPIC, "activations, small call",
        f'held at once under memory="min" {size(least.peak_bytes)}, under "max", plain autograd, '
        f"{size(most.peak_bytes)}",
        figures={"min": least.peak_bytes, "max": most.peak_bytes},
    )  # fmt: skip
    took = subject.call.watch.seconds
    told = [f"{name}{'' if m == 'forward' else '.' + m} {duration(min(s))}" for (name, m), s in took.items()]
    yield Row(
        "ok", TOPIC, "seconds, small call",
        f"one call each: {', '.join(told)}; {subject.call.words} with gradients {duration(least.seconds)} under "
        f'"min" ({least.calls_redone} network calls made again), {duration(most.seconds)} under "max"',
        figures={
            **{f"{name}.{m}": min(s) for (name, m), s in took.items()},
            "min": least.seconds,
            "max": most.seconds,
        },
    )  # fmt: skip


def planned_rows(subject: Subject) -> Iterator[Row]:
    """What the same job needs at the model's own size, counted on the meta device."""
    rehearsal, where, said = None, "", ""
    for kwargs, noise, way in _ways(subject.call, subject.pipe):
        try:
            rehearsal, where = rehearse(subject.pipe, (), kwargs, subject.train, noise=noise), way
            break
        except Exception as problem:  # a size, or a loop, that cannot be run on zeros
            said = (str(problem).strip().splitlines() or [""])[0]
    if rehearsal is None:
        yield Row("skipped", TOPIC, "at the model's own size", said, "bd.plan(pipe, height, width, steps, …)")
        return
    offloaded = execution_device(subject.pipe) is not None
    made = make_plan(rehearsal.job, None, offload=False, offloaded=offloaded)
    shape = tuple(rehearsal.pictures.shape[1:]) if rehearsal.pictures is not None else ()
    where += f", result {'x'.join(map(str, shape))}"
    for role, title in (("network", "one network call"), ("decoder", "one decode")):
        kinds = {kind.component: kind for kind in rehearsal.job.kinds(role)}  # type: ignore[arg-type]
        told: list[str] = []
        figures: dict[str, float] = {}
        for name, kind in kinds.items():
            profile = kind.profile()
            block = kind.profile("resnet")
            told.append(
                f"{name} saves {size(profile.saved)} for backward ({size(block.saved)} redone a block at a time), "
                f"peak {size(max(profile.forward, profile.backward))}"
            )
            figures |= {f"{name} saved": profile.saved, f"{name} saved, blocks": block.saved}
        if told:
            yield Row("ok", TOPIC, title, f"{'; '.join(told)} ({where})", figures=figures)
    most, least, smallest = made.plain.needs, option(rehearsal.job, Choices(keep=0)).needs, made.least
    ways = "; ".join(words(smallest.choices))
    yield Row(
        "ok", TOPIC, f"{STEPS} steps",
        f'everything on the device: memory="max" {size(most.peak)}, "min" {size(least.peak)}; the smallest budget that '
        f"works {size(smallest.needs.peak)}{f' ({ways})' if ways else ''}; weights alone {size(made.job.weights)}",
        f'bd.plan(pipe, …, memory="{_above(smallest.needs.peak)}") shows the ways in between',
        {"max": most.peak, "min": least.peak, "smallest": smallest.needs.peak, "weights": made.job.weights},
    )  # fmt: skip


def _ways(call: SmallCall, pipe: Any) -> Iterator[tuple[dict[str, Any], Tensor | None, str]]:
    """The call with its full number of steps at the pipeline's own size, and at the small one."""
    embeddings = {k: v.detach().requires_grad_() for k, v in call.embeddings.items()}
    noise = None if call.noise is None else call.noise.detach().requires_grad_()
    given = {**call.fixed, **embeddings, "num_inference_steps": STEPS}
    if call.size and not {"image", "control_image"} & set(call.fixed):
        own = {k: v for k, v in given.items() if k not in call.size}
        if "latents" in accepted(pipe):
            with suppress(Exception):  # latents that are not pictures: the loop draws its own
                start = drawn_noise(pipe, device="cpu").requires_grad_()
                own |= {"latents": start} if noise is None or start.dim() == noise.dim() else {}
        if embeddings or "latents" in own:
            yield own, None, "at the model's own size"
    if noise is not None and not call.drawn:
        given["latents"] = noise
    yield given, noise if call.drawn else None, f"{STEPS} steps at the size of the small call"


def size(nbytes: float) -> str:
    """A size to read."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{_three(nbytes / scale)} {unit}"
    return f"{nbytes:.0f} bytes"


def duration(seconds: float) -> str:
    """A time to read."""
    return f"{_three(seconds)} s" if seconds >= 1 else f"{_three(1000 * seconds)} ms"


def _three(number: float) -> str:
    """About three digits."""
    return f"{number:.0f}" if number >= 99.5 else f"{number:.1f}" if number >= 9.95 else f"{number:.2f}"


def _above(nbytes: int) -> str:
    """A round size that is no less."""
    unit, scale = ("GiB", 2**30) if nbytes >= 2**30 else ("MiB", 2**20)
    return f"{-(-nbytes * 11 // 10) // scale + 1}{unit}"
