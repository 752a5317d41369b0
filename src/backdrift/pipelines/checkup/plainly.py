"""Calls without backdrift's memory plans: the pipeline's own code, watched, or with all activations kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...accelerators import in_use, wait
from ...errors import UnsupportedError
from ..calls import PipelineCall
from ..clone import clone_of
from ..draws import Noise, drawing
from ..endings import ending_of
from ..modular import is_modular
from ..offloaded import Offloading, methods_of
from ..outputs import first_tensor, unclamped
from ..refusals import image_processors, plain_class, undecorated_call
from ..rehearsal import role_of
from ..shadow import copied_scheduler, unwrapped
from ..states import hooks_of
from . import networks as look
from .verdicts import modules, schedulers


@contextmanager
def hushed() -> Iterator[None]:
    """Inside the block diffusers' log says errors only: some pipelines remark on every call."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def quiet(pipe: Any) -> Any:
    """The same pipeline (on the same networks) without its progress bar, on tokenizers of its own.

    A tokenizer remembers how it was called last.
    """
    own = copy.copy(pipe)
    own.__class__ = plain_class(type(pipe))
    own.__dict__["_progress_bar_config"] = {"disable": True}
    own.__dict__.update({k: copy.deepcopy(v) for k, v in vars(pipe).items() if k.startswith("tokenizer")})
    return own


@dataclass
class Call:
    """One call of a network, to be made again.

    Attributes:
        component: its name in the pipeline.
        method: ``"forward"``, ``"decode"`` or ``"encode"``.
        role: ``"network"``, ``"decoder"`` or ``"other"``.
        args, kwargs: detached.
    """

    component: str
    method: str
    role: str
    args: Any
    kwargs: Any


@dataclass
class Watch:
    """What is seen of one call of a pipeline.

    Attributes:
        seconds: of each call of a network, by component and method.
        calls: the first call of each.
        drawn: shapes of the noises that the pipeline drew, in that order.
        encoded: what ``encode_prompt`` returned first.
    """

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    calls: dict[tuple[str, str], Call] = field(default_factory=dict)
    drawn: list[tuple[int, ...]] = field(default_factory=list)
    encoded: Any = None

    def dress(self, name: str, module: nn.Module) -> nn.Module:
        for method in methods_of(name, module):
            watched = self._watched(getattr(module, method), name, method, role_of(name, module))
            setattr(module, method, watched)
        return module

    def over(self, clone: Any) -> None:
        encode = getattr(clone, "encode_prompt", None)
        if encode is None:
            return

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            found = encode(*args, **kwargs)
            self.encoded = found if self.encoded is None else self.encoded
            return found

        clone.__dict__["encode_prompt"] = encode_prompt

    def _watched(self, fn: Callable[..., Any], name: str, method: str, role: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            key = (name, method)
            if key not in self.calls:
                kept = pytree.tree_map(
                    lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs)
                )
                self.calls[key] = Call(name, method, role, *kept)
            settle()
            began = time.perf_counter()
            out = fn(*args, **kwargs)
            settle()
            self.seconds.setdefault(key, []).append(time.perf_counter() - began)
            return out

        return watched


def settle() -> None:
    """Wait for the devices, so that times are their own."""
    for device in in_use():
        wait(device)


def sampled(
    pipe: Any,
    arguments: dict[str, Any],
    *,
    noise: Tensor | None = None,
    watch: Watch | None = None,
    trained: set[int] | frozenset[int] = frozenset(),
    dress: Callable[[str, nn.Module], nn.Module] | None = None,
) -> Tensor:
    """What the pipeline's own code returns, run on copies of its networks that share their weights.

    No call is redone: with gradients on, this is plain autograd. Nothing of the user's is changed.

    Args:
        noise: takes the place of the pipeline's own first draw of its shape.
        trained: ``id`` of the weights that get gradients.
        dress: what is made of each copied network.

    Raises:
        UnsupportedError: no tensor comes back.
    """
    ending = ending_of(plain_class(type(pipe)), False)
    call = PipelineCall.of(pipe, (), arguments, ending.output_type if ending is not None else "pt")

    offloading = Offloading(pipe)

    def dressed(name: str, module: nn.Module) -> nn.Module:
        if dress is not None:
            module = dress(name, module)
        residence = offloading.residence(name, module)
        if residence is not None:
            for method in methods_of(name, module):
                setattr(module, method, residence.around(getattr(module, method)))
        if watch is not None:
            watch.dress(name, module)
        return stays_upcast(module) if hasattr(module, "decode") else module

    clone = clone_of(pipe, set(trained), dressed)
    offloading.place(clone)
    if clone.__dict__.get("safety_checker") is not None:
        clone.__dict__["safety_checker"] = None
    waiting = Noise(torch.empty(0) if noise is None else noise)
    if watch is not None:
        watch.over(clone)
    with offloading, offloading.saving(), drawing(waiting), nullcontext() if ending is None else ending:
        out = call.run(clone)
    if watch is not None:
        watch.drawn = waiting.drawn
    if noise is not None:
        waiting.check()
    result = first_tensor(out if ending is None else ending.in_place_of_arrays(out))
    if result is None:
        raise UnsupportedError(f"{plain_class(type(pipe)).__name__} returned no tensor")
    return result


def stays_upcast(module: nn.Module) -> nn.Module:
    """A decoder that can be made more precise but not less: casting it back before ``backward`` breaks its graph."""

    def to(*args: Any, **kwargs: Any) -> Any:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        present = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        if dtype is not None and present is not None and dtype.itemsize < present.itemsize:
            return module
        return type(module).to(module, *args, **kwargs)

    module.__dict__["to"] = to
    return module


@contextmanager
def untouched(pipe: Any) -> Iterator[None]:
    """Afterwards the networks have the attributes that they had before: some leave registries and caches behind."""
    before = [(m, dict(m.__dict__)) for module in modules(pipe).values() for m in module.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def runs_undecorated(pipe: Any) -> bool:
    """Whether plain autograd can go through the user's own networks and leave no trace in them."""
    cls = plain_class(type(pipe))
    if is_modular(cls) or ending_of(cls, False) is not None:
        return False
    vae = getattr(pipe, "vae", None)
    if getattr(vae, "dtype", None) == torch.float16 and getattr(
        getattr(vae, "config", None), "force_upcast", False
    ):
        return False  # it is cast back before the backward pass
    return not any(
        unwrapped(module) is not module
        or look.compiled(module)
        or look.offloading(module)
        or next(hooks_of(module), None) is not None
        for module in modules(pipe).values()
    )


def undecorated(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """The pipeline's undecorated call on the user's own networks, gradients on: what a user would write by hand."""
    own = quiet(pipe)
    # Multistep schedulers keep the last outputs, here with all their graphs: not in the user's scheduler.
    own.__dict__.update({key: copied_scheduler(value) for key, value in schedulers(pipe).items()})
    own.__dict__.update({key: unclamped(value) for key, value in image_processors(pipe).items()})
    for name in ("safety_checker", "watermark"):
        if own.__dict__.get(name) is not None:
            own.__dict__[name] = None
    with untouched(own):
        out = undecorated_call(type(own))(own, **arguments, output_type="pt")
    result = first_tensor(out)
    if result is None:
        raise UnsupportedError(f"{type(own).__name__} returned no tensor")
    return result
