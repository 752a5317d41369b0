"""Pipelines whose networks wait on the CPU until they are called, and a device that counts what is there.

The "device" is the CPU too: there copies are made, given up and loaded again exactly as on a card, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from traps import Trap

from backdrift import residence
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

TRAP = Trap(
    "`enable_model_cpu_offload()`, sequential and group offloading, accelerate's hooks",
    "the hooks are taken off and put on again after each call, so the second call is plain autograd without a word.",
)
CPU = torch.device("cpu")


def sequential(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    for module in (value for value in vars(pipe).values() if isinstance(value, nn.Module)):
        for child in module.modules():
            hooks = getattr(getattr(child, "_hf_hook", None), "hooks", [getattr(child, "_hf_hook", None)])
            for hook in hooks:
                if getattr(hook, "execution_device", None) is not None:
                    # A Parameter's copy on "cpu:0" is no Parameter, and accelerate wants one.
                    hook.execution_device = CPU


WAYS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "leaves": lambda pipe: pipe.enable_group_offload(CPU, CPU, "leaf_level"),
    "blocks": lambda pipe: pipe.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1),
    "pairs": lambda pipe: pipe.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=2),
}
PIPELINES = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


class Watched(residence.Turns):
    """Notes which phases have copies on the device together."""

    def __init__(self, device: torch.device, made: list[Watched]) -> None:
        super().__init__(device)
        self.together: list[set[str]] = []
        made.append(self)

    def note(self) -> None:
        super().note()
        self.together.append({m.phase for copy in self._homes.values() if (m := copy.member()) is not None})


def leaves_of(pipe: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    embeds = {k: v.to(dtype).requires_grad_() for k, v in embeds_for(pipe).items()}
    return {**embeds, "latents": noise_for(pipe).to(dtype).requires_grad_()}


def size() -> dict[str, int]:
    return {"height": PICTURE, "width": PICTURE, "num_inference_steps": 2}


def loss_of(images: torch.Tensor) -> torch.Tensor:
    return (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum()


def network_of(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def addresses(pipe: Any) -> list[int]:
    networks = [value for value in vars(pipe).values() if isinstance(value, nn.Module)]
    return [t.data_ptr() for m in networks for t in (*m.parameters(), *m.buffers())]


def hooks_of(pipe: Any) -> list[Any]:
    """The hooks on a pipeline's networks, as they are."""
    found: list[Any] = []
    for network in (value for value in vars(pipe).values() if isinstance(value, nn.Module)):
        for child in network.modules():
            registry = child.__dict__.get("_diffusers_hook")
            found += [child.__dict__.get("_hf_hook"), child.__dict__.get("forward"), registry]
            found += [] if registry is None else list(registry.hooks.items())
    return found


def nbytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def table_of(module: nn.Module) -> Any:
    """Where sequential offloading keeps a network's weights."""
    hooks = [m._hf_hook for m in module.modules() if hasattr(m, "_hf_hook")]
    return next(h for h in hooks if getattr(h, "offload", False)).weights_map.dataset


def largest(module: nn.Module) -> int:
    """Bytes of the largest layer, with what its parents hold themselves."""

    def own(child: nn.Module) -> int:
        return sum(t.nbytes for t in (*child.parameters(False), *child.buffers(False)))

    def most(child: nn.Module, above: int) -> int:
        above += own(child)
        return max([above, *(most(inner, above) for inner in child.children())])

    return most(module, 0)


def largest_block(module: nn.Module) -> int:
    """Bytes of the largest block of diffusers' groups, with those of what is in none."""
    most = 0
    for child in module.modules():  # an autoencoder has groups in its encoder and its decoder
        names = getattr(module, "_group_offload_block_modules", None) or []
        lists = [c for n, c in child.named_children() if isinstance(c, nn.ModuleList | nn.Sequential)]
        if child is not module and all(child is not getattr(module, name, None) for name in names):
            continue
        blocks = [nbytes(block) for each in lists for block in each]
        named = [m for name in names if (m := getattr(module, name)) is not None and child is module]
        most = max(most, nbytes(child) - sum(blocks) - sum(map(nbytes, named)) + max(blocks, default=0))
    return most
