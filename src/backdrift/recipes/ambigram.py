"""An ambigram: noise whose finished picture reads one digit upright and another upside-down.

No prompt asks for this; a loss on the *finished* picture does: the cross-entropy of a classifier for
``upright`` on the picture plus that for ``upside_down`` on the picture turned by 180 degrees, descended through the
whole sampling run. Beside it, the same seconds are spent on one-step guidance (:mod:`~.one_step`).

The loss sees each picture shifted a little, at random, so that no single pixel decides; success is judged on other
views (fixed shifts, a blur), each of which has to be read right in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..descent import Descent, Example, Noise, Options
from ..descent.subject import (
    check_prompts,
    describe_pipeline,
    make_examples,
    picture_size,
    sampler_call,
)
from ..errors import InputError
from ..losses import Ambigram
from ..run import Run
from .one_step import search

SHIFTS = tuple((dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2))
NEEDED = 0.8
"""The part of the judged views that must read right in both directions."""


def ambigram(
    pipe: Any,
    upright: str = "two",
    upside_down: str = "seven",
    *,
    prompt: str | None = None,
    loss: Ambigram | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 31,
    guidance_scale: float = 2.0,
    steps: int = 50,
    seed: int = 0,
    lr: float = 0.1,
    noise_prior: float = 0.01,
    enough: float | None = 0.05,
    jitter: int = 2,
    baseline: bool = True,
    memory: str | int = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    callback: Callable[[Run, dict[str, Any]], Any] | None = None,
) -> Run:
    """Optimise the noise until the picture reads ``upright``, and turned by 180 degrees ``upside_down``.

    Args:
        upright, upside_down: classes of the classifier.
        prompt: what the sampler is told; default ``"a red <upright> on white"``.
        loss: an :class:`~backdrift.losses.Ambigram`; default one on the built-in classifier.
        enough: stop when loss and prior together are this small (``None``: use all ``steps``).
        jitter: the loss sees the picture shifted at random by up to so many pixels (0: as it is).
        baseline: also spend the same seconds on one-step guidance.
        Others: as in :func:`backdrift.optimize`.

    Returns:
        The run; its figures say how both were read (``"ours reads"``, ``"one-step guidance reads"``).
    """
    reader = loss if loss is not None else Ambigram(upright, upside_down)
    prompt = prompt if prompt is not None else f"a red {upright} on white"
    height, width = picture_size(pipe, height, width)
    if not 0 <= jitter < min(height, width) // 4:
        raise InputError(f"jitter={jitter} must be between 0 and {min(height, width) // 4 - 1} pixels.")
    check_prompts(pipe, [prompt])
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, None)
    options = Options(
        steps=steps, seed=seed, lr=lr, noise_prior=noise_prior, enough=enough, memory=memory, call=call
    )  # fmt: skip
    variable = Noise()
    settings = options.settings(variable) | {
        "upright": upright,
        "upside_down": upside_down,
        "loss": reader.spec,
        "jitter": jitter,
        "pipeline": describe_pipeline(pipe),
    }
    run = Run.open(
        "ambigram", settings, title=f"ambigram: {upright} upright, {upside_down} upside-down", prompt=[prompt],
        seed=seed, out=out, resume=resume,
    )  # fmt: skip
    examples = make_examples(pipe, [prompt], height, width, seed)
    objective = _Shifted(reader, jitter)
    Descent(pipe, variable, examples, objective, options, run, callback=callback, progress=progress).go()
    if "ours reads" not in run.record["figures"]:
        _judge_ours(run, reader)
    if baseline and "one-step guidance reads" not in run.record["figures"]:
        _baseline(run, pipe, prompt, objective, reader, call, seed)
    return run


def successes(
    pipe: Any, upright: str = "two", upside_down: str = "seven", *, seeds: int | Sequence[int] = 20,
    out: str | Path = "runs/ambigrams", show: Callable[[str], Any] | None = print, **kwargs: Any,
) -> Run:  # fmt: skip
    """Make an ambigram from every seed, count how many are read as wanted, and print it line by line.

    Args:
        seeds: how many, or which.
        out: a folder; each seed has its own run in it, so that a killed count goes on where it was.
        show: what prints a line; ``None`` for silence.
        kwargs: further arguments of :func:`ambigram`.

    Returns:
        A run whose figures hold the two counts.
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen:
        raise InputError("There are no seeds; give a number of at least 1, or a list of them.")
    folder = Path(out)
    runs = []
    for seed in chosen:
        one = ambigram(pipe, upright, upside_down, seed=seed, out=folder / f"seed-{seed}", **kwargs)
        runs.append(one)
        if show is not None:
            figures = one.record["figures"]
            other = figures.get("one-step guidance reads", "not run")
            show(f"seed {seed}: through the whole run {figures['ours reads']}, one-step guidance {other}")
    settings = {k: v for k, v in runs[0].record["settings"].items() if k != "seed"} | {"seeds": chosen}
    summary = Run.open(
        "ambigrams", settings, title=f"{len(chosen)} ambigrams: {upright} / {upside_down}",
        prompt=runs[0].record["prompt"], seed=chosen[0], out=folder / "summary",
    )  # fmt: skip
    with summary.writing():
        _summarise(summary, runs)
    if show is not None:
        for name, value in summary.record["figures"].items():
            show(f"{name}: {value}")
    return summary


