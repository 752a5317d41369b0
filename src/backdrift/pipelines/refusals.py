"""Pipelines that cannot be differentiated as they stand, found before they sample and refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType, MethodType
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from .homes import accelerate_hooks, is_idle, is_model_wide, is_sequential, table_of
from .modular import is_modular
from .twins import is_no_grad, names, without_no_grad

# Found in a pipeline's code, these names mean that it cuts the graph (it takes gradients of its own). ``no_grad``
# is none of them: it does nothing in the twins that are run (see :mod:`.twins`).
_CUTTERS = {"detach": "calls detach()", "set_grad_enabled": "switches gradients off"}
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
        if not is_no_grad(call):
            raise UnsupportedError(
                f"{cls.__name__}.__call__ has a decorator other than torch.no_grad, so it cannot be run with "
                "gradients; remove the decorator"
            )
        call = call.__wrapped__
    return call


def check_pipeline(pipe: Any) -> None:
    """Refuse what the class of a pipeline rules out.

    Raises:
        UnsupportedError: not a diffusers pipeline, ONNX, made of other pipelines, or with code that cuts the
            graph between its inputs and its pictures.
    """
    from diffusers import DiffusionPipeline

    cls = plain_class(type(pipe))
    name = cls.__name__
    if name.startswith("Onnx") or "ONNX" in name:
        raise UnsupportedError(f"{name} runs in ONNX, which has no gradients; load its PyTorch version")
    if is_modular(cls):
        check_blocks(pipe)
        return
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
    if getattr(pipe, "_free_init_num_iters", None) is not None:
        raise UnsupportedError(f"{name} detaches the latents under FreeInit: pipe.disable_free_init()")
    reasons = list(_cuts(cls))
    if reasons:
        raise UnsupportedError(f"{name} cuts the gradient on its way: {'; '.join(reasons)}")


def check_blocks(pipe: Any) -> None:
    """Refuse a modular pipeline one of whose blocks cuts the graph.

    Raises:
        UnsupportedError: naming the block.
    """
    blocks = [pipe._blocks]
    for block in blocks:  # grows as blocks within blocks are found
        blocks += (getattr(block, "sub_blocks", None) or {}).values()
        reasons = list(_cuts(type(block)))
        if reasons:
            raise UnsupportedError(
                f"the block {type(block).__name__} of this modular pipeline cuts the gradient on its way: "
                f"{'; '.join(reasons)}; replace that block"
            )


def image_processors(pipe: Any) -> dict[str, Any]:
    """The pipeline's attributes that turn tensors into pictures and back, by name."""
    from diffusers.image_processor import VaeImageProcessor

    return {key: value for key, value in vars(pipe).items() if isinstance(value, VaeImageProcessor)}


def check_components(pipe: Any) -> None:
    """Refuse what the present state of the components rules out.

    Raises:
        UnsupportedError: hooks of accelerate's other than those of ``enable_model_cpu_offload()`` and
            ``enable_sequential_cpu_offload()`` (networks dispatched over devices), weights that these keep on a disk,
            or hooks over a function in place of a network's ``forward``.
    """
    advice = "pipe.remove_all_hooks(), then pipe.enable_model_cpu_offload(), or move it to one device"
    for key, module in vars(pipe).items():
        if not isinstance(module, nn.Module):
            continue
        for name, child in module.named_modules():
            where = ".".join(part for part in (key, name) if part)
            hooks = accelerate_hooks(child)
            for hook in hooks:
                known = is_idle(hook) or is_sequential(hook) or (is_model_wide(hook) and child is module)
                if not known:
                    raise UnsupportedError(
                        f"{where} has the hook {type(hook).__name__}, which moves weights between the forward and the "
                        f"backward pass: {advice}"
                    )
                if is_sequential(hook) and table_of(hook)[0] is None:
                    raise UnsupportedError(
                        f"{where} keeps its weights on a disk: load the pipeline again, and call "
                        "pipe.enable_sequential_cpu_offload(), which keeps them in memory"
                    )
            if hooks and not isinstance(child.__dict__.get("_old_forward"), MethodType):
                raise UnsupportedError(
                    f"{where} is offloaded and has a function in place of its forward: take that off, or {advice}"
                )


def reached(cls: type, start: str = "__call__") -> Iterator[tuple[str, CodeType]]:
    """Name and code of the method ``start`` and of every method that it leads to.

    Methods of the common base classes (devices, offloading, saving) are left out, and so are those that are known
    to be harmless.
    """
    from diffusers import DiffusionPipeline

    first = without_no_grad(getattr(cls, start)).__code__
    yield start, first
    seen = {start, *_HARMLESS}
    queue = sorted(set(names(first)))
    for name in queue:  # grows as methods are found
        method = inspect.getattr_static(cls, name, None)
        method = getattr(method, "__func__", method)
        if name in seen or not inspect.isfunction(method) or hasattr(DiffusionPipeline, name):
            continue
        seen.add(name)
        code = inspect.unwrap(method).__code__
        yield name, code
        queue += sorted(set(names(code)))


def _cuts(cls: type) -> Iterator[str]:
    """What in ``__call__`` and the methods it leads to takes a tensor out of the graph."""
    undecorated_call(cls)
    for name, code in reached(cls):
        used = set(names(code))
        for cutter, what in _CUTTERS.items():
            if cutter in used:
                yield f"{name} {what}"
        if name == "__call__" and {"super", "__call__"} <= used:
            yield "__call__ runs its base class's, which is under no_grad"
