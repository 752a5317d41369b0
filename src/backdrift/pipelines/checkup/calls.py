"""Single calls of networks, made again: compiled beside eager, and which layer's backward pass is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...accelerators import seeded
from ..forwards import own_forwards
from ..shadow import shadow, unwrapped
from ..states import own_hooks
from . import networks as look
from .differences import Leaves, judged, rounding_of, slope
from .gradient import Subject, apart
from .plainly import Call
from .rows import Row
from .verdicts import modules

_MOST = 200  # layers that are looked into


def compiled_rows(subject: Subject) -> Iterator[Row]:
    """Each compiled network's backward pass beside the eager one, on one call."""
    for key, module in modules(subject.pipe).items():
        if not look.compiled(module):
            continue
        title = f"{key}: compiled backward"
        call = next((c for c in subject.call.watch.calls.values() if c.component == key), None)
        if call is None:
            yield Row("skipped", "gradient", title, "the small call does not call it")
            continue
        try:
            error = _compiled_error(module, call, subject.seed)
        except Exception as problem:  # of the compiler
            line = (str(problem).strip().splitlines() or [""])[0]
            yield Row(
                "skipped",
                "gradient",
                title,
                f"it cannot be compiled here: {type(problem).__name__}: {line}"[:300],
            )
            continue
        dtype = next(p.dtype for p in module.parameters())
        figures = {"relative error": error}
        told = f"on one call of it {error:.1e} off the eager one (relative)"
        if error <= 256 * torch.finfo(dtype).eps:
            yield Row("ok", "gradient", title, told, figures=figures)
        else:
            yield Row(
                "warning", "gradient", title, f"{told}: wrong. A run does not use it: it calls the network uncompiled",
                f"compile pipe.{key} for sampling only, or with backend='aot_eager'",
                figures,
            )  # fmt: skip


def _compiled_error(module: nn.Module, call: Call, seed: int) -> float:
    """Largest relative difference of results and gradients by a call's inputs."""
    method = call.method
    eager = _copy_of(module)
    inner: Any = module
    found = [_pulled(getattr(inner, method) if method != "forward" else inner, call, seed)]
    found.append(_pulled(getattr(eager, method) if method != "forward" else eager, call, seed))
    return max(apart(a, b) for a, b in zip(*found, strict=True))


def _copy_of(module: nn.Module) -> nn.Module:
    """The network inside its wrappers once more, uncompiled, with hooks of its own."""
    inner = unwrapped(module)
    ours = shadow(inner, set())
    own_forwards(inner, ours)
    own_hooks(inner, ours)
    return ours


def _pulled(function: Callable[..., Any], call: Call, seed: int) -> list[Tensor | None]:
    """What a call returns, and the gradients of random weights on it by its inputs."""
    args, kwargs, leaves = _with_leaves(call.args, call.kwargs)
    with seeded(seed), torch.enable_grad():
        outputs = _floats(function(*args, **kwargs))
        draw = torch.Generator().manual_seed(seed)
        value = torch.stack([_weighted(x, draw) for x in outputs]).sum()
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return [*(x.detach() for x in outputs), *gradients]


# ---- which layer is wrong -------------------------------------------------------------------------------


def wrong_layers(subject: Subject) -> list[str]:
    """The innermost layers whose backward pass does not agree with finite differences of themselves.

    Every network that the small call called is looked into, and inside a wrong one the layers that it called.
    """
    found: list[str] = []
    for call in subject.call.watch.calls.values():
        network = _copy_of(modules(subject.pipe)[call.component])
        function = network if call.method == "forward" else getattr(network, call.method)
        name = call.component if call.method == "forward" else f"{call.component}.{call.method}"
        try:
            if _wrong(function, call, subject.seed):
                inner = _inside(network, function, call, subject.seed)
                found += [f"{call.component}.{layer}" for layer in inner] or [name]
        except Exception:  # a layer with arguments of its own kind: nothing can be said of it
            continue
    return found


