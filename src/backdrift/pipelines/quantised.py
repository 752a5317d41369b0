"""Weights of frozen bases that are no floating-point numbers: torchao's tensors, bitsandbytes' layers and such."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .shadow import networks

__all__ = ["check_quantised", "is_quantised", "quantised_linears", "stand_ins"]

# What autograd can give a gradient to.
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# Libraries that round activations too, and pass gradients by as if they had not, are off by a few hundredths.
_TOLERANCE = 0.2


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight's numbers are such that autograd cannot give a gradient to them."""
    return type(weight.data) is not Tensor or weight.dtype not in _FLOATS


def quantised_linears(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Name and layer of a network's linear layers that compute with a quantised weight.

    Not those whose weight is a plain tensor of eight-bit floats: something casts it around their calls.
    """
    for name, layer in network.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or not isinstance(layer, nn.Linear) or not is_quantised(weight):
            continue
        bare = type(layer) is nn.Linear and type(weight.data) is Tensor
        if not (bare and weight.is_floating_point()):
            yield name, layer


def check_quantised(pipe: Any) -> None:
    """Refuse a pipeline with quantised layers that give no gradient, or a wrong one, by their input.

    Layers of weights alone pass gradients on. Those that quantise the activations as well round them, and whoever
    left the backward pass out gives the input no gradient: what flows round the layer still does, so nothing raises.
    One layer of each kind is tried on two rows.

    Raises:
        UnsupportedError: naming such a layer and what to do.
    """
    for key, network in networks(pipe).items():
        tried: dict[Any, tuple[str, nn.Linear]] = {}
        for name, layer in quantised_linears(network):
            kind = _kind(layer)
            if kind not in tried or layer.weight.numel() < tried[kind][1].weight.numel():
                tried[kind] = name, layer
        for name, layer in tried.values():
            if layer.weight.device.type == "meta":
                continue
            error = _error(layer, _dtype(layer, network))
            if not error <= _TOLERANCE:
                found = "no gradient" if error == float("inf") else f"a gradient that is {error:.0%} off"
                raise UnsupportedError(
                    f"{key}.{name} is quantised ({type(layer.weight.data).__name__}, {layer.weight.dtype}) so that "
                    f"{found} reaches its input (dynamic quantisation rounds activations too): quantise the weights "
                    "alone, as torchao's Int8WeightOnlyConfig and bitsandbytes do"
                )


def stand_ins(network: nn.Module) -> None:
    """Put ordinary linear layers on the meta device in place of those that compute with their weight's own state.

    For a network that is only measured. A tensor subclass looks like a float weight there; a library's own layer class
    would look for its tables. What is saved for the backward pass is the same: nothing but the weight, or, where a
    layer unpacks that for PyTorch's own product (GGUF's), the unpacked one with every call.
    """
    kinds: dict[Any, type[nn.Linear]] = {}
    for _, layer in list(quantised_linears(network)):
        if type(layer) is nn.Linear:
            continue
        kind, dtype = _kind(layer), _dtype(layer, network)
        if kind not in kinds:
            kinds[kind] = _Unpacking if _unpacks(layer, dtype) else _Linear
        weight = torch.empty((layer.out_features, layer.in_features), dtype=dtype, device="meta")
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        layer.__class__ = kinds[kind]
        layer.__dict__.pop("forward", None)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.unpacked(input.dtype), bias)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class _Unpacking(_Linear):
    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype, copy=True)


def _unpacks(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether a call saves a tensor as large as the weight that is not the weight."""
    if layer.weight.device.type == "meta":
        return False
    own = layer.weight.untyped_storage()._cdata if layer.weight.layout == torch.strided else None
    found: list[bool] = []

    def look(tensor: Tensor) -> Tensor:
        large = tensor.numel() == layer.in_features * layer.out_features
        found.append(large and type(tensor) is Tensor and tensor.untyped_storage()._cdata != own)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        _forward(layer, _rows(layer, dtype).requires_grad_())
    return any(found)


def _kind(layer: nn.Linear) -> Any:
    """What layers that compute alike have in common."""
    flatten = getattr(layer.weight.data, "__tensor_flatten__", None)
    how = repr(flatten()[1]) if flatten is not None else ""
    return type(layer), type(layer.weight.data), layer.weight.dtype, how


def _dtype(layer: nn.Linear, network: nn.Module) -> torch.dtype:
    """The dtype that the layer is called with: the network's own."""
    floats = (p.dtype for p in network.parameters() if not is_quantised(p))
    return layer.weight.dtype if layer.weight.dtype in _FLOATS else next(floats, torch.float32)


def _error(layer: nn.Linear, dtype: torch.dtype) -> float:
    """How far the gradient by the layer's input is from differences of its output; infinite if there is none.

    A linear layer's differences are exact for any step, so the step is as large as the input, along the gradient.
    """
    rows = _rows(layer, dtype)
    with torch.enable_grad():
        x = rows.clone().requires_grad_()
        out = _forward(layer, x)
        onto = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).reshape(out.shape).to(rows.device)
        if not out.requires_grad:
            return float("inf")
        (found,) = torch.autograd.grad((out.float() * onto).sum(), x, allow_unused=True)
    if found is None or not found.any():
        return float("inf")
    with torch.no_grad():
        gradient = found.float()
        step = gradient * (rows.float().norm() / gradient.norm())
        ahead, behind = (_forward(layer, (rows.float() + s * step).to(dtype)).float() for s in (1, -1))
        true = float(((ahead - behind) * onto).sum() / 2)
        claimed = float((gradient * step).sum())
    return abs(claimed - true) / abs(true) if true else float("inf")


def _rows(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Two inputs of a layer. No random numbers are drawn."""
    values = torch.cos(torch.arange(2 * layer.in_features, dtype=torch.float32))
    return values.reshape(2, -1).to(layer.weight.device, dtype)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output, without the user's hooks.

    On a copy with a bias of its own: libraries settle the dtype of their arithmetic, and cast the bias in place, by the
    first input that they see, and this is not the user's.
    """
    ours = copy.copy(layer)
    ours.__dict__["_parameters"] = dict(layer._parameters)
    if layer.bias is not None:
        ours._parameters["bias"] = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return type(layer).forward(ours, x)
