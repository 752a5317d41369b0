"""Pipelines whose networks wait on the CPU until they are called.

The "device" is the CPU too: there copies are made, given up and loaded again exactly as on a card, and are counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from traps import Trap

import backdrift as bd
from backdrift import residence
from backdrift.errors import StateChangedError, UnsupportedError
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

TRAP = Trap(
    "`enable_model_cpu_offload()`, sequential and group offloading, accelerate's hooks",
    "the hooks are taken off and put on again after each call, so the second call is plain autograd without a word.",
)
PIPELINES = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


class Phases(residence.Turns):
    """Notes which phases are on the device together."""

    seen: list[frozenset[str]] = []  # noqa: RUF012 - of the class, as runs make their own

    def note(self) -> None:
        super().note()
        self.seen.append(frozenset(m.phase for m in self._living() if m.nbytes))


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    from backdrift.pipelines import offloaded

    monkeypatch.setattr(offloaded, "Turns", Phases)
    Phases.seen = []
    return Phases.seen


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


@TRAP.handled(
    "`enable_model_cpu_offload()`: one phase's networks are on the device at a time, in the backward pass too; "
    "noise, embeddings and weights, call after call"
)
@pytest.mark.parametrize("memory", ["min", "max", bd.Choices(keep=1, network="block", decoder="resnet")])
@pytest.mark.parametrize("name", PIPELINES)
def test_one_phase_is_on_the_device_at_a_time(name: str, memory: Any, phases: list[frozenset[str]]) -> None:
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
    assert all(len(together) <= 1 for together in phases)
    assert {"network", "decoder"} <= {phase for together in phases for phase in together}
    del offloaded, run
    assert not residence._COPIES


@TRAP.handled(
    "the same with frozen weights and prompts, with LoRA, and with a float16 decoder that is upcast"
)
def test_prompts_adapters_and_half_precision(phases: list[frozenset[str]]) -> None:
    from peft import LoraConfig

    pipe = tiny_sdxl()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.vae.register_to_config(force_upcast=True)
    pipe.to(torch.float16)
    noise = noise_for(pipe).half().requires_grad_()
    leaves = [noise, *(p for n, p in pipe.unet.named_parameters() if "lora" in n)]
    results = []
    for offload in (False, True):
        if offload:
            pipe.enable_model_cpu_offload(device="cpu")
        with bd.differentiable(pipe, "min", train="lora"):
            images = pipe("a 7", latents=noise, **size()).images
        results.append([images, *torch.autograd.grad(loss_of(images), leaves)])
    for plain, offloaded in zip(*results, strict=True):
        assert torch.equal(plain, offloaded)
    assert {"text_encoder", "text_encoder_2", "network", "decoder"} == {p for t in phases for p in t}


@TRAP.handled("weights edited between the call and its backward pass are noticed, redone or not")
@pytest.mark.parametrize("memory", ["min", "max"])
def test_weights_edited_at_home_are_noticed(memory: str) -> None:
    pipe = tiny_sd()
    pipe.enable_model_cpu_offload(device="cpu")
    inputs = leaves_of(pipe)
    with bd.differentiable(pipe, memory):
        images = pipe(**inputs, **size()).images
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    with pytest.raises(StateChangedError, match=r"conv_in\.weight"):
        loss_of(images).backward()


@TRAP.handled("a budget: the plan counts the weights of one phase at a time")
def test_a_budget_counts_one_phase_at_a_time() -> None:
    pipe = tiny_sd()
    inputs = leaves_of(pipe)
    everything = bd.plan(pipe, **inputs, **size())
    pipe.enable_model_cpu_offload(device="cpu")
    plan = bd.plan(pipe, **inputs, **size())
    assert plan.choices.weights == "offload"
    weights = max(c.weights for c in plan.job.components)
    assert plan.least.needs.peak < everything.least.needs.peak
    assert plan.least.needs.peak - weights < everything.least.needs.peak - everything.job.weights + 1
    with bd.differentiable(pipe, plan.least.needs.peak) as run:
        loss_of(pipe(**inputs, **size()).images).backward()
    assert run.plan is not None
    assert run.plan.choices.weights == "offload"


@TRAP.refused("sequential and group offloading, and networks dispatched over devices")
def test_hooks_inside_networks_are_refused() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = tiny_sd()
    run = bd.differentiable(pipe)
    add_hook_to_module(pipe.unet.conv_in, AlignDevicesHook("cpu"))
    with pytest.raises(
        UnsupportedError, match=r"unet\.conv_in has the hook AlignDevicesHook.*remove_all_hooks"
    ):
        run(**leaves_of(pipe), **size())
    pipe = tiny_sd()
    pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    with pytest.raises(UnsupportedError, match="group offloading"):
        bd.differentiable(pipe)(**leaves_of(pipe), **size())
