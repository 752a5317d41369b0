"""Pipelines that cannot be differentiated as they stand, found before they sample and refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import nn

from ..errors import UnsupportedError

# Found in a pipeline's code, these names mean that it cuts the graph (it takes gradients of its own, or saves
# memory).
_CUTTERS = {
    "detach": "calls detach()",
    "no_grad": "uses no_grad()",
    "inference_mode": "uses inference_mode()",
}
# Methods that cut the graph but only where no gradient passes: text before it is encoded, flags beside the
# pictures, and options that are off unless asked for.
_HARMLESS = {
    "enhance_prompt",
    "_enhance_prompt_with_pe",
    "run_safety_checker",
    "_apply_free_init",
    "upcast_vae",
}


def plain_class(cls: Any) -> Any:
    """The pipeline's own class, where a block of ``differentiable`` has put another in its place."""
    return cls.__dict__.get("_backdrift_base", cls)


def undecorated_call(cls: type) -> Callable[..., Any]:
    """The pipeline's ``__call__`` without the ``no_grad`` around it.

    Raises:
        UnsupportedError: another decorator hides it.
    """
    call: Any = cls.__call__
    while hasattr(call, "__wrapped__"):
        # The code object tells whose wrapper it is; its other attributes are copied from what it wraps.
        if not call.__code__.co_filename.replace("\\", "/").endswith("torch/utils/_contextlib.py"):
            raise UnsupportedError(
                f"{cls.__name__}.__call__ has a decorator other than torch.no_grad, so it cannot be run with "
                "gradients; remove the decorator"
            )
        call = call.__wrapped__
    return call


def check_pipeline(pipe: Any) -> None:
    """Refuse what the class of a pipeline rules out.

    Raises:
        UnsupportedError: not a diffusers pipeline, ONNX, modular, made of other pipelines, without an image
            processor, or with code that cuts the graph between its inputs and its pictures.
    """
    from diffusers import DiffusionPipeline

    cls = plain_class(type(pipe))
    name = cls.__name__
    if name.startswith("Onnx") or "ONNX" in name:
        raise UnsupportedError(f"{name} runs in ONNX, which has no gradients; load its PyTorch version")
    if "Modular" in name or any("Modular" in base.__name__ for base in cls.__mro__):
        raise UnsupportedError(
            f"{name} is a modular pipeline, whose blocks run under no_grad; load the ordinary pipeline"
        )
    if not isinstance(pipe, DiffusionPipeline):
        raise UnsupportedError(
            f"{name} is not a diffusers pipeline; for your own network use backdrift.sample"
        )
    inner = [key for key, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)]
    if inner or "Combined" in name:
        raise UnsupportedError(
            f"{name} is made of other pipelines ({', '.join(inner) or 'combined'}); make those differentiable, "
            "and hand the first one's output to the next"
        )
    if not image_processors(pipe):
        raise UnsupportedError(
            f"{name} makes its pictures without an image processor, through numpy, where gradients end"
        )
    if getattr(pipe, "_free_init_num_iters", None) is not None:
        raise UnsupportedError(f"{name} detaches the latents under FreeInit: pipe.disable_free_init()")
    reasons = list(_cuts(cls))
    if reasons:
        raise UnsupportedError(f"{name} cuts the gradient on its way: {'; '.join(reasons)}")


def image_processors(pipe: Any) -> dict[str, Any]:
    """The pipeline's attributes that turn tensors into pictures and back, by name."""
    from diffusers.image_processor import VaeImageProcessor

    return {key: value for key, value in vars(pipe).items() if isinstance(value, VaeImageProcessor)}


def check_components(pipe: Any) -> None:
    """Refuse what the present state of the components rules out.

    Raises:
        UnsupportedError: offloading or dispatch hooks, diffusers hooks, or caches that carry one step's
            activations into the next.
    """
    for key, module in vars(pipe).items():
        if not isinstance(module, nn.Module):
            continue
        if getattr(module, "is_cache_enabled", False):
            raise UnsupportedError(
                f"{key} has a cache over the steps, so its calls depend on each other: {key}.disable_cache()"
            )
        for child in module.modules():
            if "_hf_hook" in child.__dict__:
                raise UnsupportedError(
                    f"{key} has offloading or dispatch hooks, which move weights between the forward and the "
                    "backward pass; call pipe.remove_all_hooks() and move the pipeline to one device"
                )
            hooks = getattr(child.__dict__.get("_diffusers_hook"), "hooks", None)
            if hooks:
                raise UnsupportedError(
                    f"{key} has diffusers hooks ({', '.join(hooks)}), which replace weights or results "
                    "behind a call; remove them first"
                )


def _cuts(cls: type) -> Iterator[str]:
    """What in ``__call__`` and the methods it leads to takes a tensor out of the graph."""
    from diffusers import DiffusionPipeline

    call = undecorated_call(cls)
    yield from _cut_in("__call__", call.__code__)
    seen = {"__call__", *_HARMLESS}
    queue = sorted(set(_names(call.__code__)))
    for name in queue:  # grows as methods are found
        method = inspect.getattr_static(cls, name, None)
        method = getattr(method, "__func__", method)
        # Methods of the common base (devices, offloading, saving) mention no_grad for their own reasons.
        if name in seen or not inspect.isfunction(method) or hasattr(DiffusionPipeline, name):
            continue
        seen.add(name)
        code = inspect.unwrap(method).__code__
        if method.__code__ is not code and method.__code__.co_filename.endswith("_contextlib.py"):
            yield f"{name} runs under no_grad"
        else:
            yield from _cut_in(name, code)
            queue += sorted(set(_names(code)))


def _cut_in(name: str, code: CodeType) -> Iterator[str]:
    used = set(_names(code))
    for cutter, what in _CUTTERS.items():
        if cutter in used:
            yield f"{name} {what}"


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
