"""The state outside a network that decides what its call computes: captured before it, put back for a redo.

Autocast, random numbers, attention backends, TF32, cuDNN and determinism flags, the default dtype, the modes that
act on PyTorch's functions (``with torch.device(...)`` and ``torch.set_default_device`` are such).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """The process-wide settings, as (read, write) pairs."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    pairs: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (lambda: cudnn.enabled, lambda v: setattr(cudnn, "enabled", v)),
        (lambda: cudnn.benchmark, lambda v: setattr(cudnn, "benchmark", v)),
        (lambda: cudnn.deterministic, lambda v: setattr(cudnn, "deterministic", v)),
        (lambda: cudnn.allow_tf32, lambda v: setattr(cudnn, "allow_tf32", v)),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
        (torch.get_default_dtype, torch.set_default_dtype),
    ]
    if hasattr(cuda, "cudnn_sdp_enabled"):
        pairs.append((cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp))
    if hasattr(torch._C, "_get_sdp_priority_order"):
        pairs.append((torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order))
    return pairs


_SWITCHES = _switches()


class Ambient:
    """A snapshot of that state. ``leaves`` are the call's arguments: their devices, and the generators among
    them, decide whose random state belongs to it."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        devices = {x.device for x in leaves if isinstance(x, torch.Tensor) and x.device.type != "cpu"}
        types = {"cpu", *(d.type for d in devices)}
        self._switches = [read() for read, _ in _SWITCHES]
        self._autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._modes = _get_current_function_mode_stack()
        self._accelerators = [d for d in devices if d.type in ("cuda", "xpu", "mps")]
        self._generators = [x for x in leaves if isinstance(x, torch.Generator)]
        self._random: list[torch.Tensor] | None = self._read_random()

    @property
    def autocast_dtypes(self) -> set[torch.dtype]:
        """What autocast computes in, on the device types where it is on."""
        return {dtype for _, enabled, dtype in self._autocast if enabled}

    def settle(self) -> None:
        """After the call: if it drew no random numbers, a redo need not touch the generators, which other
        threads may be drawing from."""
        if self._random is not None:
            now = self._read_random()
            if all(torch.equal(a, b) for a, b in zip(self._random, now, strict=True)):
                self._random = None

    def same_as(self, other: Ambient) -> bool:
        """Whether two snapshots are equal, so that one can stand for both."""
        ours, theirs = self._random or [], other._random or []
        mine = (
            self._switches,
            self._autocast,
            self._autocast_cache,
            self._modes,
            self._accelerators,
            len(ours),
        )
        its = (
            other._switches,
            other._autocast,
            other._autocast_cache,
            other._modes,
            other._accelerators,
            len(theirs),
        )
        return mine == its and all(map(torch.equal, ours, theirs))

    def _read_random(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        states += [getattr(torch, d.type).get_rng_state(*_index(d)) for d in self._accelerators]
        return states + [g.get_state() for g in self._generators]

    def _write_random(self, states: Sequence[torch.Tensor]) -> None:
        rest = iter(states)
        torch.set_rng_state(next(rest))
        for device in self._accelerators:
            getattr(torch, device.type).set_rng_state(next(rest), *_index(device))
        for generator in self._generators:
            generator.set_state(next(rest))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block all is as it was at the snapshot; afterwards as it was before the block."""
        switches = [read() for read, _ in _SWITCHES]
        with ExitStack() as stack:
            if self._random is not None:
                stack.callback(self._write_random, self._read_random())
                self._write_random(self._random)
            stack.callback(_write_switches, self._switches, switches)
            _write_switches(switches, self._switches)
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(
                    torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self._autocast_cache)
                )
            if (modes := _get_current_function_mode_stack()) != self._modes:
                stack.callback(_exchange_modes, modes)
                _exchange_modes(self._modes)
            yield


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)


def _exchange_modes(modes: Sequence[TorchFunctionMode]) -> None:
    # A backward pass started under a mode runs without it: the mode is set aside while it handles the call.
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def _write_switches(now: Sequence[Any], then: Sequence[Any]) -> None:
    # Only what differs: some setters are slow or warn.
    for (_, write), old, new in zip(_SWITCHES, now, then, strict=True):
        if old != new:
            write(new)
