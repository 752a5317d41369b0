"""Guidance in calls of the user's own: beside other callbacks, after calls that were broken off, twice at once."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError, UnsupportedError
from backdrift.guidance.measured import STRENGTHS, usual_strength
from backdrift.guidance.streams import Streams
from backdrift.losses import resolve
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_sd

STEPS = 6
CALL: dict[str, Any] = {"height": PICTURE, "width": PICTURE, "num_inference_steps": STEPS}


def dark(images: Tensor) -> Tensor:
    return images.square().mean((1, 2, 3))


def guiding(**more: Any) -> Any:
    return bd.SymplecticAdjointGuidance(dark, 1, 0.3, 0.9, 0.3, **more)


def called(pipe: Any, callback: Any = None) -> Tensor:
    more = {} if callback is None else {"callback_on_step_end": callback}
    return pipe(**embeds_for(pipe), **CALL, latents=noise_for(pipe), output_type="pt", **more).images


def broken_off(pipe: Any, guidance: Any, at: int = 3) -> None:
    """A call that is interrupted after its step ``at``, where guidance is not under way."""

    def interrupted(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = guidance(pipe, step, timestep, kwargs)
        if step == at:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        called(pipe, interrupted)


def is_heard(pipe: Any) -> bool:
    return bool(pipe.unet._forward_hooks or pipe.unet._forward_pre_hooks)


# -- beside other callbacks ------------------------------------------------------------------------


def test_diffusers_own_list_of_callbacks_takes_guidance() -> None:
    from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

    pipe = tiny_sd()
    alone = called(pipe, guiding())
    assert torch.equal(called(pipe, MultiPipelineCallbacks([guiding()])), alone)
    guidance = guiding()
    both = MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.5), guidance])
    assert not torch.equal(called(pipe, both), alone)
    # From the cut-off on there is no unconditional half, and RMS(eps) takes its place.
    last = guidance.trace.entries[-1]
    assert (
        last.strength[0] * last.pull[0]
        > 2 * guidance.trace.entries[0].strength[0] * guidance.trace.entries[0].pull[0]
    )


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_of_ones_own_may_call_guidance(first: bool) -> None:
    pipe, guidance = tiny_sd(), guiding()
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not first:
            seen.append(step)
        kwargs = guidance(pipe, step, timestep, kwargs)
        if first:
            seen.append(step)
        return kwargs

    assert torch.equal(called(pipe, callback), called(pipe, guiding()))
    assert seen == list(range(STEPS))


def test_two_guidances_in_one_call_are_refused() -> None:
    pipe, first, second = tiny_sd(), guiding(), guiding()

    def both(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return second(pipe, step, timestep, first(pipe, step, timestep, kwargs))

    with pytest.raises(InputError, match="one call is guided by one guidance"):
        called(pipe, both)
    outer, match = guiding(), "one call is guided by one guidance"
    with outer.listening(pipe), pytest.raises(InputError, match=match), second.listening(pipe):
        pass
    assert not is_heard(pipe)
    assert torch.equal(called(pipe, guiding()), called(tiny_sd(), guiding()))


# -- after a call that was broken off --------------------------------------------------------------


@pytest.mark.parametrize("again", ["the same", "another", "listening", "guide", "plain"])
def test_a_call_that_was_broken_off_stands_in_nobodys_way(again: str) -> None:
    """As in a notebook, whose last traceback keeps the old guidance alive."""
    pipe, old = tiny_sd(), guiding()
    wanted = called(tiny_sd(), None if again == "plain" else guiding())
    broken_off(pipe, old)
    assert is_heard(pipe)
    if again == "plain":
        found = called(pipe)
    elif again == "guide":
        found = bd.guide(
            pipe, None, guiding(), **embeds_for(pipe), **CALL, latents=noise_for(pipe)
        ).images.clamp(0, 1)
    elif again == "listening":
        new = guiding()
        with new.listening(pipe):
            found = called(pipe, new)
    else:
        found = called(pipe, old if again == "the same" else guiding())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    if again in ("the same", "another", "listening"):
        assert not is_heard(pipe)
    del old
    gc.collect()
    assert not is_heard(pipe)


# -- where gradients are asked for -----------------------------------------------------------------


def test_guidance_in_a_differentiable_call_is_refused() -> None:
    pipe, latents = tiny_sd(), noise_for(tiny_sd()).requires_grad_()
    call: dict[str, Any] = {**embeds_for(pipe), **CALL, "latents": latents}
    with pytest.raises(UnsupportedError, match=r"guidance inside bd\.differentiable"):
        bd.differentiable(pipe)(**call, callback_on_step_end=guiding())
    with (
        bd.differentiable(pipe),
        pytest.raises(UnsupportedError, match=r"guidance inside bd\.differentiable"),
    ):
        pipe(**call, callback_on_step_end=guiding())
    with pytest.raises(MissingGradientError, match="requires grad"):
        bd.guide(pipe, None, guiding(), **call)
    with torch.no_grad():
        assert bool(bd.guide(pipe, None, guiding(), **call).images.isfinite().all())


def test_inference_mode_is_refused_by_name() -> None:
    model = bd.Denoiser(lambda x, t, cond: 0.9 * x, bd.VP.linear())
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        bd.sample(model, torch.randn(1, 3, 4, 4), guidance=guiding())


def test_latents_for_another_number_of_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="latents has 2 samples, and the call makes 1"):
        bd.guide(tiny_sd(), "a", guiding(), num_inference_steps=STEPS, latents=torch.randn(2, 4, 8, 8))


# -- fresh noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("given", [True, False])
def test_time_travel_draws_other_noise_than_the_run_began_with(seed: int, given: bool) -> None:
    """The same seed for the pictures and for the guidance, as is usual: the state keeps its marginal."""
    pipe, kept = bd.load(), []

    def rule(attempt: Any) -> Tensor:
        kept.append(attempt.x)
        attempt.note(loss=torch.zeros(len(attempt.x)))
        return attempt.take()

    guidance = bd.guidance.Guidance(rule, dark, steps=[3], repeats=2, seed=seed)
    latents = bd.noise(pipe, seed=seed, batch_size=2) if given else None
    bd.guide(
        pipe,
        ["a red two"] * 2,
        guidance,
        num_inference_steps=10,
        guidance_scale=3.0,
        latents=latents,
        seed=seed,
    )
    before, after = (x.square().mean((1, 2, 3)).sqrt() for x in kept)
    torch.testing.assert_close(after, before, rtol=0.2, atol=0)  # with the same noise it is a third and more


def test_no_stream_is_that_of_a_small_seed() -> None:
    for seed in range(8):
        x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(seed))
        for other in range(8):
            drawn = Streams(other).like(x)
            for row in (0, 1):
                alike = torch.corrcoef(torch.stack([drawn[row].flatten(), x[row].flatten()]))[0, 1]
                assert abs(float(alike)) < 0.1


# -- a loss alone ----------------------------------------------------------------------------------


def test_a_loss_alone_pulls_as_was_measured_on_the_built_in_pipelines() -> None:
    pipe = bd.load()
    style, other = resolve("style:skimage/coffee"), resolve("brightness:0.5")
    assert usual_strength(pipe, style, 100, {"guidance_scale": 3.0}) == STRENGTHS["style"]["sd"]
    assert usual_strength(pipe, style, 50, {"guidance_scale": 3.0}) == 2 * STRENGTHS["style"]["sd"]
    assert usual_strength(pipe, style, 100, {"guidance_scale": 6.0}) == STRENGTHS["style"]["sd"] / 2
    assert usual_strength(pipe, style, 100, {}) == pytest.approx(STRENGTHS["style"]["sd"] * 3 / 7.5)
    assert usual_strength(pipe, other, 100, {"guidance_scale": 3.0}) == min(
        s["sd"] for s in STRENGTHS.values()
    )
    assert usual_strength(tiny_sd(), style, 50, {}) == 0.2
    how: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 3.0, "seed": 1}
    found = bd.guide(pipe, "a red two", "brightness:0.5", **how)
    w = STRENGTHS["class"]["sd"] * 100 / 12
    own = bd.guide(pipe, "a red two", bd.SymplecticAdjointGuidance("brightness:0.5", strength=w), **how)
    assert torch.equal(found.images, own.images)


def test_a_prompt_that_a_pipeline_does_not_take_is_refused() -> None:
    from tiny_families import tiny_pixels

    with pytest.raises(InputError, match="takes no argument 'prompt'"):
        bd.guide(tiny_pixels(), "a cat", guiding(), num_inference_steps=4)
