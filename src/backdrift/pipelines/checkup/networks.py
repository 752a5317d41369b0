"""Rows on each network by itself: what it is, where it is, in what precision and mode, with which weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..casting import HOOK as CASTING
from ..forwards import patched
from ..homes import MOVING
from ..quantised import is_quantised
from ..shadow import unwrapped
from ..states import hooks_of
from .rows import Row
from .verdicts import modules

TOPIC = "networks"


def network_rows(pipe: Any) -> Iterator[Row]:
    """One row for each network."""
    for key, module in modules(pipe).items():
        if key == "safety_checker":
            continue
        weights = list(unwrapped(module).parameters())
        facts = [
            type(unwrapped(module)).__name__,
            count_of(sum(p.numel() for p in weights)),
            ", ".join(_names(str(p.dtype) for p in weights)),
            ", ".join(_names(str(p.device) for p in weights)),
            _mode(module),
        ]
        noisy = noise_of(module)
        if noisy:
            yield Row(
                "warning", TOPIC, key, ", ".join(filter(None, facts)) + f": {noisy}",
                f"pipe.{key}.eval(), unless it is meant: the same call gives another picture each time",
            )  # fmt: skip
        elif not weights:
            yield Row("ok", TOPIC, key, f"{facts[0]} without weights")
        else:
            yield Row("ok", TOPIC, key, ", ".join(filter(None, facts)))


def noise_of(module: nn.Module) -> str:
    """What makes a network in train mode compute something else each time; "" if nothing does."""
    found = Counter(
        type(child).__name__
        for child in module.modules()
        if child.training
        and (
            (isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0)
            or isinstance(child, nn.modules.batchnorm._BatchNorm)
        )
    )
    return ", ".join(f"{n} {name}" for name, n in found.items()) + " at work in train mode" if found else ""


def count_of(number: int) -> str:
    """A number of weights to read."""
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.3g}{unit} weights"
    return f"{number} weights"


def _names(values: Iterator[str]) -> list[str]:
    """Each once, the most frequent first."""
    return [name.removeprefix("torch.") for name, _ in Counter(values).most_common()]


def _mode(module: nn.Module) -> str:
    modes = {child.training for child in module.modules()}
    return "train and eval mode mixed" if len(modes) == 2 else f"{'train' if modes.pop() else 'eval'} mode"


# ---- what a user has set up on a network; each "" or none where it is not there ------------------------


def offloading(module: nn.Module) -> str:
    """The hooks of accelerate's and diffusers' that move weights."""
    names = Counter(
        type(child.__dict__["_hf_hook"]).__name__
        for child in module.modules()
        if "_hf_hook" in child.__dict__
    )
    names.update(hook for _, _, hook, _ in hooks_of(module) if hook in MOVING)
    return ", ".join(f"{n} x {name}" for name, n in names.items())


def caches(module: nn.Module) -> str:
    """diffusers' other hooks: caches over the steps, guidance that skips layers."""
    names = Counter(hook for _, _, hook, _ in hooks_of(module) if hook not in MOVING and hook != CASTING)
    return ", ".join(f"{name} on {n} layer{'s' if n > 1 else ''}" for name, n in names.items())


def cast(module: nn.Module) -> str:
    """Layers whose weights are cast around their calls."""
    kinds = Counter(
        f"{str(hook.storage_dtype)[6:]} to {str(hook.compute_dtype)[6:]}"
        for _, _, name, hook in hooks_of(module)
        if name == CASTING
    )
    return ", ".join(f"{n} layers from {kind}" for kind, n in kinds.items())


def own_forwards(module: nn.Module) -> str:
    """Layers with a function in place of one of their methods, and which; compiled ones are not told here."""
    found = [x for x in patched(unwrapped(module)) if x[1].__dict__[x[2]] is x[3]]
    return ", ".join(f"{method} of {name or 'the network itself'}" for name, _, method, _ in found)


def compiled(module: nn.Module) -> bool:
    """Whether the network, or layers of it, are called through ``torch.compile``."""
    methods = any(child.__dict__[method] is not fn for _, child, method, fn in patched(module))
    return methods or any(
        hasattr(m, "_orig_mod") or m.__dict__.get("_compiled_call_impl") is not None for m in module.modules()
    )


def in_parallel(module: nn.Module) -> bool:
    """Whether the network is called through ``DistributedDataParallel``."""
    return isinstance(getattr(module, "_orig_mod", module), nn.parallel.DistributedDataParallel)


def quantised(module: nn.Module) -> str:
    """Weights whose numbers autograd cannot give a gradient to."""
    kinds = Counter(
        f"{type(p.data).__name__ if type(p.data) is not torch.Tensor else type(p).__name__}, {p.dtype}"
        for p in unwrapped(module).parameters()
        if p.device.type != "meta" and is_quantised(p)
    )
    return ", ".join(f"{n} tensors ({kind})" for kind, n in kinds.items())


def processors(module: nn.Module) -> Counter[tuple[str, str]]:
    """Class and module of the attention processors, and how many there are."""
    found: Counter[tuple[str, str]] = Counter()
    for child in module.modules():
        processor: Any = child.__dict__.get("processor", child._modules.get("processor"))
        if processor is not None:
            found[type(processor).__name__, type(processor).__module__] += 1
    return found


def checkpointed(module: nn.Module) -> int:
    """How many blocks redo themselves in their backward pass (in train mode)."""
    return sum(child.__dict__.get("gradient_checkpointing") is True for child in module.modules())
