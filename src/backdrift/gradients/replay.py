"""The autograd machinery of a redone call: constant memory per call, and plain autograd's order of additions.

A call is one node of the outer graph. It keeps its input and nothing else; its backward runs the network again
with a graph of its own and differentiates that. The tensors that many calls share (weights, conditioning) do not
pass through the calls. Their gradients are a running sum on the :class:`Chain`, and a token threads the calls
on one string, so that the node at the string's head hands the sums over when the last call has added to them.

Within a redone call the running sum enters through :class:`_Pour` as the first contribution to each shared
tensor's gradient. So the additions happen in plain autograd's order, hence the same bits, and the engine, which
adds in place to a gradient nobody else holds, needs no second copy of the weights' gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..errors import UnsupportedError
from ..repeats import Glimpse
from ..stats import RunStats

Sums = list[Tensor | None]


@dataclass
class Trace:
    """A network call with its graph: ``out``, computed from the leaf ``x``, the shared tensors' ``leaves``, and the
    leaf ``t`` where a gradient by the time is wanted; and what was ``seen`` of the network's own output."""

    out: Tensor
    x: Tensor
    leaves: list[Tensor]
    t: Tensor | None = None
    seen: Glimpse | None = None


class NetworkCall(Protocol):
    """One call that can be made again."""

    kept: Trace | None

    def first(self, x: Tensor) -> Tensor:
        """The call's output; fills ``kept`` where its graph is to be held."""

    def check(self) -> None:
        """See that what the call used is as it was.

        Raises:
            StateChangedError: it is not.
        """

    def again(self, x: Tensor) -> Trace:
        """The same call with a graph."""


