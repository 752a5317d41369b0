"""Guided applications: one prompt and one noise, sampled three ways, on one page.

*Unguided* is the pipeline's own sampler. *One-step* pulls every guided step by the loss on the one-step estimate of
the finished picture (FreeDoM, Yu et al. 2023), *n-step* by the loss on the estimate in n steps (Symplectic Adjoint
Guidance, Pan et al. 2023, "SAG" below). One-step guidance takes each guided step as often as it can for the seconds
that n-step guidance spends, or for its network calls: its tries are cheaper, so it has more of them.

Every picture is scored by the loss that it was guided with, and by judges that guided nothing (:mod:`~.judges`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..budget import MemoryPlan
from ..descent.code import code_settings
from ..descent.subject import (
    check_prompts,
    describe_pipeline,
    describe_tensors,
    picture_size,
    sampler_call,
)
from ..errors import InputError
from ..guidance.when import When
from ..losses import Loss
from ..run import Run
from .guided_page import conclude
from .guided_variants import (
    N_STEP,
    ONE_STEP,
    UNGUIDED,
    Sampler,
    Variant,
    keep,
    with_scheduler,
)
from .judges import Judge

#: From which part of the run on a step is taken how often: ((0.3, 1), (0.4, 2)) is once from 0.3 on, twice from 0.4 on.
Repeats = int | tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Guiding:
    """How a picture is guided; the defaults are those of the published code for styles (SAG, section 4.1 and B.1).

    Attributes:
        num_inference_steps: steps of the sampler (T = 100).
        guidance_scale: classifier-free guidance (7.5).
        n: steps of the estimate, or ``"adaptive"`` (4; sections 4.1 to 4.3 and 4.5 use 4 or 5).
        start, stop: step i of N is guided where ``start <= i / N < stop`` (their t = 70 to 31 of 100).
        strength: w of ``eta = w s RMS(eps_c - eps_0) / RMS(dL/dx)``, s the guidance scale (0.2).
        repeats: how often a guided step is taken (once for t = 70 to 61, then twice).
        subgrid: where the steps of the estimate lie.
        one_step: how many tries one-step guidance has for each of n-step guidance's: ``"seconds"``, as many as take the
            same time, measured on a run with one try of each step (the record's ``one_step`` says the number, which
            given here makes the same pictures anywhere); ``"calls"``, as many as make the same network calls and
            vector–Jacobian products; or a number > 0.
        scheduler: a diffusers scheduler's class or short name (:data:`~.guided_variants.SCHEDULERS`); None for the
            pipeline's own. The published one is ``"dpm"``.

    Raises:
        InputError: a value cannot be used.
    """

    num_inference_steps: int = 100
    guidance_scale: float = 7.5
    n: int | Literal["adaptive"] = 4
    start: float = 0.3
    stop: float = 0.7
    strength: float = 0.2
    repeats: Repeats = ((0.3, 1), (0.4, 2))
    subgrid: Literal["paper", "uniform", "logsnr"] = "paper"
    one_step: Literal["seconds", "calls"] | float = "seconds"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        steps, n = self.num_inference_steps, self.n
        if not _whole(steps):
            raise InputError(f"num_inference_steps={steps!r} must be a whole number, at least 1.")
        if n != "adaptive" and not _whole(n):
            raise InputError(f"n={n!r} must be a whole number, at least 1, or 'adaptive'.")
        if not (self.strength > 0 and self.strength < float("inf")):
            raise InputError(f"strength={self.strength!r} must be positive and finite.")
        if self.one_step not in ("seconds", "calls") and not (
            isinstance(self.one_step, int | float) and 0 < self.one_step < float("inf")
        ):
            raise InputError(f"one_step={self.one_step!r} must be 'seconds', 'calls' or a positive number.")
        guided = When(self.start, self.stop).guided(steps)
        if isinstance(n, int) and n > steps - guided[-1]:
            raise InputError(
                f"n={n} is more than the {steps - guided[-1]} step(s) left at the last guided step, "
                f"{guided[-1] + 1} of {steps}; use a smaller n, more steps, an earlier stop, or n='adaptive'."
            )
        if isinstance(self.repeats, int):
            if not _whole(self.repeats):
                raise InputError(f"repeats={self.repeats!r} must be at least 1.")
        else:
            object.__setattr__(self, "repeats", tuple((float(at), count) for at, count in self.repeats))
            places = [at for at, _ in self.repeats]
            if not places or places != sorted(set(places)) or not all(_whole(k) for _, k in self.repeats):
                raise InputError(
                    f"repeats={self.repeats!r} must be whole numbers >= 1 from rising parts of the run on, such as "
                    "((0.3, 1), (0.4, 2)), or one number."
                )

    def built_in(self, strength: float, /, **given: Any) -> Guiding:
        """The same for a built-in pipeline, with the guidance scale it was measured with.

        Every try pulls equally far, however many steps there are, so with fewer steps each pulls more.

        Args:
            strength: in as many steps as these settings have.
            given: settings in the place of these.
        """
        share = self.num_inference_steps / max(1, given.get("num_inference_steps", self.num_inference_steps))
        return replace(self, **{"guidance_scale": 3.0, "strength": strength * share, **given})

    @property
    def guided(self) -> list[int]:
        """The guided steps, from 0."""
        return When(self.start, self.stop).guided(self.num_inference_steps)

    def attempts(self, repeats: Repeats | None = None) -> list[int]:
        """How often each step of the run is taken, by ``repeats`` or these."""
        counts = self.repeats if repeats is None else repeats
        return When.of(self.start, self.stop, None, counts).attempts(self.num_inference_steps)


@dataclass(frozen=True)
class Task:
    """What pictures are guided to.

    Attributes:
        kind: ``"style"``, ``"aesthetic"``, ``"object"`` or ``"class"``.
        title: one line for people.
        loss: minimised.
        judges: further scores, not guided with.
        settings: JSON values that the result depends on, beside those of :class:`Guiding`.
        reference: a picture (3, H, W) in [0, 1] to show, and its caption.
    """

    kind: str
    title: str
    loss: Loss
    judges: tuple[Judge, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: tuple[Tensor, str] | None = None


@dataclass(frozen=True)
class Sampling:
    """What is sampled, and where it is written; all guided applications take these.

    Attributes:
        samples: pictures, from rows of one seeded noise.
        seed: of the noise and of everything random.
        height, width: in pixels; default the model's own.
        negative_prompt: what the pictures should not show.
        memory: None for the symplectic adjoint (one network call's activations); else the plan of
            ``Exact(memory=...)``: ``"min"``, ``"max"``, ``"auto"`` or a budget. It changes bytes and seconds, and the
            pictures by rounding only.
        strip: how many samples' estimates are shown along the steps.
        out: the run's folder; default ``runs/guide-<kind>-<digits of the settings>``.
        resume: ``False`` refuses a folder that already holds a run.
        progress: show bars.
        callback: called as ``callback(run, name)`` after each of the three ways is done and saved.

    Raises:
        InputError: a number is too small.
        BudgetError: ``memory`` is no plan.
    """

    samples: int = 1
    seed: int = 0
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    memory: str | int | None = None
    strip: int = 1
    out: str | Path | None = None
    resume: bool = True
    progress: bool = True
    callback: Callable[[Run, str], Any] | None = None

    def __post_init__(self) -> None:
        if not _whole(self.samples):
            raise InputError(f"samples={self.samples!r} must be a whole number, at least 1.")
        if self.strip < 0:
            raise InputError(f"strip={self.strip!r} must be at least 0.")
        if self.memory is not None:
            MemoryPlan.parse(self.memory)


def compare(pipe: Any, prompt: str, task: Task, how: Guiding, sampling: Sampling) -> Run:
    """Sample ``prompt`` unguided, with one-step and with n-step guidance, and write down all that came out.

    A run that was killed goes on after the last of the three that was finished, with the same bits.

    Returns:
        The run: ``run.tensors("n-step")["images"]`` are pictures (N, 3, H, W) in [0, 1], not clamped, likewise
        ``"one-step"`` and ``"unguided"``; ``run.record["comparison"]`` is the table of scores and costs.

    Raises:
        InputError: a setting cannot be used; nothing has been sampled then.
        NonFiniteError: the loss or its gradient became NaN or infinite.
    """
    height, width = picture_size(pipe, sampling.height, sampling.width)
    check_prompts(pipe, [prompt])
    negative = sampling.negative_prompt
    more = {} if negative is None else {"negative_prompt": [negative] * sampling.samples}
    call = sampler_call(pipe, height, width, how.num_inference_steps, how.guidance_scale, more)
    pipe = with_scheduler(pipe, how.scheduler)
    settings = asdict(how) | {
        "samples": sampling.samples,
        "height": height,
        "width": width,
        "negative_prompt": sampling.negative_prompt,
        "gradient": "symplectic" if sampling.memory is None else "exact",
        "memory": sampling.memory,
        "loss": task.loss.spec,
        "loss_tensors": describe_tensors(task.loss),
        **code_settings(task.loss),
        **task.settings,
        "pipeline": describe_pipeline(pipe),
    }
    run = Run.open(
        f"guide-{task.kind}", settings, title=task.title, prompt=[prompt] * sampling.samples, seed=sampling.seed,
        out=sampling.out, resume=sampling.resume, device=getattr(pipe, "_execution_device", None),
    )  # fmt: skip
    if run.finished:
        return run
    sampler = Sampler(pipe, prompt, task.loss, how, sampling, call)
    with run.writing():
        for name in (UNGUIDED, N_STEP, ONE_STEP):  # one-step guidance is told what n-step guidance spent
            if name in run.record.get("variants", {}):
                continue
            if name == UNGUIDED:
                variant = Variant(name, None, how.attempts(1))
            elif name == N_STEP:
                variant = Variant(name, how.n, how.attempts())
            else:
                variant = Variant(name, 1, sampler.affordable(run))
            keep(run, variant, sampler(variant))
            if sampling.callback is not None:
                sampling.callback(run, name)
        conclude(run, task)
    return run


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
