"""`through=` on a pipeline's own loop: the bits of a loop truncated by hand, and nothing lost in silence."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.pipelines.stepping import steps_of_passes
from pipeline_calls import assert_equal, loss_of
from tiny_families import tiny_stable_audio, tiny_wan
from tiny_pipelines import (
    PICTURE,
    TOKENS,
    WIDTH,
    embeds_for,
    noise_for,
    tiny_controlnet,
    tiny_flux,
    tiny_sd_img2img,
)
from truncated_calls import CASES, N, arguments, lora, prepared, with_lora
from truncated_loops import sampled_by_hand

# what is asked for, whether the noise gets a gradient, and the same by hand
CHOICES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "last": (bd.Last(2), False, {"carrying": [2, 3], "cut": 2}),
    "steps": (bd.Steps([0, 2]), True, {"carrying": [0, 2]}),
    "detached": (bd.Steps([1, -1], detach_input=True), True, {"carrying": [1, 3], "detach_input": True}),
    "discounted": (bd.All(discount=0.5), True, {"carrying": range(N), "discount": 0.5}),
    "input": (bd.Steps([1, 2], input_discount=0.25), True, {"carrying": [1, 2], "input_discount": 0.25}),
}


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
