"""Most bytes of tensors alive at once while something runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..accelerators import counts_bytes, module_of, wait

T = TypeVar("T")


class Meter:
    """Measures pieces of work that follow each other, beyond what was there before the first.

    On a GPU the figures are its allocator's own. On a CPU every new tensor's storage is counted from its making to its
    end, which slows the work down; scratch memory inside single kernels is left out. (The process's resident size
    would count what the system's allocator holds in reserve.) Other devices do not tell.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._storages, self._before = device, LiveStorages(), 0
        self._module = module_of(device) if counts_bytes(device) else None
        if self._module is not None:
            gc.collect()
            self._before = self._module.memory_allocated(device)

    def peak(self, work: Callable[[], T]) -> tuple[T, int | None]:
        """The work's result, and the most bytes alive at once during it; None where that is not known."""
        if self._module is not None:
            wait(self.device)
            self._module.reset_peak_memory_stats(self.device)
            found = work()
            wait(self.device)
            return found, self._module.max_memory_allocated(self.device) - self._before
        if self.device.type != "cpu":
            return work(), None
        self._storages.peak = self._storages.live
        with self._storages:
            found = work()
        return found, self._storages.peak


class LiveStorages(TorchDispatchMode):
    """Inside the block, ``live`` is what tensors made there hold, and ``peak`` the most they held.

    A result that shares an argument's storage is no new tensor, so what existed before is never counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._watched:
                continue
            if given is None:
                leaves = tree_leaves((args, kwargs))
                given = {t.untyped_storage()._cdata for t in leaves if isinstance(t, torch.Tensor)}
            if storage._cdata not in given:
                self._watch(storage)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= nbytes
            self._watched.pop(key, None)

        self._watched[key] = weakref.ref(storage, freed)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
