"""The state outside a network that decides what its call computes: captured before it, put back for a redo.

Autocast, random numbers, attention backends, TF32, cuDNN and determinism flags, the default dtype, the modes that
act on PyTorch's functions (``with torch.device(...)`` and ``torch.set_default_device`` are such).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from .accelerators import module_of, random_states, set_random_states

Switch = tuple[Callable[[], Any], Callable[[Any], Any]]


def _switches() -> list[Switch]:
    """The process-wide settings, as (read, write) pairs."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    pairs: list[Switch] = [
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        _MATMUL,
        (lambda: cudnn.enabled, lambda v: setattr(cudnn, "enabled", v)),
        (lambda: cudnn.benchmark, lambda v: setattr(cudnn, "benchmark", v)),
        (lambda: cudnn.deterministic, lambda v: setattr(cudnn, "deterministic", v)),
        _CUDNN_TF32,
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_default_dtype, torch.set_default_dtype),
    ]
    if hasattr(cuda, "cudnn_sdp_enabled"):
        pairs.append((cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp))
    if hasattr(torch._C, "_get_sdp_priority_order"):
        pairs.append((torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order))
    for name in ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction", "fp16_accumulation"):
        if hasattr(torch._C, f"_get_cublas_allow_{name}"):
            pairs.append(_of_cublas(f"allow_{name}"))
    return pairs


def _unless_set_apart(read: Callable[[], Any], write: Callable[[Any], Any]) -> Switch:
    """One of the older settings of float32's precision. It cannot be read where matrix products, convolutions and so on
    have been set apart from each other by the newer settings, which are looked at beside it."""

    def careful() -> Any:
        try:
            return read()
        except RuntimeError:
            return None

    return careful, lambda value: None if value is None else write(value)


def _precision(kind: str, op: str) -> Switch:
    return (
        lambda: torch._C._get_fp32_precision_getter(kind, op),
        lambda value: torch._C._set_fp32_precision_setter(kind, op, value),
    )


def _of_cublas(name: str) -> Switch:
    # Newer releases of PyTorch have two answers, and torch.backends tells one of them.
    read, write = (getattr(torch._C, f"_{verb}_cublas_{name}") for verb in ("get", "set"))
    return read, lambda value: write(*value) if isinstance(value, tuple) else write(value)


_MATMUL = _unless_set_apart(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
_CUDNN_TF32 = _unless_set_apart(
    lambda: torch.backends.cudnn.allow_tf32, lambda v: setattr(torch.backends.cudnn, "allow_tf32", v)
)
# What holds for all comes first: the others follow it.
_PLACES = (
    ("generic", "all"),
    *((kind, op) for kind in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
)
_PRECISIONS = [_precision(*at) for at in _PLACES] if hasattr(torch._C, "_get_fp32_precision_getter") else []
# The older settings come last: writing one sets operations apart that followed what holds for all of them.
_SWITCHES = _PRECISIONS + _switches()
# The distance from 1 to the next number where float32 is computed in something coarser: TF32, or bfloat16.
_COARSER = {"tf32": 2.0**-10, "high": 2.0**-10, "bf16": 2.0**-7, "medium": 2.0**-7}


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside the block float32 is computed in float32: not in TF32, PyTorch's default for convolutions on CUDA, nor in
    anything coarser."""
    before = [read() for read, _ in _SWITCHES]
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for read, write in _PRECISIONS:
            if read() not in ("ieee", "none"):
                write("ieee")
        yield
    finally:
        _write_switches(before)


class Ambient:
    """A snapshot of that state.

    Args:
        leaves: the call's arguments: their devices, and the generators among them, decide whose random state belongs
            to it.
        devices: where it computes beside these: its weights may lie on several cards.
    """

    def __init__(self, leaves: Sequence[Any], devices: Iterable[torch.device] = ()) -> None:
        places = {x.device for x in leaves if isinstance(x, torch.Tensor)} | set(devices)
        found = sorted((d for d in places if module_of(d) is not None), key=str)
        types = ["cpu", *dict.fromkeys(d.type for d in found)]
        self._switches = [read() for read, _ in _SWITCHES]
        self._autocast = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._modes = _get_current_function_mode_stack()
        self._accelerators = found
        self._generators = [x for x in leaves if isinstance(x, torch.Generator)]
        self._random: list[torch.Tensor] | None = self._read_random()

    @property
    def autocast_dtypes(self) -> set[torch.dtype]:
        """What autocast computes in, on the device types where it is on."""
        return {dtype for _, enabled, dtype in self._autocast if enabled}

    def spacing(self, dtypes: Iterable[torch.dtype]) -> float:
        """The distance from 1 to the next number, in the coarsest arithmetic of a call on these dtypes made here.

        Autocast and TF32 count. Integers of one byte stand for quantised weights, and they and float8, whose products
        are added up in something finer, count as bfloat16.
        """
        found = [torch.finfo(torch.float64).eps]
        for dtype in {*dtypes, *self.autocast_dtypes}:
            if dtype in (torch.int8, torch.uint8):
                found.append(_COARSER["bf16"])
            elif dtype.is_floating_point or dtype.is_complex:
                found.append(min(torch.finfo(dtype).eps, _COARSER["bf16"]))
                if dtype in (torch.float32, torch.complex64):
                    found += self._coarser()
        return max(found)

    def _coarser(self) -> list[float]:
        """What float32 may have been computed in."""
        there = bool(self._accelerators)
        newer = zip(_PLACES, self._switches[: len(_PRECISIONS)], strict=False)
        said = [value for (kind, _), value in newer if there or kind != "cuda"]
        older = zip(_SWITCHES, self._switches, strict=True)
        said += [
            "tf32" if value is True else value
            for pair, value in older
            if pair is _MATMUL or (there and pair is _CUDNN_TF32)
        ]
        return [_COARSER[value] for value in said if value in _COARSER]

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
        return random_states(self._accelerators) + [g.get_state() for g in self._generators]

    def _write_random(self, states: Sequence[torch.Tensor]) -> None:
        own = len(states) - len(self._generators)
        set_random_states(self._accelerators, states[:own])
        for generator, state in zip(self._generators, states[own:], strict=True):
            generator.set_state(state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block all is as it was at the snapshot; afterwards as it was before the block."""
        switches = [read() for read, _ in _SWITCHES]
        with ExitStack() as stack:
            if self._random is not None:
                stack.callback(self._write_random, self._read_random())
                self._write_random(self._random)
            stack.callback(_write_switches, switches)
            _write_switches(self._switches)
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(
                    torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self._autocast_cache)
                )
            if (modes := _get_current_function_mode_stack()) != self._modes:
                stack.callback(_exchange_modes, modes)
                _exchange_modes(self._modes)
            yield


def _exchange_modes(modes: Sequence[TorchFunctionMode]) -> None:
    # A backward pass started under a mode runs without it: the mode is set aside while it handles the call.
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def _write_switches(values: Sequence[Any]) -> None:
    # Only what differs: some setters are slow or warn, and some settings follow others.
    for (read, write), value in zip(_SWITCHES, values, strict=True):
        if read() != value:
            write(value)
