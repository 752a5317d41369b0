"""The states along the forward path, at any time, from what a run kept of them.

Between two nodes Y = x / scale is a cubic in the clock: its values and slopes at both ends are those of the run (the
cubic Hermite interpolant), which keeps order 4 without a network call. A straight line would cap it at 2. Where the
state halfway through a step is known as well (an adaptive solver's steps are few and long, and its stages tell it for
nothing) the multiple of the quartic w² (1 - w)² is added that meets it, w from 0 to 1 along the step: order 5.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..forms import Form
from ..scalars import add_scaled, rescaled


def interval_of(times: Sequence[float], t: float) -> int:
    """Which interval of the falling ``times`` holds ``t``; a node belongs to the one before it."""
    return min(max(bisect_left(times, -t, key=lambda value: -value) - 1, 0), len(times) - 2)


class StoredPath:
    """The path through stored states.

    Args:
        form: in whose clock and variable it is interpolated.
        times: the run's falling nodes.
        record: ``("state", i)`` the state at node i, and ``("output", i)`` the network's output there in interval i.
        output: ``output(x, t, interval)``, for outputs that were not kept.
        middles: by interval: at what time a state ``("middle", i)`` is, where there is one.
    """

    def __init__(
        self,
        form: Form,
        times: Sequence[float],
        record: Mapping[tuple[Any, ...], Tensor],
        output: Callable[[Tensor, float, int], Tensor],
        middles: Mapping[int, float] | None = None,
    ) -> None:
        self.middles = {i: t for i, t in (middles or {}).items() if ("middle", i) in record}
        self.form, self.times, self.record, self._output = form, times, record, output
        self._nodes = {t: i for i, t in enumerate(times)}
        self._ends: dict[int, Tensor] = {}  # the output at an interval's end

    def note(self, t: float, interval: int, out: Tensor) -> None:
        """The network's output at ``t`` in that interval has become known."""
        if self._nodes.get(t) == interval + 1:
            self._ends[interval] = out

    def at(self, t: float, interval: int) -> Tensor:
        """The state x at time ``t``, which lies in that interval."""
        if t in self._nodes:
            return self.record["state", self._nodes[t]]
        form, start, end = self.form, self.times[interval], self.times[interval + 1]
        a, b = form.node(start).s, form.node(end).s
        w = (form.node(t).s - a) / (b - a)
        numbers, terms = _cubic(w), []
        if interval in self.middles:
            middle = self.middles[interval]
            m = (form.node(middle).s - a) / (b - a)
            quartic = (w * (1 - w) / (m * (1 - m))) ** 2
            numbers = [n - quartic * other for n, other in zip(numbers, _cubic(m), strict=True)]
            terms = [(quartic / form.scale(middle), self.record["middle", interval])]
        on_left, on_right, on_first, on_last = numbers
        left, right = self.record["state", interval], self.record["state", interval + 1]
        terms += [
            (on_first * (b - a), self._slope(left, start, self._first(interval))),
            (on_right / form.scale(end), right),
            (on_last * (b - a), self._slope(right, end, self._last(interval))),
        ]
        y = add_scaled(rescaled(left, on_left / form.scale(start)), terms)
        return rescaled(y, form.scale(t))

    def _slope(self, x: Tensor, t: float, out: Tensor) -> Tensor:
        on_x, on_output = self.form.coefficients(t)
        return add_scaled(rescaled(out, on_output), [(on_x, x)])

    def _first(self, interval: int) -> Tensor:
        key = ("output", interval)
        if key in self.record:
            return self.record[key]
        return self._output(self.record["state", interval], self.times[interval], interval)

    def _last(self, interval: int) -> Tensor:
        if interval not in self._ends:
            kept = self.record.get(("output", interval + 1))
            if kept is None:
                kept = self._output(self.record["state", interval + 1], self.times[interval + 1], interval)
            self._ends[interval] = kept
        return self._ends[interval]


def _cubic(w: float) -> list[float]:
    """Hermite's cubics at ``w``: of the values at 0 and 1, and of the slopes there."""
    return [(1 + 2 * w) * (1 - w) ** 2, w * w * (3 - 2 * w), w * (1 - w) ** 2, w * w * (w - 1)]
