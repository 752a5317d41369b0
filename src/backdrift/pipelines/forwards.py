"""Networks and attention processors whose own code cuts the graph, found before a pipeline samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from .refusals import reached
from .shadow import networks
from .twins import is_no_grad, names

_CUTS = ("detach", "no_grad", "inference_mode")
# Of positions and tables only, or steps that are taken once, before anything is sampled.
_HARMLESS = {"fuse_projections", "pos_embed", "get_processor", "set_processor"}


def check_networks(pipe: Any) -> None:
    """Refuse a pipeline one of whose attention processors cuts the graph.

    Raises:
        UnsupportedError: naming the layer, the processor's class and what it does.
    """
    for key, module in networks(pipe).items():
        _check_processors(key, module)


def _check_processors(key: str, module: nn.Module) -> None:
    for name, child in module.named_modules():
        processor: Any = child.__dict__.get("processor", child._modules.get("processor"))
        if processor is None:
            continue
        cls: Any = type(processor)
        for where, cut in _cuts(cls):
            raise UnsupportedError(
                f"{key}.{name} has the attention processor {cls.__name__}, whose {where} uses {cut}: its gradient "
                f"would leave that part out. pipe.{key}.set_default_attn_processor(), or another processor"
            )


@cache
def _cuts(cls: Any) -> tuple[tuple[str, str], ...]:
    start = "forward" if isinstance(cls, type) and issubclass(cls, nn.Module) else "__call__"
    return tuple(_found(cls, start))


def _found(cls: Any, start: str) -> Iterator[tuple[str, str]]:
    first = getattr(cls, start, None)
    if not isinstance(first, FunctionType):
        return
    if is_no_grad(first):
        yield start, "no_grad"
    for where, code in reached(cls, start):
        if where not in _HARMLESS:
            used = set(names(code))
            yield from ((where, cut) for cut in _CUTS if cut in used)
