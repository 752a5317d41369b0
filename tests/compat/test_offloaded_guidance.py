"""Guided runs of pipelines whose networks wait on the CPU until they are called."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from offloaded_runs import (
    PIPELINES,
    TRAP,
    WAYS,
    Watched,
    addresses,
    hooks_of,
    largest,
    largest_block,
    nbytes,
    network_of,
)
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import BudgetError
from backdrift.pipelines.frozen import Frozen
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_controlnet, tiny_sd, tiny_sdxl

STEPS = 4
ENTRIES = ["guide", "callback"]


def built(build: Callable[[], Any]) -> Any:
    """A pipeline with a scheduler whose steps can be taken again."""
    from diffusers import DDIMScheduler

    pipe = build()
    if hasattr(pipe, "unet"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def squares(images: Tensor) -> Tensor:
    return images.square().mean((1, 2, 3))


def guidance(loss: Any = squares, **more: Any) -> Any:
    return bd.SymplecticAdjointGuidance(loss, **{"n": 2, "start": 0.25, "stop": 0.75, "repeats": 2, **more})


def guided(pipe: Any, entry: str, rule: Any, **more: Any) -> Tensor:
    """The pictures of a guided run, by ``bd.guide`` or by the pipeline's own call."""
    call = {**embeds_for(pipe), "latents": noise_for(pipe), "height": PICTURE, "width": PICTURE, **more}
    call = {k: v.to(network_of(pipe).dtype) if isinstance(v, Tensor) else v for k, v in call.items()}
    if entry == "guide":
        return bd.guide(pipe, None, rule, num_inference_steps=STEPS, **call).images
    with rule.listening(pipe):
        found = pipe(**call, num_inference_steps=STEPS, output_type="pt", callback_on_step_end=rule)
    pictures: Tensor = found.images
    return pictures


def grain(pipe: Any, way: str) -> int:
    """Most bytes of weights that are to be on the device together."""
    networks = [network_of(pipe), pipe.vae]
    measure = nbytes if way == "model" else largest_block if way in ("blocks", "pairs") else largest
    return max(map(measure, networks))


def listeners(pipe: Any) -> list[Any]:
    """PyTorch's own hooks on a pipeline's networks."""
    networks = [value for value in vars(pipe).values() if isinstance(value, nn.Module)]
    return [
        (list(module._forward_hooks), list(module._forward_pre_hooks), type(module)) for module in networks
    ]


@TRAP.handled(
    "guidance (`bd.guide`, or in the pipeline's own call): the same pictures and losses; one phase's networks, or one "
    "block's or layer's weights, are on the device at a time, in the estimate's backward pass too"
)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("name", "way"),
    [*(("sd", way) for way in WAYS), ("sdxl", "blocks"), ("sd3", "sequential"), ("flux", "leaves"), ("flux", "model")],
)  # fmt: skip
def test_a_guided_run_brings_weights_in_the_pipelines_own_grain(
    name: str, way: str, entry: str, devices: list[Watched]
) -> None:
    pipe, rule = built(PIPELINES[name]), guidance()
    images = guided(pipe, entry, rule)
    losses, bound, whole = rule.trace.loss, grain(pipe, way), nbytes(network_of(pipe))
    devices.clear()
    WAYS[way](pipe)
    hooks, before, heard = hooks_of(pipe), addresses(pipe), listeners(pipe)
    for _ in range(2 if name == "sd" else 1):
        rule = guidance()
        assert torch.equal(guided(pipe, entry, rule), images)
        assert rule.trace.loss == losses
        assert listeners(pipe) == heard
        if (
            way != "model"
        ):  # there the pipeline itself moves whole networks, and puts new hooks on after each call
            assert hooks_of(pipe) == hooks
        if way != "model" or entry == "guide":
            assert addresses(pipe) == before
    for device in devices:
        assert bound / 2 < device.peak <= bound
        assert all(len(together) == 1 for together in device.together)
        assert {"network", "decoder"} == {phase for together in device.together for phase in together}
        # Whole networks come for each attempt, the others for each of its calls and each way back.
        assert device.moved > (1 if way == "model" else 4) * whole
        assert device.nbytes == 0