def _inside(network: nn.Module, function: Callable[..., Any], call: Call, seed: int) -> list[str]:
    """The wrong layers of a network, innermost only."""
    calls: dict[str, Call] = {}
    handles = []
    for name, layer in network.named_modules():
        if name:
            handles.append(layer.register_forward_pre_hook(_keeping(calls, name), with_kwargs=True))
    try:
        with seeded(seed), torch.no_grad():
            function(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    layers = dict(network.named_modules())
    wrong: list[str] = []
    looked = 0
    level = [name for name in calls if not any(name.startswith(f"{other}.") for other in calls)]
    while level and looked < _MOST:
        name = level.pop(0)
        looked += 1
        try:
            bad = _wrong(layers[name], calls[name], seed)
        except Exception:
            bad = True  # cannot be called alone: look inside
        if not bad:
            continue
        inner = [n for n in calls if n.startswith(f"{name}.")]
        inner = [n for n in inner if not any(n.startswith(f"{other}.") for other in inner)]
        wrong = [n for n in wrong if not name.startswith(f"{n}.")] + [name]
        level = inner + level
    return wrong


def _keeping(calls: dict[str, Call], name: str) -> Callable[..., None]:
    def keep(layer: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in calls:
            kept = pytree.tree_map(
                lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs)
            )
            calls[name] = Call(name, "forward", "other", *kept)

    return keep


def _wrong(function: Callable[..., Any], call: Call, seed: int) -> bool:
    """Whether the gradient of one call by its floating-point inputs is off a finite difference."""
    _, _, given = _with_leaves(call.args, call.kwargs)
    leaves: Leaves = {k: x.detach() for k, x in given.items()}
    if not leaves:
        return False

    def run(at: Leaves) -> Tensor:
        args, kwargs, _ = _with_leaves(call.args, call.kwargs, at)
        with seeded(seed):
            outputs = _floats(function(*args, **kwargs))
        draw = torch.Generator().manual_seed(seed)
        return torch.stack([_weighted(x, draw) for x in outputs]).sum()

    moving = {k: x.clone().requires_grad_() for k, x in leaves.items()}
    with torch.enable_grad():
        out = run(moving)
        if not out.requires_grad:
            return False
        gradients = torch.autograd.grad(out, list(moving.values()), allow_unused=True)
    reached = {k: g for (k, _), g in zip(moving.items(), gradients, strict=True) if g is not None}
    leaves = {k: leaves[k] for k in reached}

    def value(at: Leaves) -> float:
        with torch.no_grad():
            return float(run(at))

    draw = torch.Generator().manual_seed(seed)
    rounding = rounding_of(value, leaves, draw)
    eps = max(torch.finfo(x.dtype).eps for x in leaves.values())
    error, tolerance = judged([slope(value, leaves, reached, draw, rounding)], max(1e-3, 16 * eps))
    return error > tolerance


def _with_leaves(args: Any, kwargs: Any, at: Leaves | None = None) -> tuple[Any, Any, Leaves]:
    """Arguments whose floating-point tensors require grad, or are those of ``at``; and these, by place."""
    values, spec = pytree.tree_flatten((args, kwargs))
    leaves: Leaves = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:  # no times
            leaves[str(i)] = values[i] = (
                at[str(i)]
                if at is not None and str(i) in at
                else value.detach().clone().requires_grad_(at is None)
            )
    args, kwargs = pytree.tree_unflatten(values, spec)
    return args, kwargs, leaves


def _floats(out: Any) -> list[Tensor]:
    found = pytree.tree_leaves(tuple(out.values()) if isinstance(out, dict) else out)
    tensors: list[Tensor] = []
    for leaf in found:
        if hasattr(leaf, "mode") and hasattr(leaf, "parameters") and isinstance(leaf.parameters, Tensor):
            leaf = leaf.parameters  # a distribution of latents
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            tensors.append(leaf)
    return tensors


def _weighted(x: Tensor, draw: torch.Generator) -> Tensor:
    weights = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    return (x.cpu().double() * weights).sum() / x.numel() ** 0.5
