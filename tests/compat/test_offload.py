"""Pipelines whose networks wait on the CPU until they are called: what is on the device when, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from offloaded_runs import (
    CPU,
    PIPELINES,
    TRAP,
    WAYS,
    Watched,
    addresses,
    hooks_of,
    largest,
    largest_block,
    leaves_of,
    loss_of,
    nbytes,
    network_of,
    size,
)

import backdrift as bd
from backdrift.errors import UnsupportedError
from tiny_pipelines import noise_for, tiny_sd, tiny_sdxl


@TRAP.handled(
    "`enable_model_cpu_offload()`: one phase's networks are on the device at a time, in the backward pass too; "
    "noise, embeddings and weights, call after call"
)
@pytest.mark.parametrize("memory", ["min", "max", bd.Choices(keep=1, network="block", decoder="resnet")])
@pytest.mark.parametrize("name", PIPELINES)
def test_one_phase_is_on_the_device_at_a_time(name: str, memory: Any, devices: list[Watched]) -> None:
    pipe = PIPELINES[name]()
    inputs = leaves_of(pipe)
    leaves = [*inputs.values(), *(p for n, p in network_of(pipe).named_parameters() if "attn" in n)]
    train = f"{'unet' if hasattr(pipe, 'unet') else 'transformer'}.*attn*"
    with bd.differentiable(pipe, "max", train=train):
        images = pipe(**inputs, **size()).images
    expected = torch.autograd.grad(loss_of(images), leaves, allow_unused=True)
    pipe.enable_model_cpu_offload(device="cpu")
    before = addresses(pipe)
    for _ in range(2):  # the pipeline puts its hooks on again after each call
        with bd.differentiable(pipe, memory, train=train) as run:
            offloaded = pipe(**inputs, **size()).images
        assert torch.equal(offloaded, images)
        found = torch.autograd.grad(loss_of(offloaded), leaves, allow_unused=True)
        for mine, true in zip(found, expected, strict=True):
            assert (mine is None) == (true is None)
            assert mine is None or torch.equal(mine, true)
        assert run.stats.calls_forward == 2
    assert addresses(pipe) == before
    for device in devices:
        assert all(len(together) == 1 for together in device.together)
        assert {"network", "decoder"} == {phase for together in device.together for phase in together}
        # A network and its gradient's copies share a place.
        assert device.peak <= max(nbytes(network_of(pipe)), nbytes(pipe.vae))
    del offloaded, run
    assert [device.nbytes for device in devices] == [0, 0]


@TRAP.handled(
    "`enable_sequential_cpu_offload()` and group offloading of layers or blocks: one layer's or block's weights are on "
    "the device at a time, in the backward pass too; noise, embeddings and weights, call after call"
)
@pytest.mark.parametrize(
    ("name", "way"),
    [*((n, w) for n in PIPELINES for w in ("sequential", "blocks")), ("sd", "pairs"), ("flux", "leaves")],
)
def test_one_layer_or_block_is_on_the_device_at_a_time(name: str, way: str, devices: list[Watched]) -> None:
    pipe = PIPELINES[name]()
    networks = [network_of(pipe), pipe.vae]
    bound = max(map(largest_block if way in ("blocks", "pairs") else largest, networks))
    whole = nbytes(networks[0])
    inputs = leaves_of(pipe)
    train = f"{'unet' if hasattr(pipe, 'unet') else 'transformer'}.*attn*"
    with bd.differentiable(pipe, "max", train=train) as run:
        images = pipe(**inputs, **size()).images
    weights = [*inputs.values(), *run.parameters.values()]
    expected = torch.autograd.grad(loss_of(images), weights, allow_unused=True)
    with torch.no_grad():
        plainly = pipe(**inputs, **size(), output_type="pt").images
    WAYS[way](pipe)
    hooks = hooks_of(pipe)
    before = addresses(pipe)
    for memory in ("min", "max", bd.Choices(keep=1, network="resnet", decoder="block")):
        with bd.differentiable(pipe, memory, train=train) as run:
            offloaded = pipe(**inputs, **size()).images
            assert torch.equal(offloaded, images)
            assert devices[-1].nbytes == 0  # the graph holds none
        # Gradients arrive at the weights at home.
        found = torch.autograd.grad(
            loss_of(offloaded), [*inputs.values(), *run.parameters.values()], allow_unused=True
        )
        for mine, true in zip(found, expected, strict=True):
            assert (mine is None) == (true is None)
            assert mine is None or torch.equal(mine, true)
        assert bound / 2 < devices[-1].peak <= bound
        assert devices[-1].nbytes == 0
        assert devices[-1].moved > 3 * whole
    assert bound < whole * (0.85 if way in ("blocks", "pairs") else 0.25)  # there are few blocks
    assert addresses(pipe) == before
    assert hooks_of(pipe) == hooks
    with torch.no_grad():
        assert torch.equal(pipe(**inputs, **size(), output_type="pt").images, plainly)


@TRAP.handled("group offloading with `use_stream=True`; one network of several offloaded by groups")
def test_streams_are_left_to_the_pipeline(monkeypatch: pytest.MonkeyPatch, devices: list[Watched]) -> None:
    """diffusers asks for a device with streams: one is made up, and then takes the CPU's place."""
    from diffusers.hooks import group_offloading

    class Stream:
        def synchronize(self) -> None: ...

    class Backend:
        def __init__(self, device: torch.device) -> None: ...

        def Stream(self) -> Stream:
            return Stream()

        def current_stream(self) -> Stream:
            return Stream()

        def stream(self, stream: Stream) -> Any:
            return nullcontext()

    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", Backend)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    pipe = tiny_sd()
    inputs = leaves_of(pipe)
    with bd.differentiable(pipe, "max"):
        images = pipe(**inputs, **size()).images
    expected = torch.autograd.grad(loss_of(images), list(inputs.values()))
    pipe.unet.enable_group_offload(torch.device("meta"), CPU, "leaf_level", use_stream=True)
    for child in pipe.unet.modules():
        for hook in getattr(getattr(child, "_diffusers_hook", None), "hooks", {}).values():
            if hasattr(hook, "group"):
                hook.config.onload_device = hook.group.onload_device = CPU
    with torch.no_grad():
        plainly = pipe(**inputs, **size(), output_type="pt").images
    for _ in range(2):
        with bd.differentiable(pipe, "min"):
            offloaded = pipe(**inputs, **size()).images
        assert torch.equal(offloaded, images)
        found = torch.autograd.grad(loss_of(offloaded), list(inputs.values()))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert 0 < devices[-1].peak <= largest(pipe.unet)
        assert {phase for together in devices[-1].together for phase in together} == {"network"}
        with torch.no_grad():
            assert torch.equal(pipe(**inputs, **size(), output_type="pt").images, plainly)


