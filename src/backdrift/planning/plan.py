"""The answer of the planner: what a job needs, what was chosen under a budget, and why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..budget import format_size
from ..errors import BudgetError
from .choices import Choices, candidates
from .job import Job
from .search import Option, fitting, frontier, next_faster, option, smallest

__all__ = ["Plan", "make_plan"]

_WORDS = {
    ("network", "block"): "redo the network block by block",
    ("network", "resnet"): "redo the network one residual network or transformer block at a time",
    ("decoder", "block"): "redo the decoder block by block",
    ("decoder", "resnet"): "redo the decoder one residual network at a time",
    ("guidance", "apart"): "run the guidance halves one after the other",
    ("decode", "sample"): "decode sample by sample",
    ("decode", "tiles"): "decode in tiles (blended at their seams: not the same pictures)",
    ("loss", 1): "score one picture at a time (bd.optimize does; elsewhere with bd.losses.InParts)",
    ("latents", "cpu"): "let latents and other arguments of calls wait on the CPU",
    ("weights", "offload"): "keep only the weights of the present phase on the device "
    "(pipe.enable_model_cpu_offload())",
    ("weights", "stream"): "bring each layer's weights to the device for the length of its own call "
    "(pipe.enable_model_cpu_offload(), and a budget for the run)",
}


@dataclass(frozen=True)
class Plan:
    """What a job needs and how it is run. ``print(plan)`` is a summary; the command line makes tables of it.

    Attributes:
        job: what was counted.
        chosen: the choices and what they need.
        tactics: all choices there were, ``keep`` left open.
        budget: bytes of everything on the device; None for no limit.
    """

    job: Job
    chosen: Option
    tactics: tuple[Choices, ...]
    budget: int | None

    @cached_property
    def plain(self) -> Option:
        """Plain autograd: everything kept."""
        return option(self.job, Choices(weights=self.tactics[0].weights))

    @cached_property
    def least(self) -> Option:
        """What needs the least memory."""
        return smallest(self.job, self.tactics)

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """The choices that nothing beats in both time and memory, the fastest first."""
        return tuple(frontier(self.job, self.tactics))

    @property
    def choices(self) -> Choices:
        """What was chosen."""
        return self.chosen.choices

    @property
    def peak(self) -> int:
        """Most bytes of everything at any time, as estimated."""
        return self.chosen.needs.peak

    @property
    def time(self) -> float:
        """Estimated time as a multiple of plain autograd's, which may not fit."""
        return self.time_of(self.chosen)

    def time_of(self, option: Option) -> float:
        """Estimated time of an option as a multiple of plain autograd's."""
        return option.needs.cost / self.plain.needs.cost if self.plain.needs.cost else 1.0

    @property
    def why(self) -> tuple[str, ...]:
        """The reasons, one sentence each."""
        lines = [] if self.budget is None else [f"The budget is {format_size(self.budget)}."]
        plain = self.plain.needs
        if self.choices == self.plain.choices:
            lines.append(
                f"Everything is kept: plain autograd needs {format_size(plain.peak)}, at the {plain.tightest}."
            )
            return (*lines, *self.job.notes)
        lines.append(f"Plain autograd would need {format_size(plain.peak)}, at the {plain.tightest}.")
        lines += [f"So: {sentence}." for sentence in words(self.choices)]
        if self.choices.keep is not None:
            lines.append(
                f"Of {self.job.graded_calls} network calls to be differentiated the last {self.choices.keep} keep "
                "their activations; "
                f"{self.chosen.needs.redone} are run again."
            )
        if not self.choices.same_bits and self.choices.decode != "tiles":
            lines.append("A divided batch agrees with the undivided one to rounding.")
        lines.append(f"That needs {format_size(self.peak)}, at the {self.chosen.needs.tightest}.")
        faster = next_faster(self.job, self.tactics, self.chosen)
        if faster is not None:
            lines.append(f"The next faster way needs {format_size(faster.needs.peak)}.")
        return (*lines, *self.job.notes)

    @property
    def needs(self) -> dict[str, int]:
        """Bytes of each part of the job on its own, all in one piece: what the choices are about."""
        job = self.job
        found = {f"weights: {c.name}": c.weights for c in job.components}
        for loss in (job.loss, job.heldout):
            if loss is not None and loss.weights:
                found[f"weights: {loss.name}"] = found.get(f"weights: {loss.name}", 0) + loss.weights
        found["latents and arguments, all calls"] = job.latents
        for role, word in (("network", "call"), ("decoder", "call"), ("other", "call")):
            for kind in job.kinds(role):  # type: ignore[arg-type]
                profile = kind.profile()
                label = f"one {word} of {kind.component}"
                found[f"activations of {label}"] = max(found.get(f"activations of {label}", 0), profile.saved)
                more = max(profile.forward, profile.backward) - profile.saved
                found[f"beside them, for a moment, {label}"] = max(
                    found.get(f"beside them, for a moment, {label}", 0), more
                )
        if job.loss is not None:
            found[f"activations of {job.loss.name}"] = job.loss.profile.saved
        if job.heldout is not None:
            found[f"for a moment, {job.heldout.name} without a gradient"] = job.heldout.profile.forward
        found["gradients of weights"] = job.gradients
        found["optimizer state"] = job.state
        return {name: nbytes for name, nbytes in found.items() if nbytes}

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and words, for a record."""
        return {
            "pipeline": self.job.name,
            "budget": self.budget,
            "needs": self.needs,
            "chosen": self.row(self.chosen),
            "plain": self.row(self.plain),
            "least": self.row(self.least),
            "options": [self.row(o) for o in self.options],
            "why": list(self.why),
        }

    def row(self, option: Option) -> dict[str, Any]:
        """One option as plain numbers and words."""
        needs = option.needs
        return {
            "choices": option.choices.as_dict(),
            "words": list(words(option.choices)),
            "peak": needs.peak,
            "phases": dict(needs.phases),
            "fits": self.budget is None or needs.peak <= self.budget,
            "network_calls": needs.calls,
            "redone": needs.redone,
            "time": self.time_of(option),
        }

    def __str__(self) -> str:
        return "\n".join(self.why)

    __repr__ = __str__


def words(choices: Choices) -> tuple[str, ...]:
    """Choices in words, without how many calls are kept."""
    return tuple(
        _WORDS.get((key, value), f"score {value} pictures at a time") if key == "loss" else _WORDS[key, value]
        for key, value in choices.changes.items()
        if key != "keep"
    )


def make_plan(
    job: Job,
    budget: int | None = None,
    *,
    tiles: bool = False,
    offload: bool = True,
    offloaded: bool = False,
    park: bool | None = None,
    micro: bool = True,
    fixed: Choices | None = None,
) -> Plan:
    """The fastest way to run ``job`` within ``budget`` bytes.

    Args:
        job: from a rehearsal.
        budget: bytes of everything on the device; None: no limit.
        tiles, offload, offloaded, park, micro: see :func:`~backdrift.planning.choices.candidates`.
        fixed: take these choices and only count.

    Raises:
        BudgetError: nothing fits; names the smallest budget that works.
    """
    tactics = tuple(
        candidates(job, tiles=tiles, offload=offload, offloaded=offloaded, park=park, micro=micro)
    )
    if fixed is not None:
        chosen: Option | None = option(job, fixed)
    elif budget is None:
        chosen = option(job, Choices(weights=tactics[0].weights))
    else:
        chosen = fitting(job, tactics, budget)
    if chosen is None:
        least = smallest(job, tactics)
        hint = _hint(job, least)
        if park and not offload and not offloaded:
            # There is a second place, but it is the user who sends weights there.
            away = candidates(job, tiles=tiles, offload=False, offloaded=True, park=park, micro=micro)
            would = format_size(smallest(job, list(away)).needs.peak)
            hint += f"; after pipe.enable_model_cpu_offload() {would} would do"
        raise BudgetError(
            f"memory={format_size(budget or 0)} is too small for {job.name}: the smallest budget that works is "
            f"{format_size(least.needs.peak)}, needed at the {least.needs.tightest}. {hint}"
        )
    return Plan(job, chosen, tactics, budget)


def _hint(job: Job, least: Option) -> str:
    most = max((c.weights for c in job.components), default=0)
    weights = {"device": job.weights, "offload": most, "stream": 0}[least.choices.weights]
    share = weights / least.needs.peak
    if share > 0.5:
        return f"{format_size(weights)} of it are weights: load them in half precision or quantised"
    return "Take smaller pictures, a smaller batch, or half precision"
