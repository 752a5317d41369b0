"""Networks inside ``DistributedDataParallel``, alone and with another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from traps import Trap

import backdrift as bd
from backdrift.errors import UnsupportedError
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_sd

TRAP = Trap(
    "`DistributedDataParallel` around the network",
    '"marked ready only once" under repeated checkpointed calls; without the wrapper, gradients of one process only.',
)


def call_of(pipe: Any, seed: int = 0) -> dict[str, Any]:
    size = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 2}
    return {**embeds_for(pipe), "latents": noise_for(pipe, seed=seed), **size}


def loss_of(images: Tensor) -> Tensor:
    return (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum()


def gradients(pipe: Any, seed: int) -> list[Tensor]:
    """Of one process without the wrapper, by plain autograd."""
    images = type(pipe).__call__.__wrapped__(pipe, output_type="pt", **call_of(pipe, seed)).images
    return list(torch.autograd.grad(loss_of(images), list(pipe.unet.parameters())))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@TRAP.handled(
    "two processes: the gradients are averaged once, over all calls of the network, pass after pass"
)
def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    children = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for child in children:
        _, error = child.communicate(timeout=300)
        assert child.returncode == 0, error.decode()[-2000:]
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    pipe = tiny_sd()
    for step in range(2):
        first, second = (gradients(pipe, 10 * step + rank) for rank in range(2))
        for a, b, one, other in zip(found[0][step], found[1][step], first, second, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, (one + other) / 2, rtol=1e-5, atol=1e-6)


@TRAP.handled("`no_sync()`, and passes added up under it")
@pytest.mark.usefixtures("alone")
def test_passes_are_added_up() -> None:
    pipe = tiny_sd()
    network = pipe.unet
    expected = [sum(parts) for parts in zip(gradients(pipe, 1), gradients(pipe, 2), strict=True)]
    network.zero_grad()
    pipe.unet = wrapper = DistributedDataParallel(network)
    for _ in range(2):
        network.zero_grad()
        with bd.differentiable(pipe, "min", train="unet", clamp=True):
            with wrapper.no_sync():
                loss_of(pipe(**call_of(pipe, 1)).images).backward()
            loss_of(pipe(**call_of(pipe, 2)).images).backward()
        for parameter, true in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, true, rtol=1e-5, atol=1e-6)


@TRAP.handled("LoRA on a frozen base, and a part of the weights with `find_unused_parameters=True`")
@pytest.mark.parametrize("kind", ["lora", "unused"])
@pytest.mark.usefixtures("alone")
def test_a_part_of_the_weights(kind: str) -> None:
    pipe = tiny_sd()
    network, train = pipe.unet, "unet.*attn2*"
    if kind == "lora":
        from peft import LoraConfig

        torch.manual_seed(0)
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        train = "lora"
    selected = [p for n, p in network.named_parameters() if ("lora" if kind == "lora" else "attn2") in n]
    images = type(pipe).__call__.__wrapped__(pipe, output_type="pt", **call_of(pipe)).images
    expected = torch.autograd.grad(loss_of(images), selected)
    network.zero_grad()
    pipe.unet = DistributedDataParallel(network, find_unused_parameters=kind == "unused")
    for _ in range(2):
        network.zero_grad()
        with bd.differentiable(pipe, "min", train=train, clamp=True):
            loss_of(pipe(**call_of(pipe)).images).backward()
        for parameter, true in zip(selected, expected, strict=True):
            assert torch.equal(parameter.grad, true)


@TRAP.refused("a part of the weights while the wrapper waits for all, `static_graph=True`, `DataParallel`")
@pytest.mark.usefixtures("alone")
def test_wrappers_that_cannot_be_followed_are_refused() -> None:
    pipe = tiny_sd()
    network = pipe.unet
    pipe.unet = DistributedDataParallel(network)
    with pytest.raises(UnsupportedError, match="find_unused_parameters=True"):
        bd.differentiable(pipe, train="unet.*attn2*")
    pipe.unet = DistributedDataParallel(network, static_graph=True)
    with pytest.raises(UnsupportedError, match="static_graph"):
        bd.differentiable(pipe, train="unet")
    pipe.unet = nn.DataParallel(network)
    with pytest.raises(UnsupportedError, match="DataParallel"):
        bd.differentiable(pipe)