@TRAP.handled("guidance with control networks, LoRA, and a float16 decoder that is upcast")
@pytest.mark.parametrize("way", ["model", "sequential", "blocks"])
def test_control_networks_adapters_and_half_precision(way: str) -> None:
    from peft import LoraConfig

    def half() -> Any:
        pipe = built(tiny_sdxl)
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        pipe.vae.register_to_config(force_upcast=True)
        return pipe.to(torch.float16)

    picture = torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(0))
    for build, more in ((half, {}), (lambda: built(tiny_controlnet), {"image": picture})):
        pipe = build()
        images = {entry: guided(pipe, entry, guidance(repeats=1), **more) for entry in ENTRIES}
        WAYS[way](pipe)
        for entry in ENTRIES:
            assert torch.equal(guided(pipe, entry, guidance(repeats=1), **more), images[entry])


@TRAP.handled("a guided run that breaks off leaves the pipeline as it was")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_breaks_off_leaves_nothing(way: str, entry: str, devices: list[Watched]) -> None:
    class Stop(Exception):
        pass

    seen: list[Tensor] = []

    def loss(images: Tensor) -> Tensor:
        seen.append(images)
        if len(seen) == 3:  # the first one rehearses
            raise Stop
        return squares(images)

    pipe = built(tiny_sd)
    images = guided(pipe, entry, guidance())
    WAYS[way](pipe)
    hooks, before, heard, scheduler = hooks_of(pipe), addresses(pipe), listeners(pipe), type(pipe.scheduler)
    with pytest.raises(Stop):
        guided(pipe, entry, guidance(loss))
    assert devices[-1].nbytes == 0
    assert devices[-1].peak > 0
    assert (hooks_of(pipe), listeners(pipe)) == (hooks, heard)
    if way != "model" or entry == "guide":
        assert addresses(pipe) == before
    assert type(pipe.scheduler) is scheduler
    assert torch.equal(guided(pipe, entry, guidance()), images)


@pytest.mark.parametrize("way", ["sequential", "blocks"])
def test_a_budget_counts_what_an_estimates_calls_hold(way: str) -> None:
    """Weights that come and go are none of it: the smallest budget is that of a pipeline that is not offloaded."""

    def least(pipe: Any) -> str:
        with pytest.raises(BudgetError, match="the smallest budget that works") as refused:
            guided(pipe, "guide", guidance(gradient=bd.Exact("1KiB")))
        return str(refused.value)

    pipe = built(tiny_sd)
    wanted = least(pipe)
    WAYS[way](pipe)
    assert least(pipe) == wanted


def test_a_copy_follows_weights_that_were_moved() -> None:
    """Group offloading without streams leaves weights at a new place on the CPU after each call on a card."""
    pipe = tiny_sd()
    WAYS["blocks"](pipe)
    frozen = Frozen(pipe)
    first = frozen.of("unet", pipe.unet)
    assert frozen.of("unet", pipe.unet) is first
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()
    second = frozen.of("unet", pipe.unet)
    places = [p.data_ptr() for p in pipe.unet.parameters()]
    assert [p.data_ptr() for p in second.parameters()] == places
    x, t, embeds = noise_for(pipe), torch.tensor([500.0]), embeds_for(pipe)["prompt_embeds"]
    with torch.no_grad():
        wanted = pipe.unet(x, t, encoder_hidden_states=embeds, return_dict=False)[0]
        assert torch.equal(second(x, t, encoder_hidden_states=embeds, return_dict=False)[0], wanted)
    del first
    gc.collect()
    assert frozen.offloading.turns is not None
    assert frozen.offloading.turns.nbytes == 0
