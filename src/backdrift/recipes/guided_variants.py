"""One of the ways that :mod:`~.guiding` samples a prompt: unguided, one-step or n-step, and what it cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..gradients import Exact, SymplecticAdjoint
from ..guidance import Attempt, Guidance, GuidanceTrace, SymplecticAdjointGuidance, guide
from ..losses import Loss
from ..progress import progress_bar
from ..run import Run
from ..suggest import closest

if TYPE_CHECKING:
    from .guiding import Guiding, Sampling

UNGUIDED, ONE_STEP, N_STEP = "unguided", "one-step", "n-step"

#: Short names of diffusers' schedulers that guidance steps.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
}

PREVIEW = 96  # pixels, of the pictures in a strip


@dataclass(frozen=True)
class Variant:
    """One way to sample.

    Attributes:
        name: ``"unguided"``, ``"one-step"`` or ``"n-step"``.
        n: steps of the estimate; None where nothing is guided, and the loss only looks on.
        attempts: how often each step of the run is taken.
    """

    name: str
    n: int | Literal["adaptive"] | None
    attempts: Sequence[int]


@dataclass(frozen=True)
class Sampled:
    """What came out.

    Attributes:
        tensors: ``images`` (N, 3, H, W) in [0, 1], not clamped; ``strip`` (S, K, 3, h, w) uint8, the estimates'
            pictures of the first S samples at the K guided steps.
        facts: JSON; the record's entry of the variant (:mod:`backdrift.run`).
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Sampler:
    """Samples one prompt from one noise, as a :class:`Variant` says.

    Args:
        pipe: a diffusers pipeline.
        call: further keywords of its call.
    """

    def __init__(
        self, pipe: Any, prompt: str, loss: Loss, how: Guiding, sampling: Sampling, call: Mapping[str, Any]
    ) -> None:
        from ..pipelines.load import noise

        self.pipe, self.prompt, self.loss, self.how, self.sampling = pipe, prompt, loss, how, sampling
        self.call = dict(call)
        size = {"height": self.call["height"], "width": self.call["width"]}
        self.noise = noise(pipe, seed=sampling.seed, batch_size=sampling.samples, **size)

    def __call__(self, variant: Variant) -> Sampled:
        total = sum(variant.attempts[i] for i in self.how.guided)
        done = 0
        with progress_bar(total, self.sampling.progress, variant.name) as show:

            def shown(entry: Any) -> None:
                nonlocal done
                done += 1
                show(done, {"loss": sum(entry.loss) / len(entry.loss)})

            watch, guidance = self._guidance(variant, shown)
            made = guide(
                self.pipe, [self.prompt] * self.sampling.samples, guidance, seed=self.sampling.seed,
                latents=self.noise.clone(), **self.call,
            )  # fmt: skip
        strips = [guidance.trace.strip(i) for i in range(min(self.sampling.strip, self.sampling.samples))]
        tensors = {"images": made.images.float()}
        if kept := [strip for strip in strips if strip is not None]:
            tensors["strip"] = torch.stack(kept)
        calls = guidance.trace.calls
        return Sampled(
            tensors,
            {
                "n": variant.n,
                "attempts": list(variant.attempts),
                "seconds": made.seconds - watch.seconds,
                "network_calls": calls.forward + calls.redone,
                "redone": calls.redone,
                "vjps": calls.vjps,
                "decodes": guidance.trace.decodes if variant.n is not None else 0,
                "flagged": bool(any(made.flagged or ())),
                "steps": by_step(guidance.trace),
            },
        )

    def affordable(self, run: Run) -> list[int]:
        """How often one-step guidance takes each step; where that is measured, the record says so before it is used."""
        spent, ratio = run.record["variants"][N_STEP], self.how.one_step
        if ratio == "calls":
            return affordable(spent, self.how.num_inference_steps, None)
        if ratio == "seconds":
            if "one_step" not in run.record:
                once = self(Variant(ONE_STEP, 1, self.how.attempts(1)))
                run.record["one_step"] = round(per_try(spent) / per_try(once.facts), 3)
                run.save_record()
            ratio = run.record["one_step"]
        return affordable(spent, self.how.num_inference_steps, float(ratio))

    def _guidance(self, variant: Variant, shown: Any) -> tuple[Watch, Guidance]:
        how, watch = self.how, Watch()
        shared: dict[str, Any] = {
            "start": how.start, "stop": how.stop, "seed": self.sampling.seed, "callback": shown,
            "repeats": list(variant.attempts), "strip": PREVIEW if self.sampling.strip else False,
        }  # fmt: skip
        if variant.n is None:
            return watch, Guidance(watch, self.loss, **shared)
        memory = self.sampling.memory
        gradient = SymplecticAdjoint() if memory is None else Exact(memory=memory)
        return watch, SymplecticAdjointGuidance(
            self.loss, variant.n, strength=how.strength, subgrid=how.subgrid, gradient=gradient, **shared
        )


