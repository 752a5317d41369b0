"""What a run's calls hold, in bytes: every storage counted once, however many calls and tensors share it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .frames import Frame


@dataclass
class Claim:
    """One call's share, known without keeping the call alive.

    Attributes:
        owner: what dies when the call's graph does: its frame, or the watch of a call that is plain autograd.
        arguments: storages of the call's arguments: held as long as the call may have to be redone.
        saved: storages of what autograd saved, as long as they are held.
        plain_bytes: for a plain call, its bytes as measured on the first of its kind.
        call: number of the call that it is, or is a part of.
    """

    owner: weakref.ref[Any]
    role: str
    arguments: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)
    plain_bytes: int = 0
    held: bool = True
    reached: bool = False  # by a backward pass
    call: int = 0
    parked: bool = False  # its arguments have been looked through


class Holdings:
    """Claims in the order of the calls, and the bytes they hold together (``live``).

    Not thread-safe: the ledger's lock is around every use. Only ``_gone`` is written from elsewhere, by the
    collector, and appending to a list is atomic.
    """

    def __init__(self) -> None:
        self.live = 0
        self.arguments = 0  # the part of ``live`` that cannot be dropped
        self._count: dict[int, list[int]] = {}  # storage -> [claims on it, its bytes]
        self._claims: dict[int, Claim] = {}
        self._gone: list[int] = []
        self._serial = self._call = 0

    def open(self, owner: object, role: str, plain_bytes: int = 0) -> int:
        """A new claim, the youngest; its serial number."""
        serial, gone = self._serial, self._gone
        self._serial += 1
        self._claims[serial] = Claim(
            weakref.ref(owner, lambda _: gone.append(serial)), role, plain_bytes=plain_bytes, call=self._call
        )
        self._call += not role.endswith("part")
        self.live += plain_bytes
        return serial

    def add_arguments(self, serial: int, tensors: list[torch.Tensor], skip: frozenset[int]) -> None:
        """Count a call's argument tensors, but for the storages in ``skip`` (weights)."""
        before = self.live
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in skip and key not in self._claims[serial].arguments:
                self._claims[serial].arguments.add(key)
                self._take(key, storage.nbytes())
        self.arguments += self.live - before

    def add_saved(self, serial: int, key: int, nbytes: int) -> None:
        """Count a storage that autograd saved."""
        claim = self._claims[serial]
        if key not in claim.saved:
            claim.saved.add(key)
            self._take(key, nbytes)

    def reached(self, serial: int) -> None:
        """A backward pass has come to this call; what it holds is freed soon, unless it is retained."""
        claim = self._claims.get(serial)
        if claim is not None:
            claim.reached = True
            self.live -= claim.plain_bytes
            claim.plain_bytes = 0

    def drop(self, serial: int) -> None:
        """Let go of one call's saved tensors."""
        claim = self._claims[serial]
        frame: Frame | None = claim.owner()
        claim.held = False
        if frame is not None:
            frame.drop()
        self._release(claim.saved)

    def drop_oldest_until(self, enough: Callable[[], bool], *, but: int) -> None:
        """Drop calls from the oldest on, until ``enough()``; never the one with serial ``but``."""
        for serial, claim in list(self._claims.items()):
            if enough():
                return
            if serial != but and claim.held and claim.saved:
                self.drop(serial)

    def drop_role(self, role: str, *, but: int) -> None:
        """Drop all calls of a role, but for the one with serial ``but``."""
        for serial, claim in list(self._claims.items()):
            if claim.role == role and serial != but and claim.held:
                self.drop(serial)

    def park(self, *, but: int) -> None:
        """Send the arguments of dropped calls to wait on the host, those that no other call has too.

        Calls of which a part is held, or is the one with serial ``but``, are left for later: parts share a storage.
        """
        here = {c.call for serial, c in self._claims.items() if c.held or serial == but}
        ready = [c for c in self._claims.values() if not c.parked and c.call not in here]
        calls: dict[int, set[int]] = {key: set() for c in ready for key in c.arguments}  # that have a storage
        for claim in self._claims.values():
            for key in calls.keys() & (claim.arguments | claim.saved):
                calls[key].add(claim.call)
        before = self.live
        for claim in ready:
            claim.parked = True
            frame: Frame | None = claim.owner()
            own = {key for key in claim.arguments if len(calls[key]) == 1}
            if frame is not None and own:
                away = frame.park(own)
                claim.arguments -= away
                self._release(away)
        self.arguments -= before - self.live

    def tidy(self) -> None:
        """Forget calls whose graphs have died, and recount those that a backward pass has begun to free."""
        while self._gone:
            claim = self._claims.pop(self._gone.pop(), None)
            if claim is not None:
                self.live -= claim.plain_bytes
                self._release(claim.saved)
                before = self.live
                self._release(claim.arguments)
                self.arguments -= before - self.live
        for claim in self._claims.values():
            if claim.reached and claim.held and claim.saved:
                frame: Frame | None = claim.owner()
                dead = claim.saved - (frame.alive() if frame is not None else set())
                claim.saved -= dead
                self._release(dead)

    def kept(self, role: str, *, but: int = -1) -> int:
        """How many calls of a role hold their activations, the one with serial ``but`` left out."""
        return sum(
            c.role == role and c.held and not c.reached and serial != but
            for serial, c in self._claims.items()
        )

    def _take(self, key: int, nbytes: int) -> None:
        entry = self._count.get(key)
        if entry is None:
            self._count[key] = [1, nbytes]
            self.live += nbytes
        else:
            entry[0] += 1

    def _release(self, keys: set[int]) -> None:
        for key in keys:
            entry = self._count[key]
            entry[0] -= 1
            if entry[0] == 0:
                self.live -= entry[1]
                del self._count[key]
        keys.clear()

    def __iter__(self) -> Iterator[Claim]:
        return iter(self._claims.values())
