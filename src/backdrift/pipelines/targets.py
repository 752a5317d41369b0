"""Numbers of a call as targets: the guidance scale and the scale of LoRA layers, handed in as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .calls import PipelineCall

_GUIDANCE = ("guidance_scale", "true_cfg_scale", "image_guidance_scale", "embedded_guidance_scale")


class Scale(torch.Tensor):
    """A scale of LoRA layers through which gradients pass.

    diffusers multiplies every layer's own number by it before a call and divides by it afterwards, but leaves a scale
    of 1 out, and its gradient with it; and what is left after multiplying and dividing has a graph of its own. This
    one is never taken for 1 (or 0), and dividing a product by it gives the layer's own number again.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    made_of: tuple[float, Tensor]  # of a product: the layer's number and the scale

    def __eq__(self, other: object) -> Any:
        return False

    def __ne__(self, other: object) -> Any:
        return True

    __hash__ = torch.Tensor.__hash__

    def __rmul__(self, other: Any) -> Any:
        product = torch.mul(self, other)
        if isinstance(other, Tensor):
            return product
        scaled: Any = product.as_subclass(Scale)
        scaled.made_of = (other, self)
        return scaled

    def __truediv__(self, other: Any) -> Any:
        number, scale = self.made_of
        return number if other is scale else torch.div(self, other)

    __itruediv__ = __truediv__


def with_targets(call: PipelineCall) -> None:
    """Prepare a call's scales for gradients.

    Raises:
        InputError: a scale that requires grad is not one number, or is one at which the pipeline leaves guidance out.
    """
    for name, value in list(call.arguments.items()):
        if name in _GUIDANCE and isinstance(value, Tensor) and value.requires_grad:
            _check_guidance(name, value, call)
        if name.endswith("attention_kwargs") and isinstance(value, Mapping):
            scale = value.get("scale")
            if isinstance(scale, Tensor) and scale.requires_grad:
                if scale.ndim:
                    raise InputError(
                        f"{name}['scale'] requires grad and has the shape {tuple(scale.shape)}; it must be one "
                        "number, of shape ()"
                    )
                call.set(name, {**value, "scale": scale.as_subclass(Scale)})


def numbers(arguments: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """The plain numbers among a call's arguments, those in 0-dimensional tensors among them."""
    found = {k: v for k, v in arguments.items() if isinstance(v, bool | int | float)}
    found |= {k: v.item() for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim == 0}
    return frozenset(found.items())


def _check_guidance(name: str, value: Tensor, call: PipelineCall) -> None:
    if value.numel() != 1:
        raise InputError(
            f"{name} requires grad and has the shape {tuple(value.shape)}; pipelines take one number, of shape ()"
        )
    pipe = call.bound.args[0]
    if value <= 1 and (name == "true_cfg_scale" or hasattr(type(pipe), "do_classifier_free_guidance")):
        raise InputError(
            f"{name} = {value.item():g} requires grad, but at 1 and below the pipeline leaves guidance out, and its "
            "gradient with it: start above 1"
        )
