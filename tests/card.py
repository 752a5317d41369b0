"""A second device, "card:0", that any machine has: its kernels are the CPU's, but for tensors of its own.

PyTorch keeps one slot for a kind of device from outside it; this fills the slot from Python, for the whole process. As
on a GPU, a kernel that is given tensors of both devices raises, backward passes run in a thread of their own, random
numbers come from the card's own generator, NumPy cannot read its tensors, and bytes are counted. A tensor of the card
stands for memory on the CPU: its storage knows the CPU's storage, by which views are told.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "card"
_C, aten = torch._C, torch.ops.aten
_ON_CPU = _C.DispatchKeySet(_C.DispatchKey.CPU)


class Mixed(RuntimeError):
    """A kernel was given tensors of both devices."""


class Card:
    """What the device has, and what it has been asked for.

    Attributes:
        total: its bytes.
        allocated, peak: bytes of its tensors, now and at most since ``torch.card.reset_peak_memory_stats()``.
        float64: whether it knows that dtype (Apple's does not).
        waits: how often numbers were read from it, which a GPU's queue has to be empty for.
        random: its generator.
    """

    def __init__(self) -> None:
        self.total = 8 * 2**30
        self.allocated = self.peak = self.waits = 0
        self.float64 = True
        self.random = torch.Generator().manual_seed(0)


CARD = Card()
_storages: dict[int, weakref.ref[Any]] = {}  # a storage of the CPU's -> the card's that stands for it


def _freed(nbytes: int, key: int) -> None:
    CARD.allocated -= nbytes
    _storages.pop(key, None)


def _storage(real: Any) -> Any:
    """The card's storage that stands for one of the CPU's."""
    key = real._cdata
    found = _storages[key]() if key in _storages else None
    if found is None or found.nbytes() != real.nbytes():
        found = _C._construct_storage_from_data_pointer(real.data_ptr(), DEVICE, real.nbytes())
        found.real = real
        _storages[key] = weakref.ref(found)
        CARD.allocated += real.nbytes()
        CARD.peak = max(CARD.peak, CARD.allocated)
        weakref.finalize(found, _freed, real.nbytes(), key)
    return found


def _lay(tensor: Tensor, real: Tensor) -> Tensor:
    """Let a tensor of the card lie where a tensor of the CPU lies."""
    place = (_storage(real.untyped_storage()), real.storage_offset(), real.size(), real.stride())
    # The CPU's kernel of this one looks at sizes only.
    aten.set_.source_Storage_storage_offset.redispatch(_ON_CPU, tensor, *place)
    return tensor


def wrap(real: Tensor) -> Tensor:
    """The card's tensor over a CPU tensor's memory."""
    if real.dtype in (torch.float64, torch.complex128) and not CARD.float64:
        raise TypeError("Cannot convert a card Tensor to float64 dtype as the card doesn't support float64")
    return _lay(_C._acc.create_empty_tensor((0,), real.dtype), real)


def unwrap(tensor: Tensor) -> Tensor:
    """The CPU tensor over a card tensor's memory."""
    storage = tensor.untyped_storage()
    if not hasattr(storage, "real"):  # made by PyTorch, with nothing in it
        storage.real = torch.UntypedStorage(storage.nbytes())
        _storages[storage.real._cdata] = weakref.ref(storage)
    return torch.empty(0, dtype=tensor.dtype).set_(
        storage.real, tensor.storage_offset(), tensor.size(), tensor.stride()
    )


def _is_card(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == NAME


# ---- kernels ---------------------------------------------------------------------------------------------

# Beside numbers, what a GPU's kernels take from the CPU: what is copied, and indices.
_MAY_MIX = {
    "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_", "aten::index", "aten::index_put_",
    "aten::_index_put_impl_",
}  # fmt: skip


def _convolution_backward(
    grad: Tensor, x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, transposed: bool, *more: Any
) -> Any:
    outputs, groups, mask = more
    channels = w.shape[1] * groups if transposed else w.shape[0]
    given = (stride, padding, dilation, transposed, outputs, groups, mask)
    return aten.convolution_backward(grad, x, w, [channels], *given)


# What PyTorch asks of a device from outside by another name, or would do in parts that take contiguous tensors only.
_OWN: dict[Any, Callable[..., Any]] = {
    aten.convolution_overrideable.default: aten.convolution.default,
    aten.convolution_backward_overrideable.default: _convolution_backward,
    aten.native_group_norm.default: aten.native_group_norm.default,
    aten.native_layer_norm.default: aten.native_layer_norm.default,
}


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any kernel of the card."""
    flat, spec = tree_flatten((args, kwargs))
    _check_together(op, flat)
    if op._schema.name == "aten::_copy_from":
        return _copied(*flat[:2])
    CARD.waits += op._schema.name == "aten::_local_scalar_dense"
    reals = [unwrap(x) if _is_card(x) else x for x in flat]
    ours = {id(real): x for real, x in zip(reals, flat, strict=True) if _is_card(x)}
    on_cpu = [torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x for x in reals]
    real_args, real_kwargs = tree_unflatten(on_cpu, spec)
    out = _drawn(op, _numbers_in_tensors(op, real_args), {**real_kwargs, **_unpinned(real_kwargs)})
    for real in reals:
        if id(real) in ours and _moved(real, ours[id(real)]):  # resized, or given another storage
            _lay(ours[id(real)], real)

    def back(x: Any) -> Any:
        return x if not isinstance(x, Tensor) else ours[id(x)] if id(x) in ours else wrap(x)

    return tree_map(back, out)


def _check_together(op: Any, flat: list[Any]) -> None:
    if op._schema.name in _MAY_MIX or not any(map(_is_card, flat)):
        return
    for x in flat:
        if (
            isinstance(x, Tensor)
            and x.device.type == "cpu"
            and (x.dim() or torch.Tag.pointwise not in op.tags)
        ):
            raise Mixed(f"{op}: all tensors should be on card:0; one of shape {tuple(x.shape)} is on the cpu")


def _copied(source: Tensor, goal: Tensor) -> Tensor:
    CARD.waits += not _is_card(goal)
    (unwrap(goal) if _is_card(goal) else goal).copy_(unwrap(source) if _is_card(source) else source)
    return goal


def _drawn(op: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU; if it draws random numbers, the card's."""
    run = _OWN.get(op, op)
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return run(*args, **kwargs)
    outside = torch.get_rng_state()
    torch.set_rng_state(CARD.random.get_state())
    try:
        return run(*args, **kwargs)
    finally:
        CARD.random.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


def _numbers_in_tensors(op: Any, args: Any) -> list[Any]:
    """Plain numbers arrive as such where a kernel wants them in a tensor."""
    made = list(args)
    like = next((x for x in made if isinstance(x, Tensor) and x.is_floating_point()), None)
    for i, (given, wanted) in enumerate(zip(made, op._schema.arguments, strict=False)):
        if isinstance(given, int | float) and str(wanted.type) == "Tensor":
            made[i] = torch.tensor(given, dtype=None if like is None else like.dtype)
    return made


def _unpinned(kwargs: Any) -> dict[str, Any]:
    return {"pin_memory": False} if kwargs.get("pin_memory") else {}


def _moved(real: Tensor, ours: Tensor) -> bool:
    same = real.size() == ours.size() and real.stride() == ours.stride()
    return not same or real.untyped_storage()._cdata != ours.untyped_storage().real._cdata


# ---- the device ------------------------------------------------------------------------------------------


def _module() -> Any:
    """What ``torch.card`` is: as much of ``torch.cuda`` as is asked for."""

    def reset(device: Any = None) -> None:
        CARD.peak = CARD.allocated

    def seed(seed: int) -> None:
        CARD.random.manual_seed(seed)

    def set_state(state: Tensor, device: Any = None) -> None:
        CARD.random.set_state(state)

    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "a card in software",
        "synchronize": lambda device=None: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": lambda device=None: CARD.random.get_state(),
        "set_rng_state": set_state,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "memory_allocated": lambda device=None: CARD.allocated,
        "memory_reserved": lambda device=None: CARD.allocated,
        "max_memory_allocated": lambda device=None: CARD.peak,
        "reset_peak_memory_stats": reset,
        "mem_get_info": lambda device=None: (CARD.total - CARD.allocated, CARD.total),
        "empty_cache": lambda: None,
    }
    made = types.ModuleType(f"torch.{NAME}")
    vars(made).update(functions)
    return made


def _own(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _kernel(op, *args, **kwargs)


torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_module())
DEVICE = torch.device(NAME, 0)
_ALL, _SOME = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_ALL.fallback(_kernel, "PrivateUse1")
_ALL.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _op in _OWN:
    _SOME.impl(_op, _own(_op), "PrivateUse1")
