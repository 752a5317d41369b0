"""The bytes of a job over its time, and its arithmetic, under given choices."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .choices import Choices
from .job import Job, Kind
from .profile import Profile

__all__ = ["Estimate", "estimate"]

#: Floating-point operations that take as long as moving one byte between host and device (an A100 does some 150
#: TFLOP/s of such work and moves some 20 GB/s).
FLOPS_PER_BYTE = 7500
#: What working in parts costs beside the arithmetic: smaller kernels, launched more often.
_PARTS = 1.03


@dataclass(frozen=True)
class Estimate:
    """What a job needs under given choices.

    Attributes:
        phases: most bytes of everything in each phase: ``"encoding"``, ``"sampling"``, ``"decoding"``, ``"loss"``,
            ``"decoder backward"``, ``"network backward"`` and ``"held-out loss"``, those that there are.
        calls: network calls, first and redone.
        redone: the redone ones.
        cost: floating-point operations, moved bytes in their measure.
    """

    phases: dict[str, int]
    calls: int
    redone: int
    cost: float

    @property
    def peak(self) -> int:
        """Most bytes at any time."""
        return max(self.phases.values(), default=0)

    @property
    def tightest(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def estimate(job: Job, choices: Choices) -> Estimate:
    """The bytes and the arithmetic of ``job`` under ``choices``."""
    timeline = _Timeline(job, choices)
    phases: dict[str, int] = {}
    for phase, nbytes in timeline.moments():
        phases[phase] = max(phases.get(phase, 0), nbytes)
    redone = timeline.redone_network_calls()
    return Estimate(phases, job.network_calls + redone, redone, timeline.cost())


class _Timeline:
    """A job under choices. Calls that hold their activations are always a row of neighbours: the youngest."""

    def __init__(self, job: Job, choices: Choices) -> None:
        self.job, self.choices, self.count = job, choices, len(job.calls)
        profiles = {kind: self._profile(kind) for kind in set(job.calls)}
        self.profiles = [profiles[kind] for kind in job.calls]
        self.parts = [self._parts(kind) for kind in job.calls]
        self.reached = {moment.call for moment in job.backward}
        # Those that hold something: a call in a step that carries no gradient is made and forgotten.
        self.networks = [i for i, k in enumerate(job.calls) if k.role == "network" and i in self.reached]
        saved = [p.saved for p in self.profiles]
        if choices.keep is not None:  # of a decoder's call in parts, the last part stays
            saved = [
                n // p if k.role == "decoder" else n
                for n, p, k in zip(saved, self.parts, job.calls, strict=True)
            ]
        self.saved = [0, *itertools.accumulate(saved)]
        self.own = [0, *itertools.accumulate(job.own)]
        self.first = self._first_held(self.count - 1)  # of the calls that are still held when all have ended
        self.streamed = choices.weights == "stream"
        self.offloaded = self._offloaded() if choices.weights == "offload" else {}
        # What waits elsewhere has its gradients and its optimizer's state there.
        self.state = job.state if choices.weights == "device" else 0
        self.gradients = 0 if self.streamed else job.gradients

    def moments(self) -> Iterator[tuple[str, int]]:
        """Phase and bytes of everything, in the order of time."""
        job, converted = self.job, 0
        for moment in job.forward:
            i = moment.call
            phase = {"network": "sampling", "decoder": "decoding", "other": "encoding"}[job.calls[i].role]
            converted = 0 if self.streamed else max(converted, job.calls[i].converted)
            rest = self._weights(i) + converted + self.state
            earlier, first = self._first_held(i - 1), self._first_held(i)
            yield phase, rest + self._held(earlier, i) + moment.before - self._parked(i, earlier)
            yield (
                phase,
                rest + self._held(first, i) + moment.during + self._running(i) - self._parked(i, first),
            )
        rest = self._weights(self.count - 1) + converted + self.state
        held = self._held(self.first, self.count) - self._parked(self.count)
        yield "loss", rest + held + job.pictures + self._loss()
        gradients = 0
        for moment in job.backward:
            i = moment.call
            network = job.calls[i].role == "network"
            gradients = self.gradients if network else gradients
            phase = "network backward" if network else "decoder backward"
            rest = (
                self._weights(i)
                + converted
                + self.state
                + gradients
                + self._held(self.first, i)
                - self._parked(i)
            )
            yield phase, rest + max(moment.before, moment.during + self._differentiated(i))
        if job.heldout is not None:
            rest = self._weights(self.count - 1) + converted + self.state + self.gradients
            yield "held-out loss", rest + job.pictures + self._heldout()

    def redone_network_calls(self) -> int:
        """Network calls that the backward pass runs again."""
        return sum(i in self.reached and i < self.first for i in self.networks)

    def cost(self) -> float:
        """Floating-point operations and moved bytes."""
        total = 0.0
        for i, profile in enumerate(self.profiles):
            parts, forward = self.parts[i], profile.forward_flops
            again = 0.0
            if i in self.reached:
                again = profile.backward_flops + (forward if i < self.first else 0)
                if self.job.calls[i].role == "decoder" and self.choices.keep is not None:
                    again += forward * (parts - 1) / parts
            total += (forward + again) * (_PARTS if parts > 1 else 1)
        if self.job.loss is not None:
            loss = self.job.loss.profile
            total += (loss.forward_flops + loss.backward_flops) * (_PARTS if self.choices.loss else 1)
        if self.job.heldout is not None:
            total += self.job.heldout.profile.forward_flops * (_PARTS if self.choices.loss else 1)
        return total + FLOPS_PER_BYTE * self._moved()

    def _profile(self, kind: Kind) -> Profile:
        if kind.role == "network":
            return kind.profile(self.choices.network)
        if kind.role == "decoder":
            return kind.profile(self.choices.decoder, kind.tiles and self.choices.decode == "tiles")
        return kind.profile()

    def _parts(self, kind: Kind) -> int:
        if kind.role == "network" and self.choices.guidance == "apart" and kind.rows % 2 == 0:
            return 2
        return kind.rows if kind.role == "decoder" and self.choices.decode == "sample" else 1

    def _first_held(self, i: int) -> int:
        """The oldest call that holds its activations while call ``i`` runs."""
        keep = self.choices.keep
        networks = bisect.bisect_right(self.networks, i)
        if keep is None or networks <= keep:
            return 0
        return self.networks[networks - keep] if keep else i

    def _held(self, first: int, end: int) -> int:
        return self.saved[max(first, end)] - self.saved[max(first, 0)]

    def _running(self, i: int) -> int:
        """A call's own bytes while it is made: its earlier parts are held if it is kept."""
        whole, parts = self.profiles[i], self.parts[i]
        keep = self.choices.keep
        held = keep is None or (keep > 0 and self.job.calls[i].role == "network")
        return (whole.saved * (parts - 1) // parts if held else 0) + self._forward(whole.part(parts))

    def _differentiated(self, i: int) -> int:
        """A call's own bytes while it is differentiated, from the last part to the first."""
        part, parts = self.profiles[i].part(self.parts[i]), self.parts[i]
        if i >= self.first and (self.choices.keep is None or self.job.calls[i].role == "network"):
            return self.profiles[i].saved * (parts - 1) // parts + self._backward(part)
        backward = self._backward(part)
        return backward if i >= self.first and parts == 1 else max(self._forward(part), backward)

    def _forward(self, profile: Profile) -> int:
        return profile.forward + (profile.streamed.forward if self.streamed else 0)

    def _backward(self, profile: Profile) -> int:
        return profile.backward + (profile.streamed.backward if self.streamed else 0)

    def _parked(self, i: int, first: int | None = None) -> int:
        """Arguments of calls before ``i`` that wait elsewhere: those of calls before ``first`` (when all have ended,
        the oldest that is held)."""
        first = self.first if first is None else first
        return 0 if self.choices.latents == "device" else self.own[max(min(i, first), 0)]

    def _loss(self) -> int:
        loss = self.job.loss
        if loss is None:
            return 0
        if not self.choices.loss:
            return max(loss.profile.forward, loss.profile.backward)
        part = loss.profile.part(max(1, loss.rows // self.choices.loss))
        return max(part.forward, part.backward) + loss.pull

    def _heldout(self) -> int:
        """Bytes while the pictures are scored without a gradient, when the backward pass has ended."""
        loss = self.job.heldout
        if loss is None:
            return 0
        return loss.profile.part(max(1, loss.rows // self.choices.loss) if self.choices.loss else 1).forward

    def _weights(self, i: int) -> int:
        if self.streamed:  # the others' are counted with the call itself
            stay = sum(c.weights for c in self.job.components if c.stays)
            return stay + self.job.loss_weights
        return self.offloaded[self.job.calls[i]] if self.offloaded else self.job.weights

    def _offloaded(self) -> dict[Kind, int]:
        """Bytes of the weights on the device during a kind of calls."""
        return {
            kind: self.job.loss_weights
            + sum(c.weights for c in self.job.components if c.stays or c.name in self._turn(kind))
            for kind in set(self.job.calls)
        }

    def _turn(self, kind: Kind) -> frozenset[str]:
        """The components whose weights a call needs, with those that take turns with it."""
        if kind.role == "other":
            return frozenset([kind.component])
        return frozenset(k.component for k in set(self.job.calls) if k.role == kind.role)

    def _moved(self) -> int:
        """Bytes that go to the device and come back."""
        moved = 2 * self._parked(self.count)
        if self.streamed:
            for i, profile in enumerate(self.profiles):
                calls = 1 + (i in self.reached and i < self.first)
                moved += self.parts[i] * calls * profile.streamed.forward_moved
                moved += self.parts[i] * (i in self.reached) * profile.streamed.backward_moved
        if self.choices.weights == "offload":
            sizes = {c.name: 0 if c.stays else c.weights for c in self.job.components}
            turns = {kind: self._turn(kind) for kind in set(self.job.calls)}
            before: frozenset[str] = frozenset()
            for moment in (*self.job.forward, *self.job.backward):
                now = turns[self.job.calls[moment.call]]
                moved += sum(sizes[name] for name in now - before)
                before = now
        return moved
