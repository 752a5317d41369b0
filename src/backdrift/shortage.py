"""A budget that a call did not fit: the rest of the run is gone through without its networks, to see what it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Shortage:
    """Stands in for the networks of a run that will be refused.

    The first call of each kind is made, and measured. Later ones return what the first one returned: the run is
    to end early, and the refusal is to name a budget that is enough for all of it.
    """

    def __init__(self) -> None:
        self._outputs: dict[Any, Any] = {}
        self._held: list[Any] = []

    def hold(self, *things: Any) -> None:
        """Keep what a run with a larger budget would hold, so that its bytes stay counted."""
        self._held += things

    def add(self, kind: Any, call: Any, out: Any) -> None:
        """Remember what the first call of a kind returned."""
        self.hold(call)
        self._outputs[kind] = pytree.tree_map(_detached, out)

    def output(self, kind: Any, make: Callable[[], Any]) -> Any:
        """What a call of that kind returns; made once if its first call came before the shortage."""
        if kind not in self._outputs:
            with torch.no_grad():
                self._outputs[kind] = pytree.tree_map(_detached, make())
        return pytree.tree_map(_copied, self._outputs[kind])


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
