"""The memory plan: which network calls keep their activations for the backward pass, which are redone.

A run is a row of expensive calls joined by cheap arithmetic. Every call runs with gradients; its saved
tensors are held on a :class:`Ledger`. When the budget would be passed, the *oldest* call still held is
dropped, so that what stays at the end is the last k calls, the first ones that the backward pass frees again;
the number of calls need not be known. Dropped calls are redone one at a time, when the backward pass reaches
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .budget import MemoryPlan, available_bytes, format_size
from .errors import BudgetError
from .frames import Frame
from .holdings import Holdings
from .passes import Passes, Watch
from .repeats import Repeats
from .residence import Turns
from .shortage import Shortage
from .stats import RunStats
from .weights import Weights

__all__ = ["Ledger", "MemoryPlan"]
# "… part": a slice of a call, with more to come; the last slice stands for the call.
Role = Literal["network", "network part", "decoder", "decoder part", "other"]
_T = TypeVar("_T")

# Bytes beside the saved tensors while a call runs or is differentiated (gradients in flight, temporaries), in
# multiples of the largest saved tensor: a residual block holds the skip's gradient, its branch's incoming and
# outgoing ones and one temporary.
_IN_FLIGHT = 4


@dataclass
class _Networks:
    """The network calls of one run under "min"."""

    calls: int = 0
    largest: int = 0  # bytes saved by one
    gradients: int = 0  # of the trained weights, their own included

    def add(self, nbytes: int, gradients: int) -> None:
        self.calls += 1
        self.largest, self.gradients = max(self.largest, nbytes), gradients

    @property
    def inevitable(self) -> int:
        """Bytes beside the arguments that will be held when the last call but one is differentiated: what it saves,
        and the gradients of its weights that the last one has left (twice: limits are compared with a reserve that
        counts them too)."""
        return self.largest + 2 * self.gradients


class Ledger:
    """Runs calls under a plan and counts what they hold.

    One ledger serves one sampling run (or several whose graphs live at the same time: they share the budget).
    The budget covers what the calls hold for the backward pass, their arguments, and a reserve for gradients
    in flight and for the gradients of trained weights. It does not cover the weights, what the loss holds, or
    tensors that exist anyway.

    Args:
        memory: anything :meth:`MemoryPlan.parse` takes.
        stats: counts are added here; a new :class:`RunStats` by default.
        defer: when the budget is too small for a call, go through the rest of the run without its networks (one
            call of each kind is still made, to measure it) and raise in :meth:`finish`, naming what the whole run
            needs. Otherwise raise at the end of that call.

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
        self._short: Shortage | None = None  # the budget was too small for a call
        self._limit = self.budget  # of the bytes held
        self._biggest_tensor = 0
        self._needed = 0  # the smallest budget for the calls of this run so far
        self._networks = _Networks()
        self._measured: dict[Any, int] = {}
        self._snapshots: dict[tuple[int, ...], Weights] = {}
        self._trained: dict[int, int] = {}  # bytes of the gradients to come, per weight
        self._gradients = 0  # their sum
        self._inside = threading.local()
        self._passes = Passes(self.stats, self._holdings, self.lock)
        self.repeats = Repeats()

    def call(
        self,
        fn: Callable[..., _T],
        *args: Any,
        modules: Sequence[tuple[str, nn.Module]] = (),
        owned: bool = False,
        role: Role = "network",
        check: Callable[[], None] | None = None,
        turns: Turns | None = None,
        **kwargs: Any,
    ) -> _T:
        """Run ``fn(*args, **kwargs)`` as one call of the plan. A call within a call is part of it.

        Args:
            fn: computes the same from the same arguments, weights and random state. Tensors it closes over
                get their gradients too, but are not watched for edits.
            modules: (name, module) of the networks in ``fn``: weights that are not counted, and are compared
                in the backward pass.
            owned: the modules belong to this run alone (see :class:`~backdrift.weights.Weights`).
            role: ``"network"`` or ``"decoder"``: where it is counted; ``"other"`` is not. ``"network part"`` and
                ``"decoder part"``: all but the last part of a call that is made in parts.
            check: called when a backward pass comes to this call, after its weights were compared.
            turns: of weights that ``fn`` has on the device for its own length only (:mod:`~backdrift.residence`).

        Raises:
            BudgetError: the budget is too small for this call; names the smallest that works for it.
            StateChangedError: in the backward pass, if weights, arguments, adapters or flags have changed, or if a
                redone call gives something else (:mod:`~backdrift.repeats`).
        """
        if not torch.is_grad_enabled() or getattr(self._inside, "call", False):
            return fn(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        weights = self._weights(modules, owned)
        watch = Watch(self._passes, role, weights, check)
        kind = _kind(fn, modules, leaves)
        with self._entered():
            if self._short is not None and kind in self._measured:
                self._count_arguments(self._short, leaves, weights)
                self._need(self._measured[kind])
                return self._short.output(kind, lambda: fn(*args, **kwargs))
            self.stats.calls_forward += role == "network"
            self.stats.decodes += role == "decoder"
            if self.plan.mode == "max" and kind in self._measured and turns is None:
                out = fn(*args, **kwargs)
                watch.serial = self._holdings.open(watch, role, self._measured[kind])
            else:
                frame = Frame(self, role, fn, leaves, spec, weights, turns)
                out = self._call_held(frame, args, kwargs)
                watch.serial = frame.serial
                self._measured[kind] = frame.nbytes
                if self._short is not None:
                    self._short.add(kind, frame, out)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(watch)
        self._note()
        return out

    def follow(self, plan: MemoryPlan) -> None:
        """Another plan, for the calls from here on."""
        if plan != self.plan:
            self.plan = plan
            self.budget = self._limit = plan.budget

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around one sampling run: :meth:`begin` and :meth:`finish`.

        Raises:
            BudgetError: from :meth:`finish`; also where the caller stumbles over what stands in for its networks
                after a shortage.
        """
        self.begin()
        try:
            yield
        except Exception as error:
            try:
                self.finish()
            except BudgetError as refusal:
                raise refusal from error
            raise
        self.finish()

    def begin(self) -> None:
        """A new sampling run on this ledger, on other modules: forget what was noted of the last one's."""
        self._snapshots.clear()
        self._measured.clear()
        self._networks = _Networks()
        self._short, self._needed = None, 0

    def finish(self) -> None:
        """Raise what ``defer`` put off.

        Raises:
            BudgetError: the budget was too small; names the smallest that works for the run just made.
        """
        if self._short is None:
            return
        self._short = None
        scope = "" if self._defer else " for the calls made so far"
        raise BudgetError(
            f"memory={format_size(self.budget or 0)} is too small for one call and its gradients; the "
            f"smallest budget that works{scope} is {format_size(self._needed)}. "
            'memory="min" holds as little as possible'
        )

    def _call_held(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        with self.lock:
            self._holdings.tidy()
            frame.serial = self._holdings.open(frame, frame.role)
            self._holdings.add_arguments(frame.serial, frame.tensors, frame.weights.storages)
            if self.plan.mode == "auto" and self.budget is None:
                tensors = [*frame.tensors, *frame.weights.tensors]
                device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
                self.budget = self._limit = available_bytes(device)
            if self.plan.mode == "keep":
                self._keep_the_last(frame)
            if self.plan.mode == "min":
                if frame.role == "decoder" and self._networks.calls > 1:
                    # Where it fits in what must be held later anyway, the last network call is not redone.
                    self._limit = self._holdings.arguments + self._networks.inevitable
                    self._holdings.drop_oldest_until(self._fits, but=frame.serial)
                else:
                    self._holdings.drop_oldest_until(lambda: False, but=frame.serial)
                    self._limit = None
        self.running = frame
        try:
            with torch.autograd.graph.saved_tensors_hooks(frame.pack, frame.unpack):
                out = frame.fn(*args, **kwargs)
            frame.returned(out)
        finally:
            self.running = None
            frame.finish()
        self._need(frame.nbytes)
        if frame.role == "network":
            self._networks.add(frame.nbytes, self._gradients)
        if frame.dropped and self.plan.mode == "bytes" and self._short is None:
            self._short = Shortage()
            if not self._defer:
                self.finish()
        return out

    def _keep_the_last(self, frame: Frame) -> None:
        """Drop all but the last network calls, the running one among them, and a decoder's earlier parts."""
        others = self.plan.keep - frame.role.startswith("network")
        if self.plan.keep == 0:
            self._holdings.drop_oldest_until(lambda: False, but=frame.serial)
        else:
            self._holdings.drop_oldest_until(
                lambda: self._holdings.kept("network", but=frame.serial) <= others, but=frame.serial
            )
        if frame.role.startswith("decoder"):
            self._holdings.drop_role("decoder part", but=frame.serial)
        if self.plan.park:
            self._holdings.park(but=frame.serial)

    def _count_arguments(self, short: Shortage, leaves: list[Any], weights: Weights) -> None:
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        watch = Watch(self._passes, "network", weights)  # only to own the claim
        short.hold(watch, *tensors)
        self._holdings.add_arguments(self._holdings.open(watch, "measured"), tensors, weights.storages)

    def _need(self, nbytes: int) -> None:
        """A call that saves so many bytes, beside what cannot be dropped by then."""
        self._needed = max(self._needed, self._holdings.arguments + nbytes + self._reserve())

    def saved(self, frame: Frame, key: int, nbytes: int) -> None:
        """A frame's call saved a storage that it had not saved before: count it, and make room for it."""
        self._biggest_tensor = max(self._biggest_tensor, nbytes)
        if frame.dropped:
            return
        with self.lock:
            self._holdings.add_saved(frame.serial, key, nbytes)
            if not self._fits():
                self._holdings.tidy()
                self._holdings.drop_oldest_until(self._fits, but=frame.serial)
                if not self._fits():
                    self._too_small(frame)
            self._note_peak(0)

    def before_redo(self, frame: Frame, task: int) -> None:
        """Make room for a call that is about to be redone in a backward pass."""
        self._holdings.tidy()
        self._passes.comes_to_redo(frame, task)
        if self.plan.mode == "min":
            self._holdings.drop_oldest_until(lambda: False, but=frame.serial)
        elif self.plan.mode == "keep":
            self._keep_the_last(frame)
        else:
            self._holdings.drop_oldest_until(lambda: self._fits(frame.nbytes), but=frame.serial)
        self._note_peak(frame.nbytes)

    @contextmanager
    def redoing(self, frame: Frame) -> Iterator[None]:
        """Around the second run of a call."""
        with self._entered(), self._passes.redoing(frame.role):
            yield

    def _fits(self, more: int = 0) -> bool:
        return self._limit is None or self._holdings.live + more + self._reserve() <= self._limit

    def _too_small(self, frame: Frame) -> None:
        """All older calls have been dropped, and the running one alone does not fit."""
        if self.plan.mode == "min":  # it is held whatever it takes
            self._limit = None
        else:
            self._holdings.drop(frame.serial)

    def _reserve(self) -> int:
        return _IN_FLIGHT * self._biggest_tensor + self._gradients

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
            self._gradients = sum(self._trained.values())
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
