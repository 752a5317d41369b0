"""Counts the bytes of live tensors, storage by storage, and remembers the peak.

Unlike a count of what the allocator gave out, it leaves out the scratch memory inside single kernels, which is a
large share only for networks as tiny as the tests'.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Inside the block, ``live`` is what tensors made there hold now, and ``peak`` the most they held.

    A result that shares an argument's storage is no new tensor, so what existed before is never counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._watched:
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
