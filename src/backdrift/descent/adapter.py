"""A LoRA of our own on a network for a while, beside those that are on it already."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..weights import adapter_layers

_SWITCHES = ("scaling", "_active_adapter", "_disable_adapters")


@contextmanager
def one_more_adapter(
    component: str, network: Any, name: str, rank: int, targets: Sequence[str]
) -> Iterator[None]:
    """Inside the block ``network`` carries a new adapter of that name too, and the active ones stay active.

    peft makes a new adapter the only active one, freezes everything else, and leaves its wrappers behind: here the
    others are switched on again, and on leaving adapters, flags and layers are as they were.

    Args:
        component: the network's name in its pipeline, for messages.
        targets: ends of the names of the layers that get one.

    Raises:
        UnsupportedError: an adapter is fused into the weights, which hides every other one in its layers.
    """
    from peft import LoraConfig

    before: list[tuple[str, Any]] = adapter_layers([(component, network)])
    for where, layer in before:
        if layer.merged_adapters:
            raise UnsupportedError(
                f"The adapter {layer.merged_adapters[0]!r} is fused into {where}, which would hide a new one: call "
                "pipe.unfuse_lora() first."
            )
    switches = [{k: copy.copy(vars(layer)[k]) for k in _SWITCHES if k in vars(layer)} for _, layer in before]
    flags = [(weight, weight.requires_grad) for weight in network.parameters()]
    known = {id(layer) for _, layer in before}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that is what is wanted
        network.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), adapter_name=name
        )
    try:
        for (_, layer), were in zip(before, switches, strict=True):
            others = [] if were.get("_disable_adapters") else _listed(were.get("_active_adapter"))
            layer._active_adapter = [*others, *([name] if _has(layer, name) else [])]
            layer._disable_adapters = False
        yield
    finally:
        if not before:
            network.unload_lora()  # also takes the layers' wrappers off
        else:
            for _, layer in adapter_layers([(component, network)]):
                vars(layer)["_active_adapter"] = []  # peft warns of deleting an active one
            network.delete_adapters(name)
            _unwrap(network, known)
            for (_, layer), were in zip(before, switches, strict=True):
                vars(layer).update({k: copy.copy(v) for k, v in were.items()})
        for weight, flag in flags:
            weight.requires_grad_(flag)


def _has(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, kind) for kind in layer.adapter_layer_names)


def _listed(active: Any) -> list[str]:
    return [active] if isinstance(active, str) else list(active or ())


def _unwrap(network: nn.Module, known: set[int]) -> None:
    """Take off the wrappers that were not there before."""
    for where, layer in adapter_layers([("", network)]):
        if id(layer) not in known:
            parent, _, leaf = where.rpartition(".")
            setattr(network.get_submodule(parent), leaf, layer.get_base_layer())  # type: ignore[operator]
