"""Truncated calls of pipelines: what cannot be cut is refused by name, and all is left as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError, UnsupportedError
from pipeline_calls import assert_equal, loss_of
from tiny_families import tiny_wan
from tiny_pipelines import (
    TOKENS,
    WIDTH,
    embeds_for,
    noise_for,
)
from truncated_calls import N, arguments, lora, prepared
from truncated_loops import sampled_by_hand


def test_a_cut_that_would_lose_the_noise_raises_before_it_samples() -> None:
    pipe, _ = prepared("sd-ddim")
    noise, embeds = noise_for(pipe).requires_grad_(), embeds_for(pipe)
    run = bd.differentiable(pipe, "min", train="lora", through="last:3")
    with pytest.raises(MissingGradientError, match=r"latents requires grad.*Steps\(range\(1, 4\)\)"):
        run(**embeds, **arguments(pipe, noise))
    assert run.stats.calls_forward == 0
    with torch.no_grad():  # no gradient is asked for
        run(**embeds, **arguments(pipe, noise))


def test_more_steps_than_there_are_raise_before_it_samples() -> None:
    pipe, _ = prepared("sd-ddim")
    for through in (bd.Last(5), bd.Random(5), bd.Steps([4]), bd.Steps([-5]), bd.Steps([1, -3])):
        run = bd.differentiable(pipe, "min", train="lora", through=through)
        with pytest.raises(InputError, match=r"steps|twice"):
            run(**embeds_for(pipe), **arguments(pipe, noise_for(pipe)))
        assert run.stats.calls_forward == 0


def test_a_trained_network_that_is_only_called_in_other_steps_raises() -> None:
    """Wan 2.2 has two networks, one for the high noise levels and one for the low."""
    from diffusers import WanPipeline

    one = tiny_wan()
    early, late = one.transformer, copy.deepcopy(one.transformer)
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=one.vae,
        scheduler=one.scheduler,
        transformer=early,
        transformer_2=late,
        boundary_ratio=0.85,
    )
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 2, "num_inference_steps": 4}
    call |= {"prompt_embeds": torch.randn(1, TOKENS, WIDTH), "latents": torch.randn(1, 4, 2, 8, 8)}
    call |= {"output_type": "latent", "guidance_scale": 1.0}
    with pytest.raises(
        MissingGradientError, match=r"transformer is not called in the steps that carry .*\(3 of 4"
    ):
        bd.differentiable(pipe, "min", train="transformer", through=bd.Last(1))(**call)
    for train, step, weights in (("transformer", 0, early), ("transformer_2", 3, late)):
        out = bd.differentiable(pipe, "min", train=train, through=bd.Steps([step]))(**call)
        parameters = list(weights.parameters())
        found = torch.autograd.grad(out.frames.square().sum(), parameters, allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in found)


def test_a_loop_that_cannot_be_followed_is_refused() -> None:
    pipe, _ = prepared("sd-ddim")
    noise, embeds = noise_for(pipe), embeds_for(pipe)

    def stop(own: Any, i: int, t: Any, kwargs: Any) -> Any:
        own._interrupt = i >= 1
        return kwargs

    run = bd.differentiable(pipe, "min", train="lora", through=bd.Steps([0]))
    with pytest.raises(UnsupportedError, match="called its scheduler 2 times, and 4 were expected"):
        run(**embeds, **arguments(pipe, noise), callback_on_step_end=stop)
    pipe.second_scheduler = copy.deepcopy(pipe.scheduler)
    with pytest.raises(UnsupportedError, match="the schedulers scheduler, second_scheduler"):
        run(**embeds, **arguments(pipe, noise))


def test_autocast_does_not_hand_casts_without_graph_to_later_steps() -> None:
    pipe, passes = prepared("sd-ddim")
    noise, embeds = noise_for(pipe), embeds_for(pipe)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        hand = sampled_by_hand(pipe, noise, embeds, passes, carrying=[3], cut=3)
    expected = torch.autograd.grad(loss_of(hand), lora(pipe))
    assert all(bool(g.any()) for g in expected)
    with torch.autocast("cpu", torch.bfloat16):
        run = bd.differentiable(pipe, "max", train="lora", clamp=True, through=bd.Last(1))
        images = run(**embeds, **arguments(pipe, noise)).images
        assert torch.is_autocast_cache_enabled()
    assert_equal(list(torch.autograd.grad(loss_of(images), lora(pipe))), list(expected))


def test_the_users_pipeline_and_tensors_are_left_as_they_were() -> None:
    pipe, _ = prepared("sd3-euler")
    noise, embeds = noise_for(pipe).requires_grad_(), embeds_for(pipe)
    before, cls = dict(vars(pipe.scheduler)), type(pipe.scheduler)
    run = bd.differentiable(pipe, "min", through=bd.Steps([1]))
    images = run(**embeds, **arguments(pipe, noise)).images
    assert type(pipe.scheduler) is cls
    assert vars(pipe.scheduler).keys() == before.keys()
    assert "forward" not in vars(pipe.transformer)
    images.sum().backward()
    assert run.trace.latents[0] == pytest.approx(noise.grad.norm().item(), rel=1e-6)
    del run, images
    gc.collect()
    assert not noise._backward_hooks  # SD3 hands the leaf itself to its scheduler


@pytest.mark.parametrize("through", ["all", "steps:1"])
def test_what_the_scheduler_holds_goes_when_the_call_is_over(through: str) -> None:
    pipe, _ = prepared("sd-dpm")
    kept: list[Any] = []

    def look(own: Any, i: int, t: Any, kwargs: Any) -> Any:
        kept.append(weakref.ref(own.scheduler))
        return kwargs

    gc.disable()
    try:
        run = bd.differentiable(pipe, "min", train="lora", through=through)
        images = run(**embeds_for(pipe), **arguments(pipe, noise_for(pipe)), callback_on_step_end=look).images
        assert images.requires_grad
        assert [reference() for reference in kept] == [None] * N
    finally:
        gc.enable()