class Chain:
    """What the calls of one run share: the shared tensors' places in the outer graph and their running sums.

    Args:
        shared: tensors that require grad and may be used by any call.
        stats: counts of backward passes are added here.
    """

    def __init__(self, shared: Sequence[Tensor], stats: RunStats) -> None:
        # A view each, so that the engine can be asked whether its gradient is wanted.
        views = [tensor.view_as(tensor) for tensor in shared]
        self.nodes: list[Node] = [view.grad_fn for view in views]  # type: ignore[misc]
        self.stats = stats
        self._sums: dict[int, Sums] = {}
        self._wanted: dict[int, list[int]] = {}
        self._started: dict[int, float] = {}
        self._views: list[Tensor] | None = views

    def head(self) -> Tensor | None:
        """The token at the string's head; None if nothing is shared."""
        views, self._views = self._views, None
        return _Head.apply(self, *views) if views else None

    def wanted(self, task: int) -> list[int]:
        """Which of the shared tensors this backward pass asks for. To be called inside it."""
        if task not in self._wanted:
            self._wanted[task] = [
                i for i, node in enumerate(self.nodes) if torch._C._will_engine_execute_node(node)
            ]
            self._started[task] = time.perf_counter()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._ended(task))
        return self._wanted[task]

    def take(self, task: int) -> Sums | None:
        return self._sums.pop(task, None)

    def put(self, task: int, sums: Sums) -> None:
        self._sums[task] = sums

    def hand_over(self, task: int) -> Sums:
        """The finished sums, one per shared tensor, None where nothing was asked or nothing arrived."""
        sums: Sums = [None] * len(self.nodes)
        for i, value in zip(self.wanted(task), self._sums.pop(task, []), strict=False):
            sums[i] = value
        return sums

    def _ended(self, task: int) -> None:
        self._sums.pop(task, None)
        self._wanted.pop(task, None)
        self.stats.seconds_backward += time.perf_counter() - self._started.pop(task)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *views: Tensor) -> Tensor:
        ctx.chain = chain
        return views[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.chain.hand_over(torch._C._current_graph_task_id())


class _Pour(torch.autograd.Function):
    """Gives its inputs the gradients in ``sums``, and lets go of them."""

    @staticmethod
    def forward(ctx: Any, sums: Sums, *leaves: Tensor) -> Tensor:
        ctx.sums = sums
        return leaves[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        poured = (None, *ctx.sums)
        # The engine adds in place only to what nobody else holds.
        ctx.sums.clear()
        return poured


class Replay(torch.autograd.Function):
    """``Replay.apply(chain, call, x, token, t)`` -> (output, next token). With no token there is only the output.

    ``t`` is the call's time where it carries a graph, else None.
    """

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, call: NetworkCall, x: Tensor, token: Tensor | None, t: Tensor | None
    ) -> Any:
        ctx.chain, ctx.call = chain, call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        out = call.first(x)
        return out if token is None else (out, token.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "Exact gives first derivatives only; this backward pass asked for more (create_graph=True): "
                "use gradient=Plain()"
            )
        chain: Chain = ctx.chain
        (x,) = ctx.saved_tensors
        task = torch._C._current_graph_task_id()
        wanted = chain.wanted(task)
        sums = chain.take(task)
        on_out = grads[0]
        if on_out is None:
            if sums is not None:
                chain.put(task, sums)
            return None, None, None, None, None
        on_x, on_t, sums = _differentiate(
            chain, ctx.call, x, on_out, wanted, sums, ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        )
        chain.put(task, sums)
        return None, None, on_x, None, on_t


def _differentiate(
    chain: Chain,
    call: NetworkCall,
    x: Tensor,
    on_out: Tensor,
    wanted: list[int],
    sums: Sums | None,
    need_x: bool,
    need_t: bool,
) -> tuple[Tensor | None, Tensor | None, Sums]:
    """The vector–Jacobian product of one call by x and t; that by the shared tensors is added to the running sums."""
    if not need_x and not wanted and not need_t:
        return None, None, []
    call.check()
    trace, call.kept = call.kept, None
    if trace is None:
        start = time.perf_counter()
        trace = call.again(x)
        chain.stats.calls_redone += 1
        chain.stats.seconds_redone += time.perf_counter() - start
    if not trace.out.requires_grad:
        return None, None, sums if sums is not None else [None] * len(wanted)
    leaves = [trace.leaves[i] for i in wanted]
    outputs, grads = [trace.out], [on_out]
    if sums is not None and leaves:
        with torch.enable_grad():
            outputs.append(_Pour.apply(sums, *leaves))
        grads.append(torch.zeros_like(outputs[1]))
    own = ([trace.x] if need_x else []) + ([trace.t] if need_t and trace.t is not None else [])
    inputs = [*own, *leaves]
    chain.stats.vjps += 1
    with _without_hooks(leaves):
        # A gradient that is a view (a linear layer's is a transpose) shares its storage with its base and would
        # not be added to in place; ``.data`` is the same memory without the base.
        found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
        # Sums are dense, also where an embedding's gradient is sparse.
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found]
        result: Sums = [g.data if g is not None and g._base is not None else g for g in dense]
    rest = result[len(own) :]
    return (result[0] if need_x else None), (result[len(own) - 1] if need_t else None), rest


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    # A user's hook on a weight belongs to the finished gradient and runs when that reaches the weight; here it
    # would see, and could change, each running sum.
    hooked = [(leaf, leaf._backward_hooks) for leaf in leaves if leaf._backward_hooks]
    for leaf, _ in hooked:
        leaf._backward_hooks = None
    try:
        yield
    finally:
        for leaf, hooks in hooked:
            leaf._backward_hooks = hooks


Measure = Callable[[], int]


@contextmanager
def measuring(known: frozenset[int], found: dict[int, int]) -> Iterator[None]:
    """Inside the block, note the storages that autograd saves: their bytes in ``found``, but for those in ``known``."""

    def pack(tensor: Tensor) -> Tensor:
        # Saving the tensor itself would tie an output to the node that made it: a cycle that is never freed.
        plain = tensor.detach()
        storage = plain.untyped_storage()
        if storage._cdata not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return plain

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
