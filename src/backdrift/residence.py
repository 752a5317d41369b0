"""Weights that wait elsewhere, and are on the device only while a run calls them.

A network whose weights wait on the CPU is given copies on the device. What comes and goes together is a *member*: the
whole network, a block of it, or one layer. A whole network's copies stay from call to call while its phase of the run
(encoding, sampling, decoding) lasts, and go when another phase begins, forward or backward. Those of a block or a layer
are there while that is called, one after the other.

What autograd saves of a copy is kept as a *place* (which weight, which view of it) and not as a tensor, so a graph
does not hold it: a backward pass loads it again. A copy is counted as long as anything holds it, its member or an
operation that is being differentiated, and is made once for all who ask while its member holds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Member", "Part", "Place", "Residence", "Slot", "Turns", "layers", "slots_of"]


class Slot(NamedTuple):
    """Where a network holds a weight or a buffer: in which of its modules, by which name."""

    holder: nn.Module
    name: str

    @property
    def is_buffer(self) -> bool:
        return self.name in self.holder._buffers


class Part(NamedTuple):
    """Weights that are needed for the calls of one module.

    Attributes:
        around: the module.
        slots: where the weights are held; in the module or anywhere else in the network.
    """

    around: nn.Module
    slots: Sequence[Slot]


def slots_of(*modules: nn.Module) -> list[Slot]:
    """The slots of all weights and buffers in ``modules``, each once."""
    holders = {child: None for module in modules for child in module.modules()}
    return [slot for holder in holders for slot in _own(holder)]


def layers(module: nn.Module) -> list[Part]:
    """A part for each module inside a network that has weights of its own.

    A module whose weights are read by hooks before its forward (weight normalisation) has them for the calls of the
    module around it.
    """
    found: list[Part] = []
    seen: set[nn.Module] = set()

    def walk(child: nn.Module, caller: nn.Module) -> None:
        if child in seen:
            return
        seen.add(child)
        slots = slots_of(child) if isinstance(child, _WHOLE) else _own(child)
        if slots:
            found.append(Part(caller if child._forward_pre_hooks else child, slots))
        if not isinstance(child, _WHOLE):
            for inner in child.children():
                walk(inner, caller if isinstance(child, _LISTS) else child)

    walk(module, module)
    return found


def _own(holder: nn.Module) -> list[Slot]:
    tables: tuple[dict[str, Any], ...] = (holder._parameters, holder._buffers)
    return [Slot(holder, name) for table in tables for name, tensor in table.items() if tensor is not None]


# Layers that read the weights of layers inside them, and modules that are not called themselves.
_WHOLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Turns:
    """The device of one run, and the copies that are on it.

    Args:
        device: where calls run.

    Attributes:
        nbytes: bytes of the copies now.
        peak: most of them at any time.
        moved: bytes of all copies made so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = self.peak = self.moved = 0
        self._staying: list[weakref.ref[Member]] = []
        self._copies: dict[Any, _Copy] = {}  # by what they are copies of
        self._homes: dict[int, _Copy] = {}  # by their storages
        self._trained: dict[tuple[int, str], nn.Parameter] = {}

    def comes(self, member: Member) -> None:
        """Send home those of other phases."""
        for ref in self._staying:
            other = ref()
            if other is not None and other.phase != member.phase:
                other.leave()

    def leave(self) -> None:
        """Send all home."""
        for ref in self._staying:
            member = ref()
            if member is not None:
                member.leave()

    def copy(self, home: Tensor, member: Member) -> Tensor:
        """The copy on the device of what lies at ``home``: the present one, or one that ``member`` loads."""
        if home.device == self.device and home.device.type not in ("cpu", "meta"):
            return home  # left there by a call of the user's own; on a CPU all goes as on a card
        key = _key(home)
        known = self._copies.get(key)
        found = None if known is None else known.held()
        return self._load(key, home, member) if found is None else found

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where a tensor lies among the copies; None for one that is no part of a copy."""
        found = self._homes.get(tensor.untyped_storage()._cdata) if self._homes else None
        member = None if found is None else found.member()
        if found is None or member is None or tensor.dtype != found.home.dtype:
            return None
        return Place(member, found.home, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def home_of(self, tensor: Tensor) -> Tensor:
        """What a copy is a copy of; any other tensor is itself."""
        found = self._homes.get(tensor.untyped_storage()._cdata) if self._homes else None
        return tensor if found is None else found.home

    def weight_at(self, holder: nn.Module, name: str) -> Tensor | None:
        """The weight at a slot, also while a differentiable copy is in a trained one's place."""
        return self._trained.get((id(holder), name), holder._parameters[name])

    @contextmanager
    def saving(self, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Inside the block autograd saves places of copies; all else as it is, or as hooks around it want it saved.

        Args:
            check: called when a backward pass asks for a weight.
        """
        outer_pack, outer_unpack = _hooks_around() or (Tensor.detach, None)

        def pack(tensor: Tensor) -> Any:
            return self.place_of(tensor) or outer_pack(tensor)

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Place):
                if check is not None:
                    check()
                return saved.tensor()
            return saved if outer_unpack is None else outer_unpack(saved)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def note(self) -> None:
        """A copy has been made."""
        self.peak = max(self.peak, self.nbytes)

    def _load(self, key: Any, home: Tensor, member: Member) -> Tensor:
        copy = self._loaded(home)
        storage, me = copy.untyped_storage(), weakref.ref(self)

        def gone(_: Any) -> None:
            turns = me()
            if turns is not None:
                turns._forget(key, made)

        watch = weakref.ref(storage, gone)
        made = _Copy(weakref.ref(member), home, weakref.ref(copy), watch, storage.nbytes())
        self._copies[key] = self._homes[storage._cdata] = made
        made.address = storage._cdata
        self.nbytes += made.nbytes
        self.moved += made.nbytes
        self.note()
        return copy

    def _loaded(self, home: Tensor) -> Tensor:
        return home.to(self.device, copy=True)

    def _forget(self, key: Any, gone: _Copy) -> None:
        self.nbytes -= gone.nbytes
        if self._copies.get(key) is gone:
            del self._copies[key]
        if self._homes.get(gone.address) is gone:
            del self._homes[gone.address]


@dataclass(eq=False)
class _Copy:
    """A copy, known without keeping it alive: its tensor as long as a member holds that, its storage as long as it is
    there."""

    member: weakref.ref[Member]
    home: Tensor
    held: weakref.ref[Tensor]
    storage: weakref.ref[torch.UntypedStorage]
    nbytes: int
    address: int = 0


class Member:
    """Weights that come and go together.

    Args:
        slots: where they are held. Frozen weights' and buffers' tensors are the network's own, their storages the
            user's. Trained weights are the user's Parameters: calls see differentiable copies, and gradients arrive
            at home.
        phase: of the run.
        turns: of the run.
        stays: whether the copies stay until another phase begins.
    """

    def __init__(self, slots: Sequence[Slot], phase: str, turns: Turns, stays: bool) -> None:
        self.phase, self.turns, self.stays = phase, turns, stays
        self._trained: list[tuple[Slot, nn.Parameter]] = []
        frozen: dict[int, Tensor] = {}
        self._buffers: list[tuple[nn.Module, Tensor]] = []
        for slot in slots:
            if slot.is_buffer:  # the user's own tensor object so far
                own = slot.holder._buffers[slot.name].detach()  # type: ignore[union-attr]
                slot.holder._buffers[slot.name] = frozen[id(own)] = own
                self._buffers.append((slot.holder, own))
                continue
            weight = slot.holder._parameters[slot.name]
            if weight is not None and weight.requires_grad:
                self._trained.append((slot, weight))
                turns._trained[id(slot.holder), slot.name] = weight
            elif weight is not None:
                frozen[id(weight)] = weight
        self._frozen = list(frozen.values())
        self._copies: dict[Any, Tensor] = {}
        self._depth = 0
        if stays:
            turns._staying.append(weakref.ref(self))

    @property
    def nbytes(self) -> int:
        """Bytes of the copies that it holds."""
        return sum(copy.nbytes for copy in self._copies.values())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside the block the weights are on the device."""
        if self._depth:
            yield
            return
        self.turns.comes(self)
        # What two members share is there already while the other is.
        homes = [(t, t.data) for t in self._frozen if self.turns.home_of(t) is t]
        self._keep_only({_key(home) for _, home in homes} | {_key(p) for _, p in self._trained})
        self._depth += 1
        try:
            for tensor, home in homes:
                tensor.data = self._here(home)
            for slot, weight in self._trained:
                copy = _Visit.apply(weight, [self._here(weight.data)])
                slot.holder._parameters[slot.name] = copy
            yield
        finally:
            self._depth -= 1
            edited = {id(buffer) for holder, buffer in self._buffers if holder.training}
            for tensor, home in homes:
                if id(tensor) in edited:  # running statistics, say
                    home.copy_(tensor.data)
                tensor.data = home
            for slot, weight in self._trained:
                slot.holder._parameters[slot.name] = weight
            if not self.stays:
                self.leave()

    def around(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` with its tensors and the weights on the device while it runs."""
        device = self.turns.device

        @wraps(fn)
        def there(*args: Any, **kwargs: Any) -> Any:
            moved = [_moved(value, device) for value in args]
            with self.entered():
                return fn(*moved, **{name: _moved(value, device) for name, value in kwargs.items()})

        return there

    def copy_of(self, home: Tensor) -> Tensor:
        """The copy on the device of what lies at ``home``, loaded if it is not there."""
        self.turns.comes(self)
        return self._here(home) if self.stays else self.turns.copy(home, self)

    def leave(self) -> None:
        """Give the copies up."""
        self._copies.clear()

    def _here(self, home: Tensor) -> Tensor:
        copy = self.turns.copy(home, self)
        if copy is not home:
            self._copies[_key(home)] = copy
        return copy

    def _keep_only(self, keys: set[Any]) -> None:
        for key in [key for key in self._copies if key not in keys]:
            del self._copies[key]


class Residence:
    """One network of the run's own (a shadow), whose data lie at home.

    Args:
        module: the shadow.
        phase: of the run; whole networks of one phase are on the device together.
        turns: of the run.
        parts: what is on the device for the calls of which module; None: the whole network, while its phase lasts.
    """

    def __init__(
        self, module: nn.Module, phase: str, turns: Turns, parts: Sequence[Part] | None = None
    ) -> None:
        self.turns = turns
        # With the modules that they are there for, and those that hold their slots.
        self._members: list[tuple[Member, int, set[int]]] = []
        self._outer: list[Member] = []
        self._over: dict[int, list[Member]] = {}
        for around, slots in [Part(module, slots_of(module))] if parts is None else parts:
            member = Member(slots, phase, turns, stays=parts is None)
            self._members.append((member, id(around), {id(slot.holder) for slot in slots}))
            if around is module:  # whichever of its methods is called
                self._outer.append(member)
            else:
                around.forward = member.around(around.forward)

    def around(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn``, a method of the network, with its arguments on the device, and the weights when they are needed."""
        device = self.turns.device

        @wraps(fn)
        def there(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
            with _all_entered(self._outer):
                return fn(*args, **kwargs)

        return there

    def over(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A block inside of which a module of the network can be called alone: it finds the weights that are otherwise
        there for the calls of a module around it."""
        if id(module) not in self._over:
            inside = {id(child) for child in module.modules()}
            self._over[id(module)] = [
                member
                for member, around, holders in self._members
                if around not in inside and not holders.isdisjoint(inside)
            ]
        return _all_entered(self._over[id(module)])


@dataclass(frozen=True, slots=True)
class Place:
    """A view of a weight on the device, without the tensor."""

    member: Member
    home: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The view, loaded if the weight is not there."""
        return self.member.copy_of(self.home).as_strided(self.size, self.stride, self.offset)


class _Visit(torch.autograd.Function):
    """A trained weight's copy on the device; its gradient goes home."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: list[Tensor]) -> Tensor:
        ctx.home = weight.device
        return copy[0].detach()  # a new tensor object: the copy itself stays without a graph

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].to(ctx.home), None


@contextmanager
def _all_entered(members: Sequence[Member]) -> Iterator[None]:
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(member.entered())
        yield


def _hooks_around() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The hooks by which autograd saves tensors now. Of nested ones PyTorch asks the innermost alone."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in every version
    return None if top is None else top(True)


def _moved(value: Any, device: torch.device) -> Any:
    # Not what lies in lists: some networks hand one on, to be filled. On the meta device there are no values to bring.
    away = isinstance(value, Tensor) and value.device != device and device.type != "meta"
    return value.to(device) if away else value


def _key(home: Tensor) -> Any:
    # Of the storage, not its address: there are none on the meta device.
    return (
        home.untyped_storage()._cdata,
        home.storage_offset(),
        home.dtype,
        home.shape,
        home.stride(),
    )
