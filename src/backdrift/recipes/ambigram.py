"""An ambigram: noise whose finished picture reads one digit upright and another upside-down.

No prompt asks for this; a loss on the *finished* picture does: the cross-entropy of a classifier for
``upright`` on the picture plus that for ``upside_down`` on the picture turned by 180 degrees, descended through the
whole sampling run. Beside it, as many network calls are spent on one-step guidance (:mod:`~.one_step`).

The loss sees each picture moved a little, at random, so that no single pixel decides. How the pictures read is
told by the loss's own classifier on fixed views (:mod:`~.reading`): that flatters both sides, since both were
made to please it. A judge of one's own is put to ``run.best.images`` and ``run.tensors("one_step_guidance")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..descent import Descent, Example, Noise, Options
from ..descent.randomness import seeded
from ..descent.subject import check_prompts, describe_pipeline, make_examples, picture_size, sampler_call
from ..errors import InputError
from ..losses import Ambigram
from ..progress import progress_bar
from ..run import Run
from .one_step import OneStep, calls_of, guide_one_step, safety_flags
from .reading import move, reads_both_ways

OURS, OTHER = "through the whole run", "one-step guidance"
CALLS = "network calls for each picture, forward and back"
BASELINE = OneStep(0.5, 0.0, 1.0)
"""The settings that ``python -m benchmarks.applications settings`` found best on seeds of their own."""


def ambigram(
    pipe: Any,
    upright: str = "four",
    upside_down: str = "seven",
    *,
    prompt: str | None = None,
    seeds: Sequence[int] = (0,),
    loss: Ambigram | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 31,
    guidance_scale: float = 2.0,
    steps: int = 50,
    lr: float = 0.05,
    noise_prior: float = 0.01,
    enough: float | None = 0.01,
    jitter: float = 2.0,
    baseline: OneStep | None = BASELINE,
    chunk: int | None = None,
    memory: str | int = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_every: int = 1,
    progress: bool = True,
    callback: Callable[[Run, dict[str, Any]], Any] | None = None,
) -> Run:
    """Optimise the noise until the picture reads ``upright``, and turned by 180 degrees ``upside_down``.

    Args:
        upright, upside_down: classes of the classifier.
        prompt: what the sampler is told; default ``"a red <upright> on white"``.
        seeds: one picture from the noise of each, optimised side by side and each by itself.
        loss: an :class:`~backdrift.losses.Ambigram`; default one on the built-in classifier.
        enough: a picture for which loss and prior together are this small is kept as it is then; when all are, stop
            (``None``: the lowest to the end, which pleases the classifier and looks worse).
        jitter: the loss sees the picture moved, turned and scaled at random by up to so many pixels (0: as it is).
        baseline: how one-step guidance is done, with as many network calls for each picture; ``None``: not at all.
        chunk: pictures per call of the pipeline; default all.
        Others: as in :func:`backdrift.optimize`.

    Returns:
        The run; its figures say how many pictures of either sort read both ways, and with how many network calls.

    Raises:
        InputError: a setting cannot be used.
    """
    if not seeds:
        raise InputError("There are no seeds; give at least one.")
    reader = loss if loss is not None else Ambigram(upright, upside_down)
    prompts = [prompt if prompt is not None else f"a red {upright} on white"] * len(seeds)
    height, width = picture_size(pipe, height, width)
    if not 0 <= jitter < min(height, width) // 4:
        raise InputError(f"jitter={jitter} must be between 0 and {min(height, width) // 4 - 1} pixels.")
    check_prompts(pipe, prompts[:1])
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, None)
    options = Options.among(locals() | {"seed": seeds[0]})
    variable = Noise()
    settings = options.settings(variable) | {
        "seeds": list(seeds),
        "upright": upright,
        "upside_down": upside_down,
        "loss": reader.spec,
        "jitter": jitter,
        "baseline": None if baseline is None else vars(baseline),
        "pipeline": describe_pipeline(pipe),
    }
    run = Run.open(
        "ambigram", settings, title=f"ambigram: {upright} upright, {upside_down} upside-down", prompt=prompts,
        seed=seeds[0], out=out, resume=resume, device=getattr(pipe, "_execution_device", None),
    )  # fmt: skip
    examples = [make_examples(pipe, prompts[:1], height, width, seed)[0] for seed in seeds]
    objective = Jittered(reader, jitter)
    Descent(
        pipe, variable, examples, objective, options, run, callback=callback, progress=progress,
        judge=lambda images: _verdict(OURS, images, reader),
    ).go()  # fmt: skip
    if CALLS not in run.record["figures"]:
        _turn(run)
    if baseline is not None and "one-step guidance" not in run.record["pictures"]:
        _baseline(run, pipe, examples, objective, baseline, call, progress)
    return run


class Jittered:
    """The reader's loss on the picture as it is and on three that are moved, turned and scaled at random.

    A point of the picture's rim moves by at most ``jitter`` pixels for each of the three. All pictures of an
    iteration are moved alike, so that one does not depend on its company.
    """

    def __init__(self, reader: Ambigram, jitter: float) -> None:
        self.reader, self.jitter = reader, jitter

    def __call__(self, images: Tensor, examples: Sequence[Example] = ()) -> Tensor:
        if not self.jitter:
            return self.reader(images)
        most = 2 * self.jitter / min(images.shape[-2:])  # half the picture's side is 1
        moved = [move(images, *(most * (2 * torch.rand(4) - 1)).tolist()) for _ in range(3)]
        return torch.stack([self.reader(each) for each in [images, *moved]]).mean(0)


def _turn(run: Run) -> None:
    """Show the pictures upside-down, and count the network calls that each of them took."""
    settings, iterations = run.record["settings"], run.record["iterations"]
    n, updates = len(settings["seeds"]), sum(entry["grad_norm"] is not None for entry in iterations)
    chunks = -(-n // (settings["chunk"] or n))
    # What the memory plan redid is left out: the baseline's share must not depend on the plan.
    each = run.record["stats"]["vjps"] // (updates * chunks) if updates else settings["num_inference_steps"]
    with run.writing():
        run.record["figures"][CALLS] = each * (len(iterations) + updates)
        run.save_picture(
            "upside down", run.best.images.flip((-2, -1)), "after, turned by 180 degrees",
            flagged="flagged" in run.record["pictures"]["after"],
        )  # fmt: skip
        run.finish(run.record["status"], run.record["message"])


def _baseline(
    run: Run, pipe: Any, examples: Sequence[Example], objective: Jittered, how: OneStep, call: dict[str, Any],
    progress: bool,
) -> None:  # fmt: skip
    """One-step guidance from noise after noise until the calls are spent; of each picture the best is kept."""
    seeds, figures = run.record["settings"]["seeds"], run.record["figures"]
    prompts = [example.prompt for example in examples]
    size = call["height"], call["width"]
    kwargs = {k: call[k] for k in ("num_inference_steps", "guidance_scale")}
    tries = -(-figures[CALLS] // calls_of(how, call["num_inference_steps"]))
    begin = int(figures.get("one-step guidance: tries", 0))
    best = run.tensors("one_step_guidance") if begin else None
    with run.writing(), progress_bar(tries, progress, OTHER) as show:
        for draw in range(begin, tries):
            noise = torch.cat(
                [make_examples(pipe, prompts[:1], *size, _draw(seed, draw))[0].noise for seed in seeds]
            )
            with seeded(seeds[0], "one-step guidance", draw):
                images = guide_one_step(pipe, prompts, noise, objective, how, seed=draw, **kwargs)
                with torch.no_grad():
                    losses = objective(images)
            if best is not None:
                better = losses < best["losses"].to(losses)
                images = torch.where(better.view(-1, 1, 1, 1), images, best["images"].to(images))
                losses = torch.where(better, losses, best["losses"].to(losses))
            best = {"images": images.detach(), "losses": losses}
            run.save_tensors("one_step_guidance", best)
            figures["one-step guidance: tries"] = draw + 1
            run.save_record()
            show(draw + 1, {"loss": losses.mean().item()})
        assert best is not None  # there is at least one try
        caption, flags = f"one-step guidance, the best of {tries} tries", safety_flags(pipe, best["images"])
        run.save_picture("one-step guidance", best["images"], caption, flagged=any(flags))
        figures["one-step guidance: best loss"] = best["losses"].mean().item()
        figures |= _verdict(OTHER, best["images"], objective.reader)
        run.finish(run.record["status"], run.record["message"])


def _draw(seed: int, draw: int) -> int:
    """The seed of a try's noise; the first try is made from the same noise as ours."""
    return seed if draw == 0 else 1_000_003 * draw + seed


def _verdict(who: str, images: Tensor, reader: Ambigram) -> dict[str, Any]:
    right = int(reads_both_ways(images, reader).sum())
    return {f"{who}: read both ways by the loss's classifier": f"{right} of {len(images)}"}
