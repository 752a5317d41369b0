"""Memory plans and sizes: ``"6GiB"`` into bytes and back, and how much of the machine is free."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .accelerators import free_bytes
from .errors import BudgetError

_UNITS = {"": 1} | {
    prefix + end: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("B", 1000), ("IB", 1024), ("", 1024))
}
_UNITS["B"] = 1
_SIZES = 'a number of bytes, or a size such as "6GiB", "512MiB" or "1.5GB"'
_ALLOWED = f'"min", "max", "auto", {_SIZES}'


@dataclass(frozen=True)
class MemoryPlan:
    """What may be held for the backward pass.

    Attributes:
        mode: ``"min"`` (one call's activations at a time), ``"max"`` (all: plain autograd), ``"auto"``
            (a budget from the memory that is free at the first call), ``"bytes"`` or ``"keep"``.
        budget: bytes, for mode ``"bytes"``.
        keep: how many network calls keep their activations, for mode ``"keep"``: the last ones.
        park: in mode ``"keep"``, whether the arguments of the other calls wait in host memory.
    """

    mode: Literal["min", "max", "auto", "bytes", "keep"]
    budget: int | None = None
    keep: int = 0
    park: bool = False

    @classmethod
    def parse(cls, memory: MemoryPlan | str | int) -> MemoryPlan:
        """A plan from ``"min"``, ``"max"``, ``"auto"``, a number of bytes, or a size such as ``"6GiB"``.

        Raises:
            BudgetError: anything else, or a size that is not positive.
        """
        if isinstance(memory, MemoryPlan):
            return memory
        if memory in ("min", "max", "auto"):
            return cls(memory)  # type: ignore[arg-type]
        return cls("bytes", parse_size(memory, _ALLOWED))


def parse_size(memory: object, allowed: str = _SIZES) -> int:
    """Bytes of a size: a whole number, or a string with a unit (KiB, MiB, GiB, TiB; KB, MB, GB, TB decimal).

    Args:
        allowed: what the message says is allowed.

    Raises:
        BudgetError: not a size, or not positive.
    """
    if isinstance(memory, float) and memory.is_integer():  # 16e9
        memory = int(memory)
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise BudgetError(f"memory={memory!r} cannot be read; allowed: {allowed}")
    if isinstance(memory, int):
        size = memory
    else:
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", memory)
        if match is None or match[2].upper() not in _UNITS:
            raise BudgetError(f"memory={memory!r} cannot be read; allowed: {allowed}")
        size = int(float(match[1].replace("_", "")) * _UNITS[match[2].upper()])
    if size <= 0:
        raise BudgetError(f"memory={memory!r} is not positive; allowed: {allowed}")
    return size


def format_size(nbytes: int) -> str:
    """A size to read, with the exact bytes so that it can be given back: ``"6.0 GiB (6442450944 bytes)"``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit} ({nbytes} bytes)"
    return f"{nbytes} bytes"


def available_bytes(device: torch.device) -> int:
    """What ``"auto"`` may use on a device.

    A GPU: 80 % of what is free on the card, with what PyTorch's allocator holds but does not use. The CPU, and a
    device that does not tell: half of the machine's available memory, or of what the process's control group still
    allows, if less. The remainder is for the loss, for gradients in flight and for everybody else.
    """
    machine, free = int(0.5 * min(_machine_bytes(), _group_bytes())), free_bytes(device)
    if free is None:
        return machine
    # Apple's GPUs have no memory of their own.
    return min(machine, int(0.8 * free)) if device.type == "mps" else int(0.8 * free)


def _machine_bytes() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 2**31


def _group_bytes() -> int:
    unlimited = 2**62
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            allowed, taken = (root / limit).read_text().strip(), (root / used).read_text().strip()
        except OSError:
            continue
        return unlimited if allowed == "max" else max(0, int(allowed) - int(taken))
    return unlimited
