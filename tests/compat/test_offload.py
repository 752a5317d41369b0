"""Pipelines whose networks wait on the CPU until they are called.

The "device" is the CPU too: there copies are made, given up and loaded again exactly as on a card, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from traps import Trap

import backdrift as bd
from backdrift import residence
from backdrift.errors import StateChangedError, UnsupportedError
from backdrift.planning.search import option
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


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """Those of the runs made in a test."""
    from backdrift.pipelines import offloaded

    made: list[Watched] = []
    monkeypatch.setattr(offloaded, "Turns", lambda device: Watched(device, made))
    return made


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


def hooks_of(pipe: Any) -> list[Any]:
    """The hooks on a pipeline's networks, as they are."""
    found: list[Any] = []
    for network in (value for value in vars(pipe).values() if isinstance(value, nn.Module)):
        for child in network.modules():
            registry = child.__dict__.get("_diffusers_hook")
            found += [child.__dict__.get("_hf_hook"), child.__dict__.get("forward"), registry]
            found += [] if registry is None else list(registry.hooks.items())
    return found


@TRAP.handled(
    "weights trained under sequential offloading are those of accelerate's table (`run.parameters`), and its hooks see "
    "what an optimizer makes of them"
)
def test_an_optimizer_steps_on_the_weights_at_home() -> None:
    """Two steps of gradient descent, beside the same on a pipeline that is not offloaded."""
    results = []
    for offload in (False, True):
        pipe = tiny_sd()
        if offload:
            sequential(pipe)
        inputs = leaves_of(pipe)
        for _ in range(2):
            with bd.differentiable(pipe, "min", train=["unet.conv_in.*", "unet.*to_q*"]) as run:
                images = pipe(**inputs, **size()).images
            loss_of(images).backward()
            optimizer = torch.optim.SGD(run.parameters.values(), lr=1e-2)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            results.append([images, pipe(**inputs, **size(), output_type="pt").images])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not torch.equal(*results[0])


@TRAP.handled("`bd.optimize` over weights, which are put back at home")
@pytest.mark.parametrize("way", ["sequential", "leaves"])
def test_weights_are_optimised_and_put_back(way: str, tmp_path: Path) -> None:
    losses = []
    for offload in (False, True):
        pipe = tiny_sd()
        if offload:
            WAYS[way](pipe)
            home = table_of(pipe.unet)["conv_in.weight"] if way == "sequential" else pipe.unet.conv_in.weight
            before = home.detach().clone()
        run = bd.optimize(
            pipe, "a 7", lambda images: images.square().flatten(1).mean(1), over="unet.conv_in.*", steps=2,
            height=PICTURE, width=PICTURE, num_inference_steps=2, out=tmp_path / str(offload), progress=False,
            memory="min",
        )  # fmt: skip
        losses.append([entry["loss"] for entry in run.record["iterations"]])
    assert losses[0] == losses[1]
    assert losses[0][0] > losses[0][-1]
    assert torch.equal(home, before)


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


@TRAP.handled("weights edited between the call and its backward pass are noticed, redone or not")
@pytest.mark.parametrize("memory", ["min", "max"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_edited_at_home_are_noticed(way: str, memory: str) -> None:
    pipe = tiny_sd()
    WAYS[way](pipe)
    inputs = leaves_of(pipe)
    with bd.differentiable(pipe, memory):
        images = pipe(**inputs, **size()).images
    with torch.no_grad():
        home = table_of(pipe.unet)["conv_in.weight"] if way == "sequential" else pipe.unet.conv_in.weight
        home.mul_(2)
    with pytest.raises(StateChangedError, match=r"conv_in\.weight"):
        loss_of(images).backward()


@TRAP.handled(
    "a budget: the plan counts the weights of one phase at a time, or of one layer where no phase fits"
)
def test_a_budget_counts_one_phase_at_a_time() -> None:
    pipe = tiny_sd()
    inputs = leaves_of(pipe)
    everything = bd.plan(pipe, **inputs, **size())
    pipe.enable_model_cpu_offload(device="cpu")
    plan = bd.plan(pipe, **inputs, **size())
    assert plan.choices.weights == "offload"
    weights = max(c.weights for c in plan.job.components)
    tactics = [replace(c, keep=0) for c in plan.tactics if c.weights == "offload"]
    phases = min(option(plan.job, choices).needs.peak for choices in tactics)
    assert phases < everything.least.needs.peak
    assert phases - weights < everything.least.needs.peak - everything.job.weights + 1
    assert plan.least.choices.weights == "stream"
    assert plan.least.needs.peak < phases
    for budget, chosen in ((phases, "offload"), (phases - 1, "stream")):
        with bd.differentiable(pipe, budget) as run:
            loss_of(pipe(**inputs, **size()).images).backward()
        assert run.plan is not None
        assert run.plan.choices.weights == chosen


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


@TRAP.refused("guidance (`bd.guide`) of pipelines under sequential or group offloading")
@pytest.mark.parametrize("way", ["sequential", "leaves"])
def test_guidance_wants_whole_networks(way: str) -> None:
    from backdrift.pipelines.capture import Capture

    pipe = tiny_sd()
    WAYS[way](pipe)
    with pytest.raises(UnsupportedError, match=r"enable_model_cpu_offload"):
        Capture(pipe)
