"""`through=` on a pipeline's own loop: the bits of a loop truncated by hand, and nothing lost in silence."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError, UnsupportedError
from backdrift.pipelines.stepping import steps_of_passes
from test_differentiable import assert_equal, loss_of
from tiny_families import tiny_stable_audio, tiny_wan
from tiny_pipelines import (
    PICTURE,
    TOKENS,
    WIDTH,
    embeds_for,
    noise_for,
    tiny_controlnet,
    tiny_flux,
    tiny_sd,
    tiny_sd3,
    tiny_sd_img2img,
)
from truncated_loops import heun_passes, sampled_by_hand

N = 4
CASES = {
    "sd-ddim": (tiny_sd, "DDIMScheduler", {}, list(range(N))),
    "sd-euler": (tiny_sd, "EulerDiscreteScheduler", {}, list(range(N))),
    "sd-heun": (tiny_sd, "HeunDiscreteScheduler", {}, heun_passes(N)),
    "sd-dpm": (tiny_sd, "DPMSolverMultistepScheduler", {}, list(range(N))),
    "sd-pndm": (tiny_sd, "PNDMScheduler", {"skip_prk_steps": True}, [0, 0, 1, 2, 3]),
    "sd3-euler": (tiny_sd3, "FlowMatchEulerDiscreteScheduler", {}, list(range(N))),
    "sd3-heun": (tiny_sd3, "FlowMatchHeunDiscreteScheduler", {}, heun_passes(N)),
    "sd3-dpm": (
        tiny_sd3,
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        list(range(N)),
    ),
}
# what is asked for, whether the noise gets a gradient, and the same by hand
CHOICES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "last": (bd.Last(2), False, {"carrying": [2, 3], "cut": 2}),
    "steps": (bd.Steps([0, 2]), True, {"carrying": [0, 2]}),
    "detached": (bd.Steps([1, -1], detach_input=True), True, {"carrying": [1, 3], "detach_input": True}),
    "discounted": (bd.All(discount=0.5), True, {"carrying": range(N), "discount": 0.5}),
    "input": (bd.Steps([1, 2], input_discount=0.25), True, {"carrying": [1, 2], "input_discount": 0.25}),
}


def with_lora(pipe: Any) -> Any:
    from peft import LoraConfig

    torch.manual_seed(7)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return pipe


def lora(pipe: Any) -> list[Tensor]:
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return [p for n, p in network.named_parameters() if "lora_" in n]


def prepared(case: str) -> tuple[Any, list[int]]:
    build, scheduler, config, passes = CASES[case]
    pipe = with_lora(build())
    cls = getattr(diffusers, scheduler)
    own = {} if scheduler.startswith("FlowMatch") else dict(pipe.scheduler.config)
    pipe.scheduler = cls.from_config({k: v for k, v in own.items() if not k.startswith("_")} | config)
    return pipe, passes


def arguments(pipe: Any, noise: Tensor, steps: int = N) -> dict[str, Any]:
    size = {"height": PICTURE, "width": PICTURE}
    return {"latents": noise, "num_inference_steps": steps, "guidance_scale": 5.0, **size}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("case", CASES)
def test_bits_of_a_loop_truncated_by_hand(case: str, choice: str) -> None:
    pipe, passes = prepared(case)
    through, by_noise, hand = CHOICES[choice]
    noise = noise_for(pipe).requires_grad_(by_noise)
    embeds = {k: v.requires_grad_() for k, v in embeds_for(pipe).items()}
    leaves = [*lora(pipe), *embeds.values(), *([noise] if by_noise else [])]

    expected = sampled_by_hand(pipe, noise, embeds, passes, **hand)
    wanted = torch.autograd.grad(loss_of(expected), leaves)
    assert all(bool(g.any()) for g in wanted)
    # Without truncation the gradient is another: the choice is not without effect.
    full = sampled_by_hand(pipe, noise, embeds, passes, carrying=range(N))
    assert not torch.equal(torch.autograd.grad(loss_of(full), leaves)[0], wanted[0])

    for memory in ("min", "max") if choice == "last" else ("min",):
        run = bd.differentiable(pipe, memory, train="lora", clamp=True, through=through)
        images = run(**embeds, **arguments(pipe, noise)).images
        assert torch.equal(images, expected)
        chosen = run.trace.steps
        assert chosen == tuple(hand["carrying"])
        made, in_graph = len(passes), sum(step in chosen for step in passes)
        assert run.stats.calls_forward == made
        assert_equal(list(torch.autograd.grad(loss_of(images), leaves)), list(wanted))
        # A step without gradient is sampled once; under "min" the last call with one is kept, the others are redone.
        assert run.stats.vjps == in_graph
        assert run.stats.calls_redone == (0 if memory == "max" else in_graph - run.stats.calls_kept)
        assert memory == "max" or run.stats.calls_kept <= 1


def test_all_is_what_it_was() -> None:
    pipe, passes = prepared("sd-ddim")
    noise, embeds = noise_for(pipe).requires_grad_(), embeds_for(pipe)
    wanted = torch.autograd.grad(
        loss_of(sampled_by_hand(pipe, noise, embeds, passes, carrying=range(N))), [noise, *lora(pipe)]
    )
    for through in ("all", bd.All(), bd.Steps(range(N)), bd.Last(N)):
        run = bd.differentiable(pipe, "min", train="lora", clamp=True, through=through)
        images = run(**embeds, **arguments(pipe, noise)).images
        assert_equal(list(torch.autograd.grad(loss_of(images), [noise, *lora(pipe)])), list(wanted))


# ---------------------------------------------------------------------------- which steps


def test_passes_belong_to_the_steps_of_the_progress_bar() -> None:
    for name, own, expected in [
        ("DDIMScheduler", {}, [0, 1, 2, 3]),
        ("HeunDiscreteScheduler", {}, [0, 0, 1, 1, 2, 2, 3]),
        ("KDPM2DiscreteScheduler", {}, [0, 0, 1, 1, 2, 2, 3]),
        ("PNDMScheduler", {"skip_prk_steps": True}, [0, 0, 1, 2, 3]),
        ("PNDMScheduler", {"skip_prk_steps": False}, [0] * 4 + [1] * 4 + [2] * 4 + [3]),
    ]:
        scheduler = getattr(diffusers, name)(**own)
        scheduler.set_timesteps(4)
        assert steps_of_passes(scheduler, len(scheduler.timesteps)) == expected, name


def test_random_steps_are_drawn_anew_in_each_call_and_again_from_the_seed() -> None:
    pipe, _ = prepared("sd-ddim")
    noise, embeds = noise_for(pipe), embeds_for(pipe)

    def drawn(through: Any, calls: int = 4) -> list[tuple[int, ...]]:
        torch.rand(3)  # the global state has no part in it
        run = bd.differentiable(pipe, "min", train="lora", through=through)
        found = []
        for _ in range(calls):
            run(**embeds, **arguments(pipe, noise), output_type="latent")
            found.append(run.trace.steps)
        return found

    once = drawn(bd.Random(2, seed=5))
    assert once == drawn("random:2,seed=5")
    assert once == [bd.Random(2, seed=5).choose(N, i).steps for i in range(4)]
    assert len(set(once)) > 1
    assert all(len(steps) == 2 for steps in once)


def test_image_to_image_counts_the_steps_it_makes() -> None:
    pipe = with_lora(tiny_sd_img2img())
    image = torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(1))
    for scheduler, calls in (("DDIMScheduler", 3), ("HeunDiscreteScheduler", 5)):
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        run = bd.differentiable(pipe, "min", train="lora", through=bd.Last(1))
        images = run(
            image=image,
            strength=0.75,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            **embeds_for(pipe),
        ).images
        assert run.trace.steps == (2,)  # of the three that are left
        assert run.stats.calls_forward == calls
        images.sum().backward()
        assert run.stats.vjps == 1


def family(name: str) -> tuple[Any, list[str], dict[str, Any]]:
    """A pipeline, its denoising networks, and keywords of a call in N steps whose noise requires no gradient."""
    embeds = {
        "prompt_embeds": torch.randn(1, TOKENS, WIDTH),
        "negative_prompt_embeds": torch.randn(1, TOKENS, WIDTH),
    }
    if name == "wan":
        call = {"latents": torch.randn(1, 4, 2, 8, 8), "height": PICTURE, "width": PICTURE, "num_frames": 2}
        return tiny_wan(), ["transformer"], {**call, **embeds, "num_inference_steps": N}
    if name == "stable audio":  # its projection model is called before the loop
        masks = {
            f"{kind}attention_mask": torch.ones(1, TOKENS, dtype=torch.long) for kind in ("", "negative_")
        }
        call = {"latents": torch.randn(1, 3, 16), "audio_end_in_s": 8.0, "num_inference_steps": N}
        return tiny_stable_audio(), ["transformer"], {**call, **embeds, **masks}
    pipe: Any = tiny_flux() if name == "flux" else tiny_controlnet()
    call = {**arguments(pipe, noise_for(pipe)), **embeds_for(pipe)}
    if name == "flux":
        return pipe, ["transformer"], call
    image = torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(1))
    return pipe, ["controlnet", "unet"], {**call, "image": image.requires_grad_()}


@pytest.mark.parametrize("name", ["flux", "wan", "stable audio", "controlnet"])
def test_families_and_control_networks_as_with_networks_that_rest(name: str) -> None:
    """Without a gradient at the noise, nothing before the last step has one: their calls are made under no_grad."""
    torch.manual_seed(0)
    pipe, networks, call = family(name)
    weights = [p for key in networks for p in getattr(pipe, key).parameters() if p.requires_grad]
    leaves = [*(v for v in call.values() if isinstance(v, Tensor) and v.requires_grad), *weights]

    def result(out: Any) -> Tensor:
        return next(getattr(out, k) for k in ("images", "frames", "audios") if hasattr(out, k))

    run = bd.differentiable(pipe, "min", train=networks, clamp=True, through=bd.Last(1))

    def seeded() -> dict[str, torch.Generator]:  # Stable Audio's scheduler adds noise
        return {"generator": torch.Generator().manual_seed(0)}

    found = torch.autograd.grad(loss_of(result(run(**call, **seeded()))), leaves, allow_unused=True)
    per_step = 2 if name in ("wan", "controlnet") else 1
    assert run.stats.vjps == per_step
    made = N * per_step

    called = 0

    def resting(forward: Any) -> Any:
        def called_in_turn(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            called += 1
            with torch.set_grad_enabled(called > made * (N - 1) // N):
                return forward(*args, **kwargs)

        return called_in_turn

    for key in networks:
        getattr(pipe, key).forward = resting(getattr(pipe, key).forward)
    own = type(pipe).__call__.__wrapped__
    out = result(own(pipe, output_type="pt", **call, **seeded()))
    expected = torch.autograd.grad(loss_of(out), leaves, allow_unused=True)
    assert called == made
    assert sum(g is not None and bool(g.any()) for g in expected) > 10
    assert_equal(list(found), list(expected))


# ---------------------------------------------------------------------------- nothing in silence


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


# ---------------------------------------------------------------------------- the trace


def test_the_trace_holds_the_norms_of_the_gradients_at_the_latents() -> None:
    pipe, _ = prepared("sd-ddim")
    noise, embeds = noise_for(pipe).requires_grad_(), embeds_for(pipe)
    kept: list[Tensor] = []

    def keep(own: Any, i: int, t: Any, kwargs: Any) -> Any:
        kept.append(kwargs["latents"])
        return kwargs

    run = bd.differentiable(pipe, "min")
    assert run.trace.latents == [None]
    images = run(**embeds, **arguments(pipe, noise), callback_on_step_end=keep).images
    assert run.trace.latents == [None] * (N + 1)
    assert run.trace.steps == tuple(range(N))
    loss = loss_of(images)
    known = [g.norm().item() for g in torch.autograd.grad(loss, [noise, *kept], retain_graph=True)]
    loss.backward()
    assert run.trace.latents == pytest.approx(known, rel=1e-5)
    assert run.trace.growth == pytest.approx([a / b for a, b in itertools.pairwise(known)], rel=1e-5)
    assert all(norm is not None and norm > 0 for norm in run.trace.eps)
    assert not run.trace.exploding
    assert not run.trace.clipped
    assert "through" in run.trace.as_dict()
    assert "growth" in repr(run.trace)


def test_eps_and_adjoint_are_tied_by_the_schedulers_step() -> None:
    """DDIM with eta = 0 is x' = p x + q eps with known p and q, so the gradient at eps is q times that at x'."""
    pipe, _ = prepared("sd-ddim")
    noise, embeds = noise_for(pipe).requires_grad_(), embeds_for(pipe)
    run = bd.differentiable(pipe, "min")
    loss_of(run(**embeds, **arguments(pipe, noise)).images).backward()
    alphas = pipe.scheduler.alphas_cumprod.double()
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(N)
    times = scheduler.timesteps.tolist()
    for i, t in enumerate(times):
        before = t - scheduler.config.num_train_timesteps // N
        a, b = alphas[t], alphas[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
        q = (1 - b).sqrt() - (b / a * (1 - a)).sqrt()
        assert run.trace.eps[i] == pytest.approx(abs(q.item()) * run.trace.latents[i + 1], rel=1e-4)


def test_clipping_bounds_the_adjoint_at_every_boundary() -> None:
    pipe, _ = prepared("sd-euler")
    generator = torch.Generator().manual_seed(3)
    noise = torch.cat([noise_for(pipe), 3 * torch.randn(1, 4, 8, 8, generator=generator)]).requires_grad_()
    embeds = {k: torch.cat([v, v]) for k, v in embeds_for(pipe).items()}
    free = bd.differentiable(pipe, "min", train="lora", clamp=True)
    plain = loss_of(free(**embeds, **arguments(pipe, noise)).images)
    exact = torch.autograd.grad(plain, [noise, *lora(pipe)])
    limit = min(norm for norm in free.trace.latents[1:] if norm) / 40
    run = bd.differentiable(pipe, "min", train="lora", clamp=True, through=bd.All(clip_step=limit))
    seen: list[Tensor] = []

    def look(own: Any, i: int, t: Any, kwargs: Any) -> Any:
        kwargs["latents"].register_hook(seen.append)  # behind the run's own hook
        return kwargs

    loss = loss_of(run(**embeds, **arguments(pipe, noise), callback_on_step_end=look).images)
    found = torch.autograd.grad(loss, [noise, *lora(pipe)])
    norms = torch.stack(seen).flatten(2).norm(dim=2)  # what each step's end handed on, sample by sample
    assert bool((norms <= limit * (1 + 1e-6)).all())
    assert N in run.trace.clipped  # at the others where a step has made it grow again
    torch.testing.assert_close(norms[0], torch.full((2,), limit), rtol=1e-6, atol=0)
    assert not torch.allclose(found[1], exact[1], rtol=0.1)
    # A limit that nothing reaches changes no bit.
    run = bd.differentiable(pipe, "min", train="lora", clamp=True, through=bd.All(clip_step=1e9))
    loss = loss_of(run(**embeds, **arguments(pipe, noise)).images)
    torch.testing.assert_close(torch.autograd.grad(loss, [noise])[0], exact[0], rtol=0, atol=0)
    assert run.trace.clipped == ()


# ---------------------------------------------------------------------------- with a budget


def test_a_planned_budget_counts_the_truncated_run() -> None:
    pipe, _ = prepared("sd-ddim")
    noise, embeds = noise_for(pipe), embeds_for(pipe)
    full = bd.differentiable(pipe, 10**9, train="lora")
    full(**embeds, **arguments(pipe, noise))
    run = bd.differentiable(pipe, 10**9, train="lora", clamp=True, through=bd.Last(1))
    images = run(**embeds, **arguments(pipe, noise)).images
    assert full.plan is not None
    assert run.plan is not None
    assert run.plan.peak < full.plan.peak
    expected = sampled_by_hand(pipe, noise, embeds, list(range(N)), carrying=[3], cut=3)
    assert_equal(
        list(torch.autograd.grad(loss_of(images), lora(pipe))),
        list(torch.autograd.grad(loss_of(expected), lora(pipe))),
    )