class Watch:
    """The rule that lets the sampler do as it would, and notes what the loss says of the one-step estimate.

    Attributes:
        seconds: spent on looking.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, attempt: Attempt) -> Tensor:
        x0 = attempt.evaluation.x0
        began = time.perf_counter()
        attempt.note(loss=attempt.score(x0).values, n=1)
        self.seconds += time.perf_counter() - began
        return attempt.take()


def by_step(trace: GuidanceTrace) -> list[dict[str, Any]]:
    """One JSON object for each guided step: what its last attempt noted, and what all of them cost."""
    rows = []
    for last in trace.last_attempts:
        every = [entry for entry in trace.entries if entry.index == last.index]
        rows.append(
            {
                "index": last.index,
                "t": last.t,
                "n": last.n,
                "loss": last.loss,
                "strength": last.strength,
                "pull": last.pull,
                "attempts": len(every),
                "estimate_steps": sum(_estimate_steps(entry.n) for entry in every),
                "network_calls": sum(entry.calls.forward for entry in every),
                "redone": sum(entry.calls.redone for entry in every),
                "vjps": sum(entry.calls.vjps for entry in every),
                "seconds": sum(entry.seconds for entry in every),
            }
        )
    return rows


def _estimate_steps(n: int | list[int] | None) -> int:
    """Of an attempt: where samples ask for different numbers, an estimate of all of them is made for each."""
    return sum(set(n)) if isinstance(n, list) else n or 0


def affordable(spent: Mapping[str, Any], total: int, ratio: float | None) -> list[int]:
    """How often one-step guidance takes each step.

    Args:
        spent: the record's entry of n-step guidance.
        total: steps of the run.
        ratio: tries for each of n-step guidance's. None: as many as make the same network calls and products: n for an
            estimate in n steps, and half as much again where n was chosen adaptively, which takes n calls more. What a
            gradient method makes twice is its own affair and not counted.
    """
    attempts = [1] * total
    for step in spent["steps"]:
        if ratio is None:
            worth = (1.5 if spent["n"] == "adaptive" else 1.0) * step["estimate_steps"]
        else:
            worth = ratio * step["attempts"]
        attempts[step["index"]] = max(1, round(worth))
    return attempts


def per_try(facts: Mapping[str, Any]) -> float:
    """Seconds of one try of a guided step."""
    steps = facts["steps"]
    return sum(step["seconds"] for step in steps) / sum(step["attempts"] for step in steps)


def keep(run: Run, variant: Variant, found: Sampled) -> None:
    """Save what came out; the record names it only when its tensors are there."""
    run.save_tensors(variant.name, found.tensors)
    run.record.setdefault("variants", {})[variant.name] = found.facts
    run.save_record()


def with_scheduler(pipe: Any, name: str | None) -> Any:
    """A pipeline of the same parts with another scheduler; ``pipe`` itself for None.

    Raises:
        InputError: there is no such scheduler, or the pipeline's network was trained for another kind.
    """
    if name is None:
        return pipe
    import diffusers

    wanted = SCHEDULERS.get(name, name)
    kind = getattr(diffusers, wanted, None) if wanted.endswith("Scheduler") else None
    if kind is None:
        known = [*SCHEDULERS, *SCHEDULERS.values()]
        raise InputError(
            f"There is no scheduler {name!r}.{closest(name, known)} Use {', '.join(SCHEDULERS)}, or the name of a "
            "class of diffusers."
        )
    if ("FlowMatch" in wanted) != ("FlowMatch" in type(pipe.scheduler).__name__):
        raise InputError(
            f"The scheduler {name!r} does not fit this pipeline, whose own is {type(pipe.scheduler).__name__}: one is "
            "for flow matching and the other is not."
        )
    own = copy.copy(pipe)
    own.__dict__["scheduler"] = kind.from_config(pipe.scheduler.config)
    return own
