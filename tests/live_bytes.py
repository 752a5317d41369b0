"""Counts the bytes of live tensors on the CPU, storage by storage, and remembers the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the block, ``live`` is what tensors made there hold now and ``peak`` the most they held.

    ``existing`` names what was there before: weights and inputs, whose views must not count as new.
    """

    def __init__(self, existing: Iterable[torch.Tensor | nn.Module] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        for thing in existing:
            for tensor in [thing] if isinstance(thing, torch.Tensor) else [*thing.parameters(), *thing.buffers()]:
                self._remember(tensor.untyped_storage(), 0)

    def _remember(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = storage._cdata

        def freed(_: Any) -> None:
            self.live -= nbytes
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._remember(storage, storage.nbytes())
        return out