@TRAP.handled(
    "the same with frozen weights and prompts, with LoRA, and with a float16 decoder that is upcast"
)
@pytest.mark.parametrize("way", WAYS)
def test_prompts_adapters_and_half_precision(way: str, devices: list[Watched]) -> None:
    from peft import LoraConfig

    pipe = tiny_sdxl()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.vae.register_to_config(force_upcast=True)
    pipe.to(torch.float16)
    noise = noise_for(pipe).half().requires_grad_()
    results = []
    for offload in (False, True):
        if offload:
            WAYS[way](pipe)
        with bd.differentiable(pipe, "min", train="lora") as run:
            images = pipe("a 7", latents=noise, **size()).images
        assert len(run.parameters) == len(run.trained) > 0
        assert all("lora" in name for name in run.parameters)
        results.append([images, *torch.autograd.grad(loss_of(images), [noise, *run.parameters.values()])])
    for plain, offloaded in zip(*results, strict=True):
        assert torch.equal(plain, offloaded)
    (device,) = devices
    assert {"text_encoder", "text_encoder_2", "network", "decoder"} == {p for t in device.together for p in t}


@TRAP.refused("networks dispatched over devices")
def test_hooks_inside_networks_are_refused() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = tiny_sd()
    run = bd.differentiable(pipe)
    add_hook_to_module(pipe.unet.conv_in, AlignDevicesHook("cpu"))
    with pytest.raises(
        UnsupportedError, match=r"unet\.conv_in has the hook AlignDevicesHook.*remove_all_hooks"
    ):
        run(**leaves_of(pipe), **size())


@TRAP.refused("sequential and group offloading to a disk")
def test_weights_on_a_disk_are_refused(tmp_path: Any) -> None:
    from accelerate import disk_offload

    pipe = tiny_sd()
    disk_offload(pipe.unet, str(tmp_path), torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"on a disk.*enable_sequential_cpu_offload"):
        bd.differentiable(pipe)
    pipe = tiny_sd()
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(cpu, cpu, "leaf_level", offload_to_disk_path=str(tmp_path / "groups"))
    with pytest.raises(UnsupportedError, match=r"on a disk.*without offload_to_disk_path"):
        bd.differentiable(pipe)
