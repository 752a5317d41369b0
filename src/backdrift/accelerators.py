"""Devices other than the CPU, asked alike: random numbers, free memory, waiting for them, names.

PyTorch has a module for each kind of device (``torch.cuda``, ``torch.xpu``, ``torch.mps``, and one for a kind that is
registered from outside), and these modules do not have the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_WITHOUT = ("cpu", "meta")
#: Kinds of devices that have no float64.
WITHOUT_FLOAT64 = {"mps"}


def kinds() -> tuple[str, ...]:
    """The kinds of devices that PyTorch may have beside the CPU, the usual one first."""
    return "cuda", "xpu", "mps", torch._C._get_privateuse1_backend_name()


def module_of(device: torch.device) -> Any:
    """PyTorch's module for that kind of device; None for the CPU, and for devices that nothing runs on."""
    return None if device.type in _WITHOUT else getattr(torch, device.type, None)


def available() -> list[torch.device]:
    """All devices of this machine but the CPU, the usual kind first."""
    found = []
    for kind in kinds():
        module = getattr(torch, kind, None)
        if kind == "mps":
            found += [torch.device(kind)] if torch.backends.mps.is_available() else []
        elif module is not None and module.is_available():
            found += [torch.device(kind, i) for i in range(module.device_count())]
    return found


def in_use() -> list[torch.device]:
    """Those that have been started. The others have drawn no random numbers, and not even asking wakes them."""
    found = []
    for kind in kinds():
        module = getattr(torch, kind, None)
        if kind == "mps":
            found += [torch.device(kind)] if torch.backends.mps.is_available() else []
        elif module is not None and module.is_initialized():
            found += [torch.device(kind, i) for i in range(module.device_count())]
    return found


def name(device: torch.device) -> str:
    """The name of the card, or the kind of device."""
    told = getattr(module_of(device), "get_device_name", None)
    return device.type if told is None else str(told(device))


def wait(device: torch.device) -> None:
    """Wait until all that the device has been asked for is done."""
    module = module_of(device)
    if device.type == "mps":
        module.synchronize()
    elif hasattr(module, "synchronize"):
        module.synchronize(device)


def has_float64(device: torch.device) -> bool:
    """Whether the device has float64."""
    return device.type not in WITHOUT_FLOAT64


def doubled(x: Tensor) -> Tensor:
    """``x`` in float64; on the CPU where its own device has none."""
    return (x if has_float64(x.device) else x.cpu()).double()


# ---- memory ----------------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device, with those that PyTorch's allocator holds and does not use.

    None where the device does not tell.
    """
    module = module_of(device)
    if hasattr(module, "recommended_max_memory"):  # mps: what it may have of the machine's memory
        return max(0, module.recommended_max_memory() - module.current_allocated_memory())
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def counts_bytes(device: torch.device) -> bool:
    """Whether PyTorch counts what is taken on a device."""
    return hasattr(module_of(device), "max_memory_allocated")


# ---- random numbers --------------------------------------------------------------------------------------


def random_state(device: torch.device) -> Tensor | None:
    """The state of a device's own generator; None for one that has none."""
    read = getattr(module_of(device), "get_rng_state", None)
    if read is None:
        return None
    return read() if device.type == "mps" else read(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Put back what :func:`random_state` gave."""
    write = module_of(device).set_rng_state
    write(state) if device.type == "mps" else write(state, device)


def random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    """The states of the CPU's generator and of those devices' that have one."""
    states = (random_state(device) for device in devices)
    return [torch.get_rng_state(), *(state for state in states if state is not None)]


def set_random_states(devices: Sequence[torch.device], states: Sequence[Tensor]) -> None:
    """Put back what :func:`random_states` gave for the same devices."""
    rest = iter(states)
    torch.set_rng_state(next(rest))
    with_one = [device for device in devices if hasattr(module_of(device), "get_rng_state")]
    for device, state in zip(with_one, rest, strict=True):
        set_random_state(device, state)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Inside the block numbers may be drawn and generators seeded; afterwards all go on as if nothing had happened."""
    devices = in_use()
    states = random_states(devices)
    try:
        yield
    finally:
        set_random_states(devices, states)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block random numbers are those of ``seed``, on all devices in use; afterwards they go on as before."""
    with random_numbers_kept():
        # torch.manual_seed would also seed devices that are not in use yet, which nobody would put back.
        torch.default_generator.manual_seed(seed)
        for module in {device.type: module_of(device) for device in in_use()}.values():
            (module.manual_seed_all if hasattr(module, "manual_seed_all") else module.manual_seed)(seed)
        yield
