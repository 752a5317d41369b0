"""One network call on a memory plan: what autograd saved of it is held, dropped, or made by a second run.

While the call runs, every tensor that autograd saves is replaced in the graph by a small `_Ticket`. The
tensor stays on the ticket until the ledger *drops* the frame; a dropped frame's tensors come back by running
the call again when the backward pass first asks for one, and what that gives is compared with what the call gave
(:mod:`~backdrift.repeats`). The graph itself is the one that plain autograd
builds, node by node, which is why gradients are equal bit for bit whatever is dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from .ambient import Ambient
from .errors import StateChangedError
from .parking import Parked, View, parkable
from .repeats import Glimpse, differs
from .residence import Place, Turns
from .weights import Weights

if TYPE_CHECKING:
    from .memory import Ledger


_REMEDY = 'use memory="max", which redoes nothing'


class _Ticket:
    """Stands for a saved tensor in the graph."""

    __slots__ = ("__weakref__", "frame", "index", "place", "shape", "tensor", "version")

    frame: Frame
    index: int
    tensor: torch.Tensor | None
    place: Place | View | None  # of a weight that is on the device for its call only, or of a parked argument
    version: int
    shape: torch.Size


class Frame:
    """One call ``fn(*args, **kwargs)``; lives as long as the graph holds a ticket of it.

    Attributes:
        serial: position among the ledger's calls.
        nbytes: bytes of the storages that autograd saved of this call (weights and arguments left out).
        dropped: the tensors are gone and will be made again.
        remade: per backward pass (autograd's graph task), the tensors that a redo has made, with their versions.
    """

    def __init__(
        self,
        ledger: Ledger,
        role: str,
        fn: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
        weights: Weights,
        turns: Turns | None = None,
    ) -> None:
        self.ledger, self.role, self.fn, self.weights = ledger, role, fn, weights
        self.turns = turns
        self.leaves, self.spec = leaves, spec
        self.tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        self.versions = [t._version for t in self.tensors]
        self.flags = [t.requires_grad for t in self.tensors]
        places = weights.devices if turns is None else weights.devices | {turns.device}
        self.ambient, self.carried = Ambient(leaves, places), weights.carried()
        self.serial = -1
        self.tickets: list[weakref.ref[_Ticket] | None] = []
        self.nbytes = 0
        self.dropped = False
        self.remade: dict[int, list[tuple[torch.Tensor, int] | None]] = {}
        self._seen: Glimpse | None = None
        self._lent: list[weakref.ref[_Ticket]] = []  # those that hold arguments
        self._permanent = weights.storages | {t.untyped_storage()._cdata for t in self.tensors}
        self._counted: set[int] = set()
        self._checked = -1  # the backward pass (graph task) in which the weights were compared last
        self._addresses: list[StorageWeakRef] = []

    def pack(self, tensor: torch.Tensor) -> _Ticket:
        """Replace a tensor that autograd saves (the first hook)."""
        ticket, tickets = _Ticket(), self.tickets
        ticket.frame, ticket.index = self, len(tickets)
        ticket.version, ticket.place = tensor._version, None
        if self.turns is not None:
            ticket.place = self.turns.place_of(tensor)
        if ticket.place is not None:
            ticket.tensor = None
            tickets.append(None)
            return ticket
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._permanent:
            # Weights and arguments are alive anyway: nothing to drop, count or make again. Detached: a decoder's
            # weights may be converted in place after its call.
            ticket.tensor = tensor.detach()
            tickets.append(None)
            if key not in self.weights.storages:
                self._lent.append(weakref.ref(ticket))
            return ticket
        ticket.shape = tensor.shape
        # Detached: a saved output would otherwise hold its own graph, a cycle only the collector frees.
        ticket.tensor = None if self.dropped else tensor.detach()
        tickets.append(weakref.ref(ticket))
        if key not in self._counted:
            self._counted.add(key)
            nbytes = storage.nbytes()
            self.nbytes += nbytes
            if self.dropped:
                self._addresses.append(StorageWeakRef(storage))
            self.ledger.saved(self, key, nbytes)
        return ticket

    def unpack(self, ticket: _Ticket) -> torch.Tensor:
        """Give the tensor back to autograd (the second hook), made again if it was dropped."""
        if ticket.place is not None:
            if isinstance(ticket.place, Place):
                self._check_weights()
            return ticket.place.tensor()
        tensor, version = ticket.tensor, ticket.version
        if tensor is None:
            tensor, version = self._from_redo(ticket)
        if tensor._version != version:
            raise StateChangedError(
                f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was modified in place "
                f"(version {version}, now {tensor._version}): modify a clone instead"
            )
        return tensor

    def drop(self) -> None:
        """Let go of all tensors; also in the middle of the call, whose later tensors are then not held."""
        self.dropped = True
        for ref in self.tickets:
            ticket = ref() if ref is not None else None
            if ticket is not None and ticket.tensor is not None:
                if self is self.ledger.running:
                    # The weak reference keeps the address from being reused, so that storages stay countable.
                    self._addresses.append(StorageWeakRef(ticket.tensor.untyped_storage()))
                ticket.tensor = None

    def finish(self) -> None:
        """The call has returned."""
        self.ambient.settle()
        self._addresses.clear()
        self._counted.clear()

    def returned(self, out: Any) -> None:
        """It has returned this, which a redo will have to give too."""
        self._seen = Glimpse.of(out)

    def alive(self) -> set[int]:
        """The storages that tickets still hold."""
        tickets = [ref() for ref in self.tickets if ref is not None]
        return {t.tensor.untyped_storage()._cdata for t in tickets if t is not None and t.tensor is not None}

    def park(self, keys: set[int]) -> set[int]:
        """Send the arguments in the storages ``keys`` to wait on the host; the storages that are let go thereby.

        One that has been edited stays, for :meth:`_check` to see.
        """
        away: set[int] = set()
        for key in keys:
            places = [
                i
                for i, x in enumerate(self.leaves)
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == key
            ]
            tensors = [self.leaves[i] for i in places]
            unedited = all(
                tensor._version == version and tensor.requires_grad == flag
                for tensor, version, flag in zip(self.tensors, self.versions, self.flags, strict=True)
                if tensor.untyped_storage()._cdata == key
            )
            if not tensors or not unedited or not all(map(parkable, tensors)):
                continue
            parked = [Parked(tensor) for tensor in tensors]
            lent = [t for ref in self._lent if (t := ref()) is not None and t.tensor is not None]
            lent = [t for t in lent if t.tensor.untyped_storage()._cdata == key]  # type: ignore[union-attr]
            views = [next((v for p in parked if (v := p.view(t.tensor))), None) for t in lent]  # type: ignore[arg-type]
            if None in views:
                continue
            for ticket, view in zip(lent, views, strict=True):
                ticket.place, ticket.tensor = view, None
            for i, one in zip(places, parked, strict=True):
                self.leaves[i] = one
            away.add(key)
        if away:
            still = [
                entry
                for entry in zip(self.tensors, self.versions, self.flags, strict=True)
                if entry[0].untyped_storage()._cdata not in away
            ]
            self.tensors = [tensor for tensor, _, _ in still]
            self.versions = [version for _, version, _ in still]
            self.flags = [flag for _, _, flag in still]
        return away

    def _from_redo(self, ticket: _Ticket) -> tuple[torch.Tensor, int]:
        task = torch._C._current_graph_task_id()
        with self.ledger.lock:
            store = self.remade.get(task)
            if store is None or store[ticket.index] is None:
                store = self._redo(task)
            made = store[ticket.index]
            store[ticket.index] = None  # each is asked for once: gone as soon as autograd is done with it
            if task == -1:  # asked for outside a backward pass: nobody will tidy up
                self.remade.pop(task, None)
        if made is None:
            raise self._differs(f"saved tensor {ticket.index} was not made")
        return made

    def _check_weights(self) -> None:
        """Once per backward pass: what plain autograd does for every weight that it asks for."""
        task = torch._C._current_graph_task_id()
        if task == -1 or task != self._checked:
            self.weights.check()
            self._checked = task

    def _check(self) -> None:
        self.weights.check()
        for tensor, version, flag in zip(self.tensors, self.versions, self.flags, strict=True):
            if tensor._version != version or tensor.requires_grad != flag:
                change = "modified in place" if tensor._version != version else "given another requires_grad"
                raise StateChangedError(
                    f"an argument of shape {tuple(tensor.shape)} of a network call was {change} between the "
                    "forward and the backward pass, so the call cannot be redone: modify a clone instead"
                )

    def _redo(self, task: int) -> list[tuple[torch.Tensor, int] | None]:
        self._check()
        self.ledger.before_redo(self, task)
        tickets = [ref() if ref is not None else None for ref in self.tickets]
        store: list[tuple[torch.Tensor, int] | None] = [None] * len(tickets)
        position = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor | None:
            nonlocal position
            i, position = position, position + 1
            if self.turns is not None and self.turns.place_of(tensor) is not None:
                # This run's own graph, which nobody goes back through, would keep the weight here.
                return None
            detached = tensor.detach()
            ticket = tickets[i] if i < len(tickets) else None
            if ticket is not None:
                if tensor.shape != ticket.shape:
                    raise self._differs(f"shape {tuple(tensor.shape)} where it was {tuple(ticket.shape)}")
                store[i] = detached, tensor._version
            return detached

        leaves = [x.argument() if isinstance(x, Parked) else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with (
            self.ledger.redoing(self),
            self.weights.restored(),
            nullcontext() if self.carried is None else self.carried.restored(),
            self.ambient.restored(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, _same),
        ):
            # To its end, past the last tensor that is needed: networks put back what they change only there
            # (diffusers rescales LoRA layers for the length of a call).
            again = Glimpse.of(self.fn(*args, **kwargs))
        if position != len(tickets):
            raise self._differs(f"{position} saved tensors where there were {len(tickets)}")
        if self._seen is not None:
            spacing = self.ambient.spacing(self.weights.dtypes | self._seen.dtypes)
            self.ledger.repeats.compare(self._seen, again, spacing, self._who(), _REMEDY)
        self.remade[task] = store
        return store

    def _differs(self, how: str) -> StateChangedError:
        return differs(self._who(), how, _REMEDY)

    def _who(self) -> str:
        names = [name or type(module).__name__ for name, module in self.weights.modules]
        return f"a call of {', '.join(names)}" if names else "a network call"


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
