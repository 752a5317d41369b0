"""Security auditing (AdjointDPM, Pan et al. 2024, section 4.1.2 and appendix C): how easily is a filter evaded?

A pipeline's pictures pass a moderation filter f. Near a noise x_T whose picture f flags, is there another one whose
picture passes and still shows the concept? The search is

    max over delta of L(f(Phi(x_T + delta, c)), y)   with |delta| <= tau in every coordinate

with the exact gradient through the whole run Phi. It tells the owner of a filter how far to trust it; beside the
search stand random changes of the same size and one single step by the gradient, which a filter should withstand, and
small changes of the found pictures (JPEG, blur), under which most evasions should not survive.

What counts is decided on finished pictures only: the found noise is given to the pipeline's own call, alone; the
filter itself decides on the 8-bit picture; and a judge that is in no loss says whether the concept is still there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..descent import Options
from ..descent.code import describe_function
from ..descent.subject import (
    Example,
    check_prompts,
    describe_pipeline,
    describe_tensors,
    make_examples,
    picture_size,
    sampler_call,
)
from ..errors import InputError, MissingGradientError
from ..run import Run
from ..suggest import closest
from ..through import Through
from .audit_checker import SafetyFilter, quiet
from .audit_filters import ClassFilter, Filter, ScoreFilter
from .audit_judges import Judge, as_judge
from .audit_noise import UPDATES
from .audit_page import conclude
from .audit_pictures import CHANGES, Change, Rendering
from .audit_search import Search
from .audit_stand_in import stand_in

__all__ = ["ClassFilter", "Filter", "SafetyFilter", "ScoreFilter", "audit", "stand_in"]

TAUS = (0.1, 0.8, 0.9)
"""The paper's, for ImageNet (0.1 in the published code, 0.8 in the text) and for Stable Diffusion's filter (0.9)."""


def audit(
    pipe: Any,
    prompts: str | Sequence[str],
    filter: Filter | str,
    *,
    judge: Judge | str,
    tau: float | Sequence[float] = TAUS,
    seeds: Sequence[int] = (0,),
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 31,
    guidance_scale: float | None = None,
    steps: int = 30,
    update: str = "normalized",
    lr: float | None = None,
    random_tries: int | None = None,
    one_step: bool = True,
    changes: Mapping[str, Change] = CHANGES,
    chunk: int | None = None,
    memory: str | int = "auto",
    clamp: bool = False,
    through: Through | str = "all",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_every: int = 1,
    callback: Callable[[Run, dict[str, Any]], Any] | None = None,
    progress: bool = True,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> Run:
    """Search, near noises whose pictures a filter flags, for noises whose pictures pass and still show the concept.

    Args:
        pipe: any diffusers text-to-image pipeline that takes ``latents=``. It comes back as it was.
        prompts: what asks for the concept; a picture is made for each prompt and each of ``seeds``.
        filter: what is audited: ``"safety"``, the pipeline's own safety checker; a :class:`ClassFilter` (any classifier
            with flagged classes, with or without a target), a :class:`ScoreFilter` (any score with a threshold), a
            :class:`SafetyFilter`, what :func:`stand_in` makes, or a :class:`Filter` of one's own.
        judge: is the concept shown? A callable of pictures (n, 3, H, W) in [0, 1] that returns (n,) booleans, or text:
            ``"class:four"``, ``"clip:a four/a nine"``, either with ``@model``. It decides nothing in the search; what
            passes and does not show the concept is no evasion.
        tau: how far each coordinate of the noise may move, in standard deviations of the noise; several begin anew.
        seeds: of the noises.
        steps: updates of the noise, at most; a sample that has got past the filter is kept as it is.
        update: ``"normalized"`` (each sample's gradient divided by its root mean square), ``"adamw"``, or ``"sign"``;
            the noise is projected into the box after each.
        lr: learning rate, in the noise's units; default ``0.15 tau``.
        random_tries: random corners of the box for each sample, as a control; default as many as ``steps``.
        one_step: also one step of size tau by the signs of the same exact gradient.
        changes: small changes of finished pictures, ``{name: PIL picture -> PIL picture}``; default JPEG, blur, resize.
        chunk: pictures per call of the pipeline and per search; default all. A search ends when its pictures pass.
        clamp: whether the search sees pictures clamped to [0, 1]; what is decided on always is.
        seed: of the sampler's own noise and of the random control.
        Others: as in :func:`backdrift.optimize`.

    Returns:
        The run. ``run.record["audit"]`` holds every sample: its seed, the filter's margin before and after, iteration,
        network calls, distances, what the judge says. ``run.tensors("tau-0.8")`` holds ``samples`` (their indices),
        ``noise`` (what to give as ``latents=``) and ``delta``; the descents themselves are runs in ``descents/``.
        Rates are over the samples that were flagged at the start.

    Raises:
        InputError: a setting cannot be used, the pipeline has no safety checker, or the filter has no gradient.
        MissingGradientError: ``through`` cuts the noise off.
    """
    every = [prompts] if isinstance(prompts, str) else list(prompts)
    taus = [float(tau)] if isinstance(tau, int | float) else [float(t) for t in tau]
    tries = steps if random_tries is None else random_tries
    _check(every, seeds, taus, steps, tries, update)
    Options(chunk=chunk)
    what, witness = as_filter(filter, pipe), as_judge(judge)
    height, width = picture_size(pipe, height, width)
    check_prompts(pipe, every)
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, pipeline_kwargs)
    options = Options.among(locals() | {"optimizer": UPDATES[update], "enough": 0.0, "chunk": None})
    if cut := options.choice.choose(num_inference_steps).cut:
        raise MissingGradientError(
            f"through={options.choice.spec!r} cuts the state where step {cut} of {num_inference_steps} begins, so no "
            "gradient would reach the noise; use 'all'."
        )
    examples = [
        replace(make_examples(pipe, [prompt], height, width, s)[0], draw=i)
        for i, (prompt, s) in enumerate((p, s) for p in every for s in seeds)
    ]
    settings = {
        "filter": what.describe(),
        "judge": _described(witness),
        "prompts": every,
        "seeds": list(seeds),
        "tau": taus,
        "update": update,
        "steps": steps,
        "lr": lr,
        "random_tries": tries,
        "one_step": one_step,
        "changes": {name: describe_function(change) for name, change in changes.items()},
        "chunk": chunk,
        "memory": memory,
        "clamp": clamp,
        "through": options.choice.spec,
        "checkpoint_every": checkpoint_every,
        **call,
        "pipeline": describe_pipeline(pipe),
    }
    run = Run.open(
        "audit", settings, title=f"audit of {what.spec}", prompt=[e.prompt for e in examples], seed=seed, out=out,
        resume=resume, device=getattr(pipe, "_execution_device", None),
    )  # fmt: skip
    if run.finished:
        return run
    search = Search(
        run, what, witness, _seeded(examples, seeds), Rendering(pipe, call, seed=seed, chunk=chunk), options,
        tries=tries, one_step=one_step, callback=callback, progress=progress,
    )  # fmt: skip
    with run.writing(), quiet():
        search.begin()
        for each in taus:
            search.go(each)
        conclude(run, search, changes)
    return run


def as_filter(given: Filter | str | Any, pipe: Any) -> Filter:
    """A :class:`Filter` from what a user names.

    Raises:
        InputError: it is none.
    """
    if isinstance(given, Filter):
        return given
    if given == "safety":
        return SafetyFilter.of(pipe)
    if isinstance(given, str):
        raise InputError(
            f"There is no filter {given!r}.{closest(given, ['safety'])} 'safety' is the pipeline's own checker; for "
            "others give a ClassFilter, a ScoreFilter or a stand_in (backdrift.recipes)."
        )
    if hasattr(given, "concept_embeds"):
        return SafetyFilter(given, getattr(pipe, "feature_extractor", None))
    raise InputError(
        f"filter= is a {type(given).__name__}: wrap a classifier as ClassFilter(classifier, flagged) and a score as "
        "ScoreFilter(score, threshold), both in backdrift.recipes."
    )


def _check(
    prompts: Sequence[str], seeds: Sequence[int], taus: Sequence[float], steps: int, tries: int, update: str
) -> None:
    if not prompts or not seeds:
        raise InputError("There are no prompts or no seeds; give at least one of each.")
    if len(set(seeds)) < len(seeds) or len(set(prompts)) < len(prompts):
        raise InputError("A prompt or a seed stands twice: the same picture would be counted twice.")
    if (
        not taus
        or len({f"{t:g}" for t in taus}) < len(taus)
        or not all(math.isfinite(t) and t > 0 for t in taus)
    ):
        raise InputError(f"tau={list(taus)} must be positive numbers, no two alike, in units of the noise.")
    if steps < 1 or tries < 0:
        raise InputError(f"steps={steps} must be at least 1 and random_tries={tries} at least 0.")
    if update not in UPDATES:
        raise InputError(
            f"There is no update {update!r}.{closest(update, UPDATES)} Names: {', '.join(UPDATES)}."
        )


def _seeded(examples: Sequence[Example], seeds: Sequence[int]) -> list[tuple[Example, int]]:
    return [(example, seeds[i % len(seeds)]) for i, example in enumerate(examples)]


def _described(judge: Judge) -> dict[str, Any]:
    network = getattr(judge, "classifier", None) or getattr(judge, "clip", None)
    return {
        "spec": getattr(judge, "spec", getattr(judge, "__qualname__", type(judge).__qualname__)),
        "code": describe_function(judge),
        "weights": None if network is None else describe_tensors(network),
    }
