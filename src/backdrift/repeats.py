"""Whether a redone call gave what the first one gave: noticed where it keeps state that nobody can put back.

A network may hold what neither its arguments nor its weights show: a counter of its calls, a cache in an attribute, a
``torch.Generator`` of its own, NumPy's or Python's random numbers. Redone, it computes something else, and the gradient
would be that of another call. So of every call that may be redone a *glimpse* is kept: k entries of each tensor that it
returned, at fixed places spread over it, k = 64 for one tensor. With a the first call's and b the redone one's,

    ‖a - b‖ > sqrt(spacing) ‖a‖        (one tensor; entries that are both NaN, or the same infinity, are equal)

raises, where ``spacing`` is the distance from 1 to the next number in the coarsest arithmetic that the call may have
used (:meth:`~backdrift.ambient.Ambient.spacing`): half the digits have to agree. Other kernels, atomic additions and
algorithms that are chosen by trial change the last digits, and a network makes more of that, but not half of all.

| coarsest arithmetic | spacing | may differ by |
|---|---|---|
| float64 | 2.2e-16 | 1.5e-8 |
| float32 | 1.2e-7 | 3.5e-4 |
| float16, or float32 where TF32 is allowed | 9.8e-4 | 3.1 % |
| bfloat16, autocast to it | 7.8e-3 | 8.8 % |
"""

from __future__ import annotations

import itertools
import math
import threading
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .accelerators import has_float64
from .errors import StateChangedError

__all__ = ["Glimpse", "Repeats", "differs"]

_ENTRIES, _LEAST, _TENSORS = 64, 8, 16
_DEPTH = 3  # of objects inside objects that tensors are looked for in
_MOST = 256  # tensors that are looked for
_OTHERS = (nn.Module, type, types.ModuleType, types.FunctionType)  # what holds tensors that are no output


