"""Networks inside ``DistributedDataParallel``: a whole call of the pipeline is one forward pass to it.

A run calls the network inside the wrapper, many times. The wrapper is told of it once, after the call, so each
weight's gradient is averaged over the processes once, when the backward pass has added up all calls' parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import UnsupportedError


def check_parallel(pipe: Any, trained: Mapping[str, Tensor]) -> None:
    """Refuse wrappers that a run cannot follow.

    Raises:
        UnsupportedError: ``DataParallel``, sharded weights, a static graph, or a wrapper some of whose weights are
            trained while it waits for all of them.
    """
    for key, module in vars(pipe).items():
        if isinstance(module, DataParallel):
            raise UnsupportedError(
                f"{key} is in DataParallel, which copies it for every call: pipe.{key} = pipe.{key}.module, or "
                "DistributedDataParallel with a process per device"
            )
        if isinstance(module, nn.Module) and any(
            "FSDP" in c.__name__ for m in module.modules() for c in type(m).__mro__
        ):
            raise UnsupportedError(
                f"the weights of {key} are sharded (FSDP), and are whole only inside its own calls: use "
                "DistributedDataParallel, or train an adapter on a whole network"
            )
    ids = {id(weight) for weight in trained.values()}
    for key, wrapper in _wrappers(pipe).items():
        waited = {name: p for name, p in wrapper.module.named_parameters() if p.requires_grad}
        missing = [name for name, p in waited.items() if id(p) not in ids]
        if len(missing) == len(waited):
            continue
        if wrapper.static_graph:
            raise UnsupportedError(
                f"{key} is in DistributedDataParallel(static_graph=True), which looks at its own calls: leave that out"
            )
        if missing and not wrapper.find_unused_parameters:
            raise UnsupportedError(
                f"{key} is in DistributedDataParallel, which waits for the gradients of all its weights, but train "
                f"leaves out {missing[0]} and others: freeze those before it is wrapped, or pass "
                "find_unused_parameters=True"
            )


def before_call(pipe: Any, trained: Mapping[str, Tensor]) -> None:
    """Tell the wrappers of trained networks that a forward pass begins."""
    for wrapper in _training(pipe, trained):
        wrapper._pre_forward()


def after_call(pipe: Any, trained: Mapping[str, Tensor], result: Tensor | None) -> None:
    """Tell the wrappers of trained networks that a backward pass is to come, unless they are under ``no_sync``."""
    for wrapper in _training(pipe, trained):
        wrapper.require_forward_param_sync = wrapper.require_backward_grad_sync
        if wrapper.require_backward_grad_sync and result is not None:
            wrapper.reducer.prepare_for_backward([result] if wrapper.find_unused_parameters else [])
        wrapper._clear_grad_buffer()


def _training(pipe: Any, trained: Mapping[str, Tensor]) -> list[Any]:
    if not torch.is_grad_enabled():
        return []
    ids = {id(weight) for weight in trained.values()}
    return [w for w in _wrappers(pipe).values() if any(id(p) in ids for p in w.module.parameters())]


def _wrappers(pipe: Any) -> dict[str, Any]:
    found = {key: getattr(value, "_orig_mod", value) for key, value in vars(pipe).items()}
    return {key: value for key, value in found.items() if isinstance(value, DistributedDataParallel)}
