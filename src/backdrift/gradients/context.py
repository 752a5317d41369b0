"""The network as the calls of one run see it: what they share, what they reach, and whether that is as it was."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .. import nests
from ..ambient import Ambient
from ..conditioning import Branch, moves
from ..denoiser import Denoiser
from ..errors import MissingGradientError, StateChangedError
from ..repeats import Glimpse, Repeats
from ..scalars import Scalar
from ..versions import version_of
from ..weights import Weights
from .reach import describe, modules_of, reach
from .replay import Trace

_REMEDY = 'use gradient=Plain() or Exact(memory="max"), which redo nothing'


class NetworkContext:
    """What a redone call needs to know of its run. Holds no node of the run's graph, so nothing is tied in a cycle."""

    def __init__(self, model: Denoiser, cond: Any, batch: int) -> None:
        self.model, self.conditions = model, model.conditions(cond, batch)
        conds = {id(t): t for branch in self.conditions.all() for t in nests.tensors(branch.cond)}
        self.conds = list(conds.values())
        self.cond_versions = [version_of(t) for t in self.conds]
        self.trained_conds = [t for t in self.conds if t.requires_grad]
        self.modules = modules_of(model.network)
        self.weights = Weights(self.modules)
        trained = [p for _, m in self.modules for p in m.parameters() if p.requires_grad]
        self.leaves: list[Tensor] = list({id(t): t for t in trained}.values())
        self.loose: list[tuple[Tensor, int]] = []  # leaves the network uses that are in none of its modules
        self.thread = threading.get_ident()
        # Where the names of tensors are looked for.
        self.holders = [model.network, *(c for c in (model.uncond, cond) if moves(c))]
        self._repeats = Repeats()

    @property
    def shared(self) -> list[Tensor]:
        return self.trained_conds + self.leaves

    def snapshot(self) -> Weights:
        if not self.weights.unchanged():
            self.weights = Weights(self.modules)
        return self.weights

    def run(self, x: Tensor, branch: Branch, t: Scalar) -> tuple[Tensor, Glimpse | None]:
        """The network call, and what is seen of the network's own output."""
        seen: list[Glimpse | None] = []
        out = self.model.run(x, t, replace(branch, witness=lambda rows: seen.append(Glimpse.of(rows))))
        return out, seen[-1] if seen else None

    def check_repeats(
        self,
        first: Glimpse | None,
        again: Glimpse | None,
        ambient: Ambient,
        states: tuple[Glimpse, Glimpse] | None = None,
    ) -> None:
        """Raise if a redone call's output is another one; on an accelerator, when the backward pass ends.

        Args:
            first, again: what was seen of the two.
            ambient: the first one's.
            states: what was seen of the states that they were given, where these may be different ones.
        """
        if first is None:
            return
        network = self.model.network
        name = getattr(network, "__name__", type(network).__name__)
        spacing = ambient.spacing(self.weights.dtypes | first.dtypes)
        self._repeats.compare(first, again, spacing, f"a call of {name}", _REMEDY, states=states)

    def trace(self, x: Tensor, branch: Branch, t: Scalar) -> Trace:
        """The network call with a graph of its own: leaves in place of x, the conditioning, and a tensor ``t``."""
        stand_ins = {id(c): c.detach().requires_grad_() for c in self.trained_conds}
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(x.requires_grad)
            cond = nests.transform(lambda c: stand_ins.get(id(c), c), branch.cond)
            time = t.detach().requires_grad_() if isinstance(t, Tensor) else None
            out, seen = self.run(leaf, replace(branch, cond=cond), t if time is None else time)
        return Trace(out, leaf, [*stand_ins.values(), *self.leaves], time, seen)

    def adopt(self, trace: Trace, floor: int) -> None:
        """See to it that nothing the first call reaches is left without a gradient.

        Raises:
            MissingGradientError: the network uses a tensor that was computed with gradients outside of it, or
                returns an output that was cut off from the graph.
        """
        if not trace.out.requires_grad and (trace.x.requires_grad or self.shared):
            raise MissingGradientError(
                "the network's output has no graph although its input, conditioning or weights require grad: it runs "
                "under no_grad or detaches. Take that out of the network, or sample under torch.no_grad()"
            )
        found, outside = reach(trace.out, floor)
        if outside:
            raise MissingGradientError(
                f"the network uses {describe(self.holders, outside[0])} which would get no gradient: hand it in "
                "through cond, detach it, or use gradient=Plain()"
            )
        known = {id(trace.x), id(trace.t), *map(id, trace.leaves)}
        fresh = [leaf for leaf in found if id(leaf) not in known]
        self.leaves += fresh
        trace.leaves += fresh
        self.loose = [(leaf, version_of(leaf)) for leaf in fresh]

    def check_reach(self, trace: Trace, floor: int) -> None:
        """Raise if a redone call uses a tensor that requires grad and that the first call did not use."""
        here = floor if threading.get_ident() == self.thread else None
        found, outside = reach(trace.out, here)
        known = {id(trace.x), id(trace.t), *map(id, trace.leaves)}
        missed: list[Tensor | Node] = [*outside, *(leaf for leaf in found if id(leaf) not in known)]
        if missed:
            raise MissingGradientError(
                f"the network uses {describe(self.holders, missed[0])} which it did not use in the run's first "
                "call, so it would get no gradient: hand it in through cond, detach it, or use gradient=Plain()"
            )

    def check_unchanged(self, weights: Weights) -> None:
        """Raise if a redone call would see other tensors, flags, modes or adapters than the first one."""
        weights.check()
        modes = [holder.training for holder in weights.holders]
        # All at once to begin with: this is asked in every call.
        changed = [] if modes == weights.training else zip(weights.holders, weights.training, strict=True)
        for holder, mode in changed:
            if holder.training != mode:
                names = (n for _, m in self.modules for n, child in m.named_modules() if child is holder)
                where = next(names, "") or type(holder).__name__
                raise StateChangedError(
                    f"module {where!r} was in {'train' if mode else 'eval'} mode in the forward pass and is in "
                    f"{'train' if holder.training else 'eval'} mode now: change modes after backward()"
                )
        watched = [*zip(self.conds, self.cond_versions, strict=True), *self.loose]
        for i, (tensor, version) in enumerate(watched):
            if version_of(tensor) != version:
                name = f"cond tensor {i}" if i < len(self.conds) else describe(self.holders, tensor)
                raise StateChangedError(
                    f"{name} of shape {tuple(tensor.shape)} was modified in place between the forward and the backward "
                    "pass: run the sampling call again, or call backward() before the change"
                )