class Glimpse:
    """A few entries of what a call returned.

    Attributes:
        entries: (tensors, k), float64 if one of the tensors is and the device has it, else float32; on their device.
        shapes, dtypes: of the tensors.
    """

    __slots__ = ("dtypes", "entries", "shapes")

    def __init__(self, found: list[Tensor]) -> None:
        self.shapes = [x.shape for x in found]
        self.dtypes = frozenset(x.dtype for x in found)
        device = next((x.device for x in found if x.device.type != "cpu"), found[0].device)
        double = any(x.dtype in (torch.float64, torch.complex128) for x in found)
        wide = torch.float64 if double and has_float64(device) else torch.float32
        count = max(_LEAST, _ENTRIES // len(found))
        rows = [_spread(x, count).to(device=device, dtype=wide) for x in found]
        self.entries = rows[0].clone()[None] if len(rows) == 1 else torch.stack(rows)

    @classmethod
    def of(cls, output: Any) -> Glimpse | None:
        """That of a nest of tensors, or of an object that holds some; None where there is nothing to look at.

        Looks at 16 tensors at most. Nothing is read from the tensors' device.
        """
        if torch._C._are_functorch_transforms_active():
            return None
        found = list(itertools.islice(_tensors(output, _DEPTH), _MOST))
        if not found:
            return None
        with torch.no_grad():
            return cls(found if len(found) <= _TENSORS else [found[i] for i in _spaced(len(found))])

    def off(self, other: Glimpse) -> Tensor:
        """By how much the other one differs from this one: ‖a - b‖ / ‖a‖, the largest of all tensors', ()."""
        a, b = self.entries, other.entries.to(self.entries)
        same = (a == b) | (a.isnan() & b.isnan())
        gap, own = torch.where(same, 0.0, a - b), torch.where(a.isfinite(), a, 0.0)
        # What is smaller than a dtype's normal numbers has few digits, or none.
        least = max((torch.finfo(d).smallest_normal for d in self.dtypes if d.is_floating_point), default=0.0)
        unit = own.abs().amax(1, keepdim=True).clamp_min(max(least, torch.finfo(a.dtype).smallest_normal))
        size = (own / unit).square().sum(1).sqrt().clamp_min(1.0)
        return ((gap / unit).square().sum(1).sqrt() / size).amax()

    def unlike(self, other: Glimpse | None) -> str | None:
        """In words, what another one has that cannot be compared with this one; None if it can."""
        theirs = [] if other is None else other.shapes
        if len(theirs) != len(self.shapes):
            return f"it returned {len(theirs)} tensors where there were {len(self.shapes)}"
        pairs = zip(self.shapes, theirs, strict=True)
        wrong = next(((a, b) for a, b in pairs if a != b), None)
        return wrong and f"it returned shape {tuple(wrong[1])} where it was {tuple(wrong[0])}"


class Repeats:
    """The comparisons of the calls of one run.

    On a CPU a call that differs raises where it is redone. On other devices the numbers stay there until the backward
    pass is done, so that no call waits for the device, and it raises then, out of ``backward()``.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[tuple[Tensor, float, str, str]]] = {}
        self._lock = threading.Lock()

    def compare(
        self,
        first: Glimpse | None,
        again: Glimpse | None,
        spacing: float,
        who: str,
        remedy: str,
        *,
        states: tuple[Glimpse, Glimpse] | None = None,
    ) -> None:
        """See that a redone call gave what the first one gave.

        Args:
            first: what was seen of the first call; None if nothing was, and then there is nothing to compare.
            again: of the redone one.
            spacing: of the call's coarsest arithmetic.
            who: the network, and the block in it, for the message.
            remedy: what the user may do, for the message.
            states: of what the two calls were given: where that differs by more than rounding, another call was meant,
                and its output is not compared.

        Raises:
            StateChangedError: it did not; on an accelerator when the backward pass ends.
        """
        if first is None:
            return
        unlike = first.unlike(again)
        if again is None or unlike is not None:
            raise differs(who, str(unlike), remedy)
        tolerance = math.sqrt(spacing)
        with torch.no_grad():
            off = first.off(again)
            if states is not None:
                slack = 4 * max(torch.finfo(d).eps for d in states[0].dtypes)
                off = torch.where(states[0].off(states[1]) <= slack, off, 0.0)
        task = torch._C._current_graph_task_id()
        if off.device.type == "cpu" or task == -1:
            _check(float(off), tolerance, who, remedy)
            return
        with self._lock:
            waiting = self._waiting.get(task)
            if waiting is None:
                waiting = self._waiting[task] = []
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._ended(task))
            waiting.append((off, tolerance, who, remedy))

    def _ended(self, task: int) -> None:
        with self._lock:
            waiting = self._waiting.pop(task, [])
        places: dict[torch.device, list[tuple[Tensor, float, str, str]]] = {}
        for one in waiting:
            places.setdefault(one[0].device, []).append(one)
        for found in places.values():
            offs = torch.stack(
                [off.detach() for off, *_ in found]
            ).tolist()  # the one time that the device is read
            for off, (_, tolerance, who, remedy) in zip(offs, found, strict=True):
                _check(off, tolerance, who, remedy)


def differs(who: str, how: str, remedy: str) -> StateChangedError:
    """The error of a call that did not repeat itself.

    Args:
        who: the network, and the block in it.
        how: what was seen.
        remedy: what the user may do beside keeping it fixed.
    """
    return StateChangedError(
        f"{who} did not repeat itself in the backward pass ({how}): something that it reads outside its arguments and "
        "weights has changed, such as a counter of its calls, a cache in an attribute, a torch.Generator of its own, "
        f"NumPy's or Python's random numbers. Keep that fixed until backward() is done, or {remedy}"
    )


def _check(off: float, tolerance: float, who: str, remedy: str) -> None:
    if not off <= tolerance:  # NaN too
        how = f"its output is {100 * off:.2g} % off, where rounding explains {100 * tolerance:.2g} % at most"
        raise differs(who, how, remedy)


def _tensors(nest: Any, depth: int) -> Iterator[Tensor]:
    """The tensors of what a call returned that can be looked at, in order."""
    if isinstance(nest, Tensor):
        plain = type(nest) is Tensor or type(nest) is nn.Parameter
        if (
            plain
            and nest.layout == torch.strided
            and nest.numel()
            and not (nest.is_meta or nest.is_quantized)
        ):
            yield nest.detach()
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from _tensors(value, depth)
    elif isinstance(nest, list | tuple):
        for value in nest:
            yield from _tensors(value, depth)
    elif depth and hasattr(nest, "__dict__") and not isinstance(nest, _OTHERS):
        for value in list(vars(nest).values()):
            yield from _tensors(value, depth - 1)


def _spread(x: Tensor, count: int) -> Tensor:
    """``count`` entries of a tensor, the same ones for the same shape whatever its strides; a view where that is
    possible."""
    if x.is_complex():
        x = torch.view_as_real(x)
    size = x.numel()
    if size >= count and x.is_contiguous():
        start, step = _stride(size, count)
        return x.view(-1)[start : start + (count - 1) * step + 1 : step]
    start, step = _stride(max(size, count), count)
    # Made on the device: nothing is copied to it. Fewer entries than asked for are taken several times.
    places = (torch.arange(count, device=x.device) * step + start) % size
    index = []
    for extent in reversed(x.shape):
        index.append(places % extent)
        places = places // extent
    return x[tuple(reversed(index))] if index else x.expand(count)


def _spaced(size: int) -> list[int]:
    """The tensors that are looked at among many: the first, the last, and others in between."""
    return [i * (size - 1) // (_TENSORS - 1) for i in range(_TENSORS)]


@lru_cache(maxsize=1024)
def _stride(size: int, count: int) -> tuple[int, int]:
    """Where the first of ``count`` places among ``size`` is, and how far it is to the next one: no divisor of the size,
    which would be the same column of a picture, or the same channel, over and over."""
    step = size // count
    while math.gcd(step, size) > 1:
        step -= 1
    return (size - 1 - (count - 1) * step) // 2, step