def views(images: Tensor) -> Tensor:
    """The views that are judged, (n, 10, 3, H, W): nine shifts by 0 or ±2 pixels, and a blur."""
    shifted = [_shift(images, dy, dx) for dy, dx in SHIFTS]
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.stack([*shifted, soft], 1)


@torch.no_grad()
def read(images: Tensor, reader: Ambigram) -> Tensor:
    """The part of the judged views of each picture that read right (upright, turned, both): (n, 3)."""
    seen = views(images.clamp(0, 1))
    right = reader.reads(seen.flatten(0, 1)).view(len(images), -1, 2).float()
    return torch.cat([right, right.prod(2, keepdim=True)], 2).mean(1)


class _Shifted:
    """The reader's loss on pictures that are shifted at random, afresh in every iteration."""

    def __init__(self, reader: Ambigram, jitter: int) -> None:
        self.reader, self.jitter = reader, jitter

    def __call__(self, images: Tensor, examples: Sequence[Example] = ()) -> Tensor:
        if not self.jitter:
            return self.reader(images)
        shifts = torch.randint(-self.jitter, self.jitter + 1, (2, 2)).tolist()
        moved = [_shift(images, dy, dx) for dy, dx in shifts]
        values = [self.reader(each) for each in [images, *moved]]
        return torch.stack(values).mean(0)


def _shift(images: Tensor, dy: int, dx: int) -> Tensor:
    """Pictures moved by whole pixels; what comes in is the border repeated."""
    n = max(abs(dy), abs(dx))
    if not n:
        return images
    wide = F.pad(images, (n, n, n, n), mode="replicate")
    h, w = images.shape[-2:]
    return wide[..., n - dy : n - dy + h, n - dx : n - dx + w]


def _judge_ours(run: Run, reader: Ambigram) -> None:
    image = run.best.images
    with run.writing():
        run.save_picture("upside down", image.flip((-2, -1)), "after, turned by 180 degrees")
        run.record["figures"] |= _verdict("ours", read(image, reader)[0])
        run.finish(run.record["status"], run.record["message"])


def _baseline(
    run: Run, pipe: Any, prompt: str, objective: _Shifted, reader: Ambigram, call: dict[str, Any], seed: int
) -> None:
    """The same seconds on one-step guidance, into the same record."""
    from ..descent.randomness import seeded

    def noises(draw: int) -> Tensor:
        first = seed if draw == 0 else 1_000_003 * draw + seed
        return make_examples(pipe, [prompt], call["height"], call["width"], first)[0].noise

    with run.writing():
        with seeded(seed, "one-step guidance"):
            image, found = search(
                pipe, prompt, noises, objective, run.record["stats"]["seconds"] or 0.0,
                num_inference_steps=call["num_inference_steps"], guidance_scale=call["guidance_scale"],
            )  # fmt: skip
        run.save_picture("one-step guidance", image, f"one-step guidance, the best of {found['tries']} tries")
        run.save_tensors("one_step_guidance", {"images": image})
        run.record["figures"] |= {f"one-step guidance: {k}": v for k, v in found.items()}
        run.record["figures"] |= _verdict("one-step guidance", read(image, reader)[0])
        run.finish(run.record["status"], run.record["message"])


def _verdict(who: str, part: Tensor) -> dict[str, Any]:
    up, turned, both = part.tolist()
    return {
        f"{who}: views right upright": up,
        f"{who}: views right upside-down": turned,
        f"{who}: views right both ways": both,
        f"{who} reads": "both ways" if both >= NEEDED else "not both ways",
    }


def _summarise(summary: Run, runs: Sequence[Run]) -> None:
    summary.clear()
    n = len(runs)
    figures: dict[str, Any] = {}
    for who, name in (
        ("ours", "through the whole run"),
        ("one-step guidance", "one-step guidance, same seconds"),
    ):
        verdicts = [
            r.record["figures"][f"{who} reads"] for r in runs if f"{who} reads" in r.record["figures"]
        ]
        if verdicts:
            figures[f"{name}: read both ways"] = f"{verdicts.count('both ways')} of {len(verdicts)}"
    figures["seconds per ambigram (mean)"] = sum(r.record["stats"]["seconds"] for r in runs) / n
    summary.record["figures"] = figures
    after = torch.cat([r.best.images for r in runs])
    summary.save_picture("upright", after, f"{n} seeds, upright")
    summary.save_picture("upside down", after.flip((-2, -1)), "the same, turned by 180 degrees")
    summary.finish()
