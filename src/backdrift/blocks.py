"""Checkpointing inside one network call: a block gives up what autograd saved of it and is redone alone.

A dropped call comes back whole when the backward pass reaches it: all of its activations at once. With *units*
installed in the network, each block keeps only its inputs, and those are saved through whatever hooks are around
the call, so that a dropped call drops them too. The graph is the one that plain autograd builds, node by node; the
gradient is the same to the last bit wherever the operations repeat themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .ambient import Ambient
from .errors import InputError, StateChangedError
from .repeats import Glimpse, Repeats, differs
from .residence import Place, Residence
from .weights import Weights

Level = Literal["whole", "block", "resnet"]
LEVELS: tuple[Level, ...] = get_args(Level)


def units(module: nn.Module, level: Level) -> list[tuple[str, nn.Module]]:
    """The parts of a network that are redone one at a time, by name.

    Args:
        module: a network, or a decoder.
        level: ``"whole"``: none. ``"block"``: the members of its outermost lists of blocks (``down_blocks[0]``,
            ``transformer_blocks[3]``) and its middle block. ``"resnet"``: the innermost such members (single
            residual networks, attentions and transformer blocks).

    Raises:
        InputError: another level.
    """
    if level not in LEVELS:
        raise InputError(f"level={level!r} is not one of {', '.join(map(repr, LEVELS))}")
    if level == "whole":
        return []
    outer = list(_members(module))
    return outer if level == "block" else [unit for name, block in outer for unit in _innermost(name, block)]


def install(module: nn.Module, level: Level, residence: Residence | None = None) -> int:
    """Make the units of a network that belongs to the run (a shadow) redo themselves; how many there are.

    Args:
        residence: of a network whose weights are on the device for its calls only.
    """
    group = _Group(residence, type(module).__name__)
    found = units(module, level)
    for name, unit in found:
        wrap(name, unit, group)
    return len(found)


@contextmanager
def installed(module: nn.Module, level: Level, residence: Residence | None = None) -> Iterator[None]:
    """The same inside the block only."""
    found = units(module, level)
    install(module, level, residence)
    try:
        yield
    finally:
        for _, unit in found:
            unwrap(unit)


def wrap(
    name: str, module: nn.Module, group: _Group | None = None, residence: Residence | None = None
) -> None:
    """Make one module of the run's own a unit."""
    module.forward = _Unit(name, module, module.forward, group or _Group(residence))


def unwrap(module: nn.Module) -> None:
    """Make a unit an ordinary module again."""
    unit: Any = module.forward
    module.forward = unit.forward


