"""Layerwise casting: weights lie in float8, and each layer computes with them in a wider dtype.

diffusers casts a layer's weights in place before its call and back after it. What autograd has saved of them is float8
when the backward pass comes. In a run's shadow networks the wider weights are tensors of the call, which its graph
keeps and which are counted and dropped with it; the weights themselves are not touched.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

__all__ = ["HOOK", "upcasting"]

#: diffusers' name of the hook.
HOOK = "layerwise_casting"


@cache
def upcasting(kind: Any) -> Any:
    """The hook class ``kind``, casting for the length of a call without a trace."""

    def pre_forward(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _put_back(self)  # after a call that raised
        self.exchanged = [
            (table, name, tensor)
            for child in module.modules()
            for table in (child._parameters, child._buffers)
            for name, tensor in table.items()
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != self.compute_dtype
        ]
        for table, name, tensor in self.exchanged:
            table[name] = tensor.to(self.compute_dtype)
        return args, kwargs

    def post_forward(self: Any, module: nn.Module, output: Any) -> Any:
        _put_back(self)
        return output

    methods = {"pre_forward": pre_forward, "post_forward": post_forward}
    return type(kind.__name__, (kind,), methods)


def _put_back(hook: Any) -> None:
    exchanged: list[tuple[dict[str, Tensor | None], str, Tensor]] = hook.exchanged
    for table, name, tensor in exchanged:
        table[name] = tensor
    hook.exchanged = []
