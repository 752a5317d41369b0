"""Counts what tensors would hold, and the arithmetic, of operations that run on the meta device (or on any other)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_aten = torch.ops.aten
# Where its queries, keys and values begin, and its products in forward passes: two forward, five backward.
_FUSED = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 1.0),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 2.5),
}


# Arguments -> whether the result is a tuple, and what is in it. For all counts: networks are made of equal blocks.
_SHAPES: dict[Any, tuple[bool, list[Any]]] = {}


class Count(TorchDispatchMode):
    """Inside the block: bytes of the storages made there, each once, and floating-point operations.

    A result that shares an argument's storage is no new tensor. Sums of gradients that autograd makes in place (it
    does not while a mode is active) are counted as if in place. Scratch memory inside kernels is not seen.

    Attributes:
        live: bytes held now.
        peak: the most since :meth:`reset_peak`.
        guests: bytes of copies of weights now, which are in neither.
        largest: the most of them since :meth:`reset_peak`.
        together: the most of both at a time since :meth:`reset_peak`.
        moved: bytes of all guests so far.
        paused: while true, nothing is counted.
        flops: of matrix products, convolutions and attentions; a multiply-add is two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.guests = self.largest = self.together = self.moved = 0
        self.paused = False
        self._watched: dict[int, Any] = {}
        self._late: tuple[Any, int] | None = None

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.settle()
        self.peak, self.largest, self.together = self.live, self.guests, self.live + self.guests

    def admit(self, storage: torch.UntypedStorage) -> None:
        """Count a copy of weights as a guest until it is freed."""
        key, nbytes = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.guests -= nbytes
            self._watched.pop(key, None)

        self.settle()
        self._watched[key] = weakref.ref(storage, gone)
        self.guests += nbytes
        self.moved += nbytes
        self.largest = max(self.largest, self.guests)
        self.together = max(self.together, self.live + self.guests)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        self.settle()
        out = self._run(func, args, kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in _FUSED:
            first, times = _FUSED[packet]
            self.flops += int(times * sdpa_flop_count(*(t.shape for t in args[first : first + 3])))
        given: set[int] | None = None
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._watched:
                continue
            if given is None:
                given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
            if key in given:
                continue
            if func is _aten.add.Tensor and not torch.is_grad_enabled() and _in_backward():
                self._late = (weakref.ref(storage), storage.nbytes())
            else:
                self._watch(storage)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What ``func`` returns. On the meta device PyTorch works out shapes in Python, so they are remembered."""
        key = _signature(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if key not in _SHAPES:
            out = func(*args, **kwargs)
            items = out if isinstance(out, tuple) else (out,)
            if all(t is None or (type(t) is torch.Tensor and t.is_meta) for t in items):
                sizes = [None if t is None else (t.shape, t.stride(), t.dtype) for t in items]
                if len(_SHAPES) > 50_000:
                    _SHAPES.clear()
                _SHAPES[key] = (isinstance(out, tuple), sizes)
            return out
        several, sizes = _SHAPES[key]
        made = tuple(
            None if s is None else torch.empty_strided(s[0], s[1], dtype=s[2], device="meta") for s in sizes
        )
        return made if several else made[0]

    def settle(self) -> None:
        """Count what the last operation made, if that had to wait for the next one."""
        # A sum of gradients: if the first of them has been freed by now, the sum has taken its place.
        if self._late is not None:
            storage = self._late[0]()
            self._late = None
            if storage is not None:
                self._watch(storage)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= nbytes
            self._watched.pop(key, None)

        self._watched[key] = weakref.ref(storage, freed)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        self.together = max(self.together, self.live + self.guests)


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: queries, keys, values, output and one number per row are saved.

    That is what the CPU's kernel saves, and on CUDA the flash, memory-efficient and cuDNN ones. The meta device alone
    would take the unfused one, which saves every weight matrix. Left alone where fused kernels are switched off.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and torch.backends.cuda.flash_sdp_enabled():
            return self._fused(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _fused(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        plain = query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
        if dropout_p > 0 or not plain or (attn_mask is not None and attn_mask.requires_grad):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


@cache
def _pure(func: Any) -> bool:
    """Whether an operator makes new tensors only, and the same ones for the same arguments."""
    schema = func._schema
    values = [*schema.arguments, *schema.returns]
    return all(v.alias_info is None for v in values) and all("Tensor" in str(v.type) for v in schema.returns)


def _signature(func: Any, args: Any, kwargs: Any) -> Any:
    """What the shapes of the results depend on; None where they are not remembered."""
    if not _pure(func):
        return None
    found: list[Any] = [func]

    def add(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            if not value.is_meta:
                return False
            found.append((value.shape, value.stride(), value.dtype))
            return True
        if isinstance(value, list | tuple):
            found.append(len(value))
            return all(map(add, value))
        found.append((type(value), value))
        return value is None or isinstance(value, int | float | torch.dtype | torch.layout | torch.device)

    known = all(map(add, args)) and all(
        add(value) for item in kwargs.items() for value in (hash(item[0]), item[1])
    )
    return tuple(found) if known else None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    # The arguments of an operator are flat but for lists: some five times as fast as a tree walk.
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
