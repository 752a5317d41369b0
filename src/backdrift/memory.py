"""The memory plan: which network calls keep their activations for the backward pass, which are redone.

A run is a row of expensive calls joined by cheap arithmetic. Every call runs with gradients; its saved
tensors are held on a :class:`Ledger`. When the budget would be passed, the *oldest* call still held is
dropped, so that what stays at the end is the last k calls, the first ones that the backward pass frees again;
the number of calls need not be known. Dropped calls are redone one at a time, when the backward pass reaches
them.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .budget import available_bytes, format_size, parse_size
from .errors import BudgetError
from .frames import Frame
from .holdings import Holdings
from .stats import RunStats
from .weights import Weights

__all__ = ["Ledger", "MemoryPlan"]
Role = Literal["network", "decoder", "other"]
_T = TypeVar("_T")

# Bytes beside the saved tensors while a call runs or is differentiated (gradients in flight, temporaries), in
# multiples of the largest saved tensor: a residual block holds the skip's gradient, its branch's incoming and
# outgoing ones and one temporary.
_IN_FLIGHT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """What may be held for the backward pass.

    Attributes:
        mode: ``"min"`` (one call's activations at a time), ``"max"`` (all: plain autograd), ``"auto"``
            (a budget from the memory that is free at the first call) or ``"bytes"``.
        budget: bytes, for mode ``"bytes"``.
    """

    mode: Literal["min", "max", "auto", "bytes"]
    budget: int | None = None

    @classmethod
    def parse(cls, memory: MemoryPlan | str | int) -> MemoryPlan:
        """A plan from ``"min"``, ``"max"``, ``"auto"``, a number of bytes, or a size such as ``"6GiB"``.

        Raises:
            BudgetError: anything else, or a size that is not positive.
        """
        if isinstance(memory, MemoryPlan):
            return memory
        if memory in ("min", "max", "auto"):
            return cls(memory)  # type: ignore[arg-type]
        return cls("bytes", parse_size(memory))


class _Watch:
    """Notices a backward pass arriving at a call: counts it, and checks that the weights are as they were."""

    def __init__(
        self, ledger: Ledger, role: Role, weights: Weights, check: Callable[[], None] | None = None
    ) -> None:
        self.ledger, self.role, self.weights, self.check = ledger, role, weights, check
        self.serial = -1
        self.seen: set[int] = set()

    def __call__(self, grad: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self.seen:
            self.seen.add(task)
            self.weights.check()
            if self.check is not None:
                self.check()
            self.ledger.arrived(task, self.role, self.serial)


class Ledger:
    """Runs calls under a plan and counts what they hold.

    One ledger serves one sampling run (or several whose graphs live at the same time: they share the budget).
    The budget covers what the calls hold for the backward pass, their arguments, and a reserve for gradients
    in flight and for the gradients of trained weights. It does not cover the weights, what the loss holds, or
    tensors that exist anyway.

    Args:
        memory: anything :meth:`MemoryPlan.parse` takes.
        stats: counts are added here; a new :class:`RunStats` by default.
        defer: when the budget is too small for a call, finish the run without gradients, measuring the rest,
            and raise in :meth:`finish`. Otherwise raise at the end of that call.

    Raises:
        BudgetError: ``memory`` is not a memory plan.

    Example:
        >>> ledger = Ledger("512MiB")
        >>> eps = ledger.call(network, x, t, cond, modules=[("network", network)])
    """

    def __init__(
        self,
        memory: MemoryPlan | str | int = "min",
        *,
        stats: RunStats | None = None,
        defer: bool = False,
    ) -> None:
        self.plan = MemoryPlan.parse(memory)
        self.budget = self.plan.budget
        self.stats = stats if stats is not None else RunStats()
        self.lock = threading.RLock()
        self.running: Frame | None = None
        self._defer = defer
        self._holdings = Holdings()
        self._short = False  # the budget was too small for a call
        self._biggest_call = self._biggest_tensor = 0
        self._measured: dict[Any, int] = {}
        self._measuring: list[Any] = []  # what a run with a larger budget would hold as arguments
        self._snapshots: dict[tuple[int, ...], Weights] = {}
        self._trained: dict[int, int] = {}  # bytes of the gradients to come, per weight
        self._inside = threading.local()
        self._started: dict[int, float] = {}
        self._remade: dict[int, list[weakref.ref[Frame]]] = {}

    def call(
        self,
        fn: Callable[..., _T],
        *args: Any,
        modules: Sequence[tuple[str, nn.Module]] = (),
        owned: bool = False,
        role: Role = "network",
        check: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> _T:
        """Run ``fn(*args, **kwargs)`` as one call of the plan. A call within a call is part of it.

        Args:
            fn: computes the same from the same arguments, weights and random state. Tensors it closes over
                get their gradients too, but are not watched for edits.
            modules: (name, module) of the networks in ``fn``: weights that are not counted, and are compared
                in the backward pass.
            owned: the modules belong to this run alone (see :class:`~backdrift.weights.Weights`).
            role: ``"network"`` or ``"decoder"``: where it is counted; ``"other"`` is not.
            check: called when a backward pass comes to this call, after its weights were compared.

        Raises:
            BudgetError: the budget is too small for this call; names the smallest that works for it.
            StateChangedError: in the backward pass, if weights, arguments, adapters or flags have changed.
        """
        if not torch.is_grad_enabled() or getattr(self._inside, "call", False):
            return fn(*args, **kwargs)
        if role == "network":
            self.stats.calls_forward += 1
        elif role == "decoder":
            self.stats.decodes += 1
        leaves, spec = pytree.tree_flatten((args, kwargs))
        weights = self._weights(modules, owned)
        watch = _Watch(self, role, weights, check)
        kind = _kind(fn, modules, leaves)
        with self._entered():
            if self._short and kind in self._measured:
                return self._call_measured(fn, args, kwargs, leaves, weights)
            if self.plan.mode == "max" and kind in self._measured:
                out = fn(*args, **kwargs)
                watch.serial = self._holdings.open(watch, role, self._measured[kind])
            else:
                frame = Frame(self, role, fn, leaves, spec, weights)
                out = self._call_held(frame, args, kwargs)
                watch.serial = frame.serial
                self._measured[kind] = frame.nbytes
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(watch)
        self._note()
        return out

    def begin(self) -> None:
        """A new sampling run on this ledger, on other modules: forget what was noted of the last one's."""
        self._snapshots.clear()
        self._measured.clear()
        self._measuring.clear()
        self._short = False

    def finish(self) -> None:
        """Raise what ``defer`` put off.

        Raises:
            BudgetError: the budget was too small; names the smallest that works for the run just made.
        """
        if not self._short:
            return
        needed = self._biggest_call + self._holdings.arguments + self._reserve()
        self._measuring.clear()
        self._short = False
        scope = "" if self._defer else " for the calls made so far"
        raise BudgetError(
            f"memory={format_size(self.budget or 0)} is too small for one call and its gradients; the "
            f"smallest budget that works{scope} is {format_size(needed)}. "
            'memory="min" holds as little as possible'
        )

    def _call_held(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        with self.lock:
            self._holdings.tidy()
            frame.serial = self._holdings.open(frame, frame.role)
            self._holdings.add_arguments(frame.serial, frame.tensors, frame.weights.storages)
            if self.plan.mode == "min":
                self._holdings.drop_oldest_until(lambda: False, but=frame.serial)
            if self.plan.mode == "auto" and self.budget is None:
                tensors = [*frame.tensors, *frame.weights.tensors]
                device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
                self.budget = available_bytes(device)
        self.running = frame
        try:
            with torch.autograd.graph.saved_tensors_hooks(frame.pack, frame.unpack):
                out = frame.fn(*args, **kwargs)
        finally:
            self.running = None
            frame.finish()
        self._biggest_call = max(self._biggest_call, frame.nbytes)
        if frame.dropped and self.plan.mode == "bytes":
            self._short = True
            if not self._defer:
                self.finish()
            self._measuring.append(frame)
        return out

    def _call_measured(
        self, fn: Callable[..., _T], args: Any, kwargs: Any, leaves: list[Any], weights: Weights
    ) -> _T:
        # The run will be refused when it has ended; until then only its arguments are still to be counted.
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        watch = _Watch(self, "network", weights)  # only to own the claim
        self._measuring += [watch, *tensors]
        serial = self._holdings.open(watch, "measured")
        self._holdings.add_arguments(serial, tensors, weights.storages)
        with torch.no_grad():
            return fn(*args, **kwargs)

    def saved(self, frame: Frame, key: int, nbytes: int) -> None:
        """A frame's call saved a storage that it had not saved before: count it, and make room for it."""
        self._biggest_tensor = max(self._biggest_tensor, nbytes)
        if frame.dropped:
            return
        with self.lock:
            self._holdings.add_saved(frame.serial, key, nbytes)
            if self.budget is not None and not self._fits():
                self._holdings.tidy()
                self._holdings.drop_oldest_until(self._fits, but=frame.serial)
                if not self._fits():
                    self._holdings.drop(frame.serial)
            self._note_peak(0)

    def before_redo(self, frame: Frame, task: int) -> None:
        """Make room for a call that is about to be redone in a backward pass."""
        self._holdings.tidy()
        # Calls are differentiated from the last to the first: what younger ones have left over is not needed.
        for ref in self._remade.get(task, []):
            other = ref()
            if other is not None and other.serial > frame.serial:
                other.remade.pop(task, None)
        self._remade.setdefault(task, []).append(weakref.ref(frame))
        if self.plan.mode == "min":
            self._holdings.drop_oldest_until(lambda: False, but=frame.serial)
        else:
            self._holdings.drop_oldest_until(lambda: self._fits(frame.nbytes), but=frame.serial)
        self._note_peak(frame.nbytes)

    @contextmanager
    def redoing(self, frame: Frame) -> Iterator[None]:
        """Around the second run of a call: counts and times it."""
        if frame.role == "network":
            self.stats.calls_redone += 1
        elif frame.role == "decoder":
            self.stats.decodes_redone += 1
        start = time.perf_counter()
        with self._entered():
            try:
                yield
            finally:
                self.stats.seconds_redone += time.perf_counter() - start

    def arrived(self, task: int, role: Role, serial: int) -> None:
        """A backward pass has come to a call."""
        with self.lock:
            self.stats.vjps += role == "network"
            self._holdings.reached(serial)
            if task in self._started:
                return
            self._started[task] = time.perf_counter()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._ended(task))

    def _ended(self, task: int) -> None:
        with self.lock:
            self.stats.seconds_backward += time.perf_counter() - self._started.pop(task)
            for ref in self._remade.pop(task, []):
                frame = ref()
                if frame is not None:
                    frame.remade.pop(task, None)

    def _fits(self, more: int = 0) -> bool:
        return self.budget is None or self._holdings.live + more + self._reserve() <= self.budget

    def _reserve(self) -> int:
        return _IN_FLIGHT * self._biggest_tensor + sum(self._trained.values())

    def _note(self) -> None:
        with self.lock:
            self._holdings.tidy()
            self.stats.calls_kept = self._holdings.kept("network")
            self._note_peak(0)

    def _note_peak(self, more: int) -> None:
        self.stats.peak_bytes = max(self.stats.peak_bytes, self._holdings.live + more)

    def _weights(self, modules: Sequence[tuple[str, nn.Module]], owned: bool) -> Weights:
        key = tuple(id(m) for _, m in modules)
        snapshot = self._snapshots.get(key)
        if snapshot is None or not snapshot.unchanged():
            snapshot = self._snapshots[key] = Weights(modules, owned=owned)
            self._trained |= {id(t): t.nbytes for t in snapshot.tensors if t.requires_grad and t.is_leaf}
        return snapshot

    @contextmanager
    def _entered(self) -> Iterator[None]:
        before = getattr(self._inside, "call", False)
        self._inside.call = True
        try:
            yield
        finally:
            self._inside.call = before


def _kind(fn: Callable[..., Any], modules: Sequence[tuple[str, nn.Module]], leaves: list[Any]) -> Any:
    """What calls of equal size have in common: function, networks, the arguments' shapes and flags."""
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    arguments = tuple(
        (x.shape, x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else None for x in leaves
    )
    return (name, tuple(id(m) for _, m in modules), arguments)
