"""Frozen copies of a pipeline's networks, for calls beside the pipeline's own.

A copy lies on the same weights. Of an offloaded pipeline's networks the weights are brought for each call of a copy, in
the grain that the pipeline has them in, and again for each operation of a backward pass
(:mod:`~backdrift.residence`); the pipeline's hooks are neither asked nor changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .forwards import own_forwards
from .offloaded import Offloading
from .shadow import shadow, unwrapped
from .states import own_casts

__all__ = ["Frozen"]

Prepare = Callable[[nn.Module], nn.Module]


class Frozen:
    """The frozen copies of one pipeline's networks.

    Args:
        pipe: the user's pipeline.
        offloading: whose device and phases they share; its own if None.
    """

    def __init__(self, pipe: Any, offloading: Offloading | None = None) -> None:
        self.offloading = Offloading(pipe) if offloading is None else offloading
        self._made: dict[str, tuple[list[int], nn.Module]] = {}
        self._instead: dict[str, nn.Module] = {}

    def make_of(self, name: str, module: nn.Module) -> None:
        """From here on copies of the component ``name`` are made of ``module``, a shadow of the user's."""
        self._instead[name] = module

    def of(self, name: str, module: nn.Module, prepare: Prepare = lambda ours: ours) -> nn.Module:
        """The copy of a network; the present one while the network's weights are where they were.

        Args:
            name: the component's.
            module: the pipeline's network, as it holds it.
            prepare: what is made of a new copy before its weights come and go.
        """
        own = self._instead.get(name, unwrapped(module))
        # Hooks that move weights to the device and back may leave them at another place, and a copy would keep the old
        # one.
        places = [_place(weight) for weight in own.parameters()] if self.comes_and_goes(name) else []
        known = self._made.get(name)
        if known is not None:
            if known[0] == places:
                return known[1]
            self.offloading.forget(known[1])
        ours = shadow(own, set())
        own_forwards(own, ours)
        own_casts(own, ours)
        ours = self.offloading.dressed(name, prepare(ours))
        self._made[name] = places, ours
        return ours

    def comes_and_goes(self, name: str) -> bool:
        """Whether a component's weights are on the device for its calls only."""
        return self.offloading.moves(name)

    def forget(self) -> None:
        """Make all anew from here on: the networks may have other weights or adapters."""
        for _, ours in self._made.values():
            self.offloading.forget(ours)
        self._made = {}


def _place(weight: Tensor) -> int:
    return (
        weight.data_ptr() if type(weight.data) is Tensor else 0
    )  # quantised ones have none; they are refused
