"""Backward passes over a ledger's calls: what they have come to, how long they took, what redone calls left over."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .holdings import Holdings
from .stats import RunStats
from .weights import Weights

if TYPE_CHECKING:
    from .frames import Frame


class Passes:
    """The backward passes that are under way, by autograd's graph task.

    Args:
        stats: counts and seconds are added here.
        holdings: told which calls have been reached.
        lock: around all of it; passes run in autograd's own threads.
    """

    def __init__(self, stats: RunStats, holdings: Holdings, lock: threading.RLock) -> None:
        self._stats, self._holdings, self._lock = stats, holdings, lock
        self._started: dict[int, float] = {}
        self._remade: dict[int, list[weakref.ref[Frame]]] = {}

    def arrived(self, task: int, role: str, serial: int) -> None:
        """A pass has come to a call."""
        with self._lock:
            self._stats.vjps += role == "network"
            self._holdings.reached(serial)
            if task in self._started:
                return
            self._started[task] = time.perf_counter()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._ended(task))

    def comes_to_redo(self, frame: Frame, task: int) -> None:
        """Let go of what redone younger calls have left over: calls are differentiated from the last to the first."""
        for ref in self._remade.get(task, []):
            other = ref()
            if other is not None and other.serial > frame.serial:
                other.remade.pop(task, None)
        self._remade.setdefault(task, []).append(weakref.ref(frame))

    @contextmanager
    def redoing(self, role: str) -> Iterator[None]:
        """Around the second run of a call: counts and times it."""
        self._stats.calls_redone += role == "network"
        self._stats.decodes_redone += role == "decoder"
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stats.seconds_redone += time.perf_counter() - start

    def _ended(self, task: int) -> None:
        with self._lock:
            self._stats.seconds_backward += time.perf_counter() - self._started.pop(task)
            for ref in self._remade.pop(task, []):
                frame = ref()
                if frame is not None:
                    frame.remade.pop(task, None)


class Watch:
    """A hook on a call's outputs: notices a backward pass arriving, and checks that the weights are as they were."""

    def __init__(
        self, passes: Passes, role: str, weights: Weights, check: Callable[[], None] | None = None
    ) -> None:
        self.passes, self.role, self.weights, self.check = passes, role, weights, check
        self.serial = -1
        self.seen: set[int] = set()

    def __call__(self, grad: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self.seen:
            self.seen.add(task)
            self.weights.check()
            if self.check is not None:
                self.check()
            self.passes.arrived(task, self.role, self.serial)