def _members(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        dotted = f"{prefix}.{name}" if prefix else name
        if hasattr(child, "merged_adapters"):
            continue
        if isinstance(child, nn.ModuleList):
            for i, member in enumerate(child):
                if _composite(member) and not _edits_inputs(member):
                    yield f"{dotted}.{i}", member
                else:
                    yield from _members(member, f"{dotted}.{i}")
        elif name in ("mid_block", "middle_block") and _composite(child):
            yield dotted, child
        else:
            yield from _members(child, dotted)


def _innermost(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inner = list(_members(module, name))
    if not inner:
        yield name, module
    for dotted, child in inner:
        yield from _innermost(dotted, child)


def _composite(module: nn.Module) -> bool:
    """Whether it is a network of its own, not one layer with what belongs to it."""
    return _layers(module) >= 3


def _edits_inputs(module: nn.Module) -> bool:
    """Whether a block writes into what it is given, which could then not be given to it again: FreeU's blocks do."""
    return all(getattr(module, name, None) for name in ("s1", "s2", "b1", "b2"))


def _layers(module: nn.Module) -> int:
    if hasattr(module, "merged_adapters"):  # an adapter's layer is one layer
        return 1
    return bool(module._parameters) + sum(_layers(child) for child in module.children())


_REMEDY = 'use memory="max", which leaves the blocks whole'


class _Group:
    """The units of one network: what one has left over in a backward pass is let go when the next is redone."""

    def __init__(self, residence: Residence | None, network: str = "") -> None:
        # The call that a unit is redone for holds it; a unit's module is in a cycle, which only the collector frees.
        self.residence = None if residence is None else weakref.ref(residence)
        self.turns = None if residence is None else residence.turns
        self.last: weakref.ref[_Pass] | None = None
        self.network, self.repeats = network, Repeats()

    def begin(self, redone: _Pass, task: int) -> None:
        before = self.last() if self.last is not None else None
        if before is not None and before is not redone:
            before.made.pop(task, None)
        self.last = weakref.ref(redone)


class _Unit:
    """Stands in for a module's ``forward``."""

    def __init__(self, name: str, module: nn.Module, forward: Callable[..., Any], group: _Group) -> None:
        self.name, self.module, self.forward, self.group = name, module, forward, group
        self._weights: Weights | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return _Pass(self, args, kwargs).first(args, kwargs)

    def weights(self) -> Weights:
        """Its weights as they are now; calls that find them unchanged share one snapshot."""
        if self._weights is None or not self._weights.unchanged():
            self._weights = Weights([(self.name, self.module)], owned=True, turns=self.group.turns)
        return self._weights


class _Hold(torch.autograd.Function):
    """Saves a unit's inputs the way autograd saves tensors: through the hooks that are around the unit."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # never differentiated
        raise NotImplementedError


class _Ticket:
    """Stands for a saved tensor in the graph; only weights stay on it, or their places."""

    __slots__ = ("index", "owner", "place", "tensor", "version")

    def __init__(
        self, owner: _Pass, index: int, tensor: torch.Tensor | None, version: int, place: Place | None
    ) -> None:
        self.owner, self.index, self.tensor, self.version, self.place = owner, index, tensor, version, place


class _Pass:
    """One call of a unit; lives as long as the graph holds a ticket of it.

    Attributes:
        made: per backward pass (autograd's graph task), the tensors that a redo has made.
    """

    def __init__(self, unit: _Unit, args: Any, kwargs: Any) -> None:
        self.unit = unit
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        self.flags = [t.requires_grad for t in tensors]
        self.others = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        self.weights = unit.weights()
        self.carried = self.weights.carried()
        # A call is also counted on the meta device, which has no state.
        self.ambient = Ambient([x for x in leaves if not (isinstance(x, torch.Tensor) and x.is_meta)])
        self.count = 0
        self.made: dict[int, list[torch.Tensor | None]] = {}
        self.seen: Glimpse | None = None
        anchor = torch.empty(0, requires_grad=True)
        # The tensor, too: before torch 2.5 a node whose output has died gives up what it saved.
        self.hold = _Hold.apply(anchor, *(t.detach() for t in tensors))

    def first(self, args: Any, kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            out = self.unit.forward(*args, **kwargs)
        self.seen = Glimpse.of(out)
        self.ambient.settle()
        return out

    def pack(self, tensor: torch.Tensor) -> _Ticket:
        index, self.count = self.count, self.count + 1
        weight = tensor.untyped_storage()._cdata in self.weights.storages
        turns = self.unit.group.turns
        place = None if turns is None else turns.place_of(tensor)
        return _Ticket(self, index, tensor.detach() if weight else None, tensor._version, place)

    def unpack(self, ticket: _Ticket) -> torch.Tensor:
        if ticket.place is not None:
            self.weights.check()
            return ticket.place.tensor()
        if ticket.tensor is not None:
            if ticket.tensor._version != ticket.version:
                raise StateChangedError(
                    f"a weight of {self.unit.name} was modified in place between the forward and the backward pass "
                    f"(version {ticket.version}, now {ticket.tensor._version}), so its gradient is lost: call "
                    "backward() before the change"
                )
            return ticket.tensor
        task = torch._C._current_graph_task_id()
        store = self.made.get(task)
        if store is None or store[ticket.index] is None:
            store = self._redo(task)
        tensor = store[ticket.index]
        store[ticket.index] = None  # each is asked for once: gone as soon as autograd is done with it
        if task == -1:  # asked for outside a backward pass: nobody will tidy up
            self.made.pop(task, None)
        if tensor is None:
            raise self._differs(f"saved tensor {ticket.index} was not made")
        return tensor

    def _redo(self, task: int) -> list[torch.Tensor | None]:
        inputs = (
            self.hold.grad_fn.saved_tensors
        )  # asks the hooks around the unit: they may redo the whole call
        self.unit.group.begin(self, task)
        leaves = list(self.others)
        for place, tensor, flag in zip(self.places, inputs, self.flags, strict=True):
            leaves[place] = tensor.detach().requires_grad_(flag)
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        store: list[torch.Tensor | None] = []

        turns = self.unit.group.turns

        def keep(tensor: torch.Tensor) -> torch.Tensor | None:
            if turns is not None and turns.place_of(tensor) is not None:
                store.append(None)  # what has a place is not asked for
                return None
            store.append(tensor.detach())
            return tensor.detach()

        residence = self.unit.group.residence() if self.unit.group.residence is not None else None
        with (
            self.weights.restored(),
            nullcontext() if self.carried is None else self.carried.restored(),
            torch.enable_grad(),
            nullcontext() if residence is None else residence.over(self.unit.module),
            self.ambient.restored(),
            torch.autograd.graph.saved_tensors_hooks(keep, _same),
        ):
            again = Glimpse.of(self.unit.forward(*args, **kwargs))
        if len(store) != self.count:
            raise self._differs(f"{len(store)} saved tensors where there were {self.count}")
        if self.seen is not None:
            self.weights.check()  # a better name for the same thing
            spacing = self.ambient.spacing(self.weights.dtypes | self.seen.dtypes)
            self.unit.group.repeats.compare(self.seen, again, spacing, self._who(), _REMEDY)
        self.made[task] = store
        return store

    def _differs(self, how: str) -> StateChangedError:
        return differs(self._who(), how, _REMEDY)

    def _who(self) -> str:
        network = self.unit.group.network
        return f"{network}'s {self.unit.name}" if network else self.unit.name


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
