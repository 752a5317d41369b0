"""Guided pipelines: the three ways in beside each other, and beside loops written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, UnsupportedError
from backdrift.guidance import Guidance
from backdrift.guidance.attempt import plain
from backdrift.guidance.streams import Streams
from backdrift.guidance.travel import renoised
from backdrift.host import Level
from tiny_families import tiny_animatediff
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

STEPS = 8
SIZE = {"height": PICTURE, "width": PICTURE}


def dark(images: Tensor) -> Tensor:
    """A loss: the mean square, weighted so that pixels differ."""
    weights = torch.linspace(0.5, 1.5, images[0].numel(), dtype=images.dtype).view_as(images[0])
    return (weights * images.pow(2)).mean((1, 2, 3))


def with_scheduler(pipe: Any, name: str, **options: Any) -> Any:
    import diffusers

    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return pipe


def sag(n: int = 2, **options: Any) -> Any:
    return bd.SymplecticAdjointGuidance(dark, n, options.pop("start", 0.25), 0.75, 0.3, **options)


def own_call(pipe: Any, **call: Any) -> Tensor:
    """The user's own call, with pictures as a tensor, clamped by diffusers."""
    return pipe(**embeds_for(pipe), **SIZE, num_inference_steps=STEPS, output_type="pt", **call).images


def guided(pipe: Any, guidance: Any, latents: Tensor, **call: Any) -> Any:
    """The same call by ``guide``."""
    own = {**embeds_for(pipe), **SIZE, "num_inference_steps": STEPS, "latents": latents.clone(), **call}
    return bd.guide(pipe, None, guidance, **own)


FAMILIES = {
    "sd-ddim": lambda: with_scheduler(tiny_sd(), "DDIMScheduler"),
    "sd-dpm": lambda: with_scheduler(tiny_sd(), "DPMSolverMultistepScheduler"),
    "sd-deis": lambda: with_scheduler(tiny_sd(), "DEISMultistepScheduler"),
    "sd-euler": lambda: with_scheduler(tiny_sd(), "EulerDiscreteScheduler"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}


@pytest.fixture(params=list(FAMILIES))
def pipe(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


# -- the ways in -----------------------------------------------------------------------------------


def test_without_a_pull_guide_is_the_pipelines_own_call(pipe: Any) -> None:
    latents = noise_for(pipe)
    found = guided(pipe, Guidance(plain, dark), latents)
    assert torch.equal(found.images.clamp(0, 1), own_call(pipe, latents=latents))


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_stock_call_and_guide_are_the_same(pipe: Any, repeats: int) -> None:
    """``pipe(prompt, callback_on_step_end=guidance)``: nothing but the callback is added to the user's call."""
    latents = noise_for(pipe)
    before = {key: type(value) for key, value in vars(pipe).items()}
    callback = sag(repeats=repeats, seed=3)
    stock = own_call(pipe, latents=latents.clone(), callback_on_step_end=callback)
    whole = sag(repeats=repeats, seed=3)
    found = guided(pipe, whole, latents)
    torch.testing.assert_close(found.images.clamp(0, 1), stock, rtol=1e-5, atol=1e-6)
    assert (stock - own_call(pipe, latents=latents)).abs().max() > 1e-4
    for key in ("calls_forward", "calls_redone", "vjps"):
        assert callback.trace.as_dict()[key] == whole.trace.as_dict()[key]
    assert [e.loss for e in callback.trace.entries] == [
        pytest.approx(e.loss, rel=1e-4) for e in whole.trace.entries
    ]
    now = {key: type(value) for key, value in vars(pipe).items() if key in before}
    assert now == before
    assert not any(
        module._forward_pre_hooks for module in vars(pipe).values() if hasattr(module, "parameters")
    )


def test_guidance_lowers_the_loss_of_the_finished_picture(pipe: Any) -> None:
    latents = noise_for(pipe)
    free, pulled = (guided(pipe, g, latents) for g in (Guidance(plain, dark), sag(3)))
    assert (dark(pulled.images) < dark(free.images)).all()


def test_a_call_that_is_listened_to_may_be_guided_from_its_first_step() -> None:
    pipe, latents = FAMILIES["sd-ddim"](), noise_for(FAMILIES["sd-ddim"]())
    with pytest.raises(InputError, match="with guidance"):
        own_call(pipe, latents=latents.clone(), callback_on_step_end=sag(start=0.0))
    guidance = sag(start=0.0)
    with guidance.listening(pipe):
        stock = own_call(pipe, latents=latents.clone(), callback_on_step_end=guidance)
    found = guided(pipe, sag(start=0.0), latents)
    torch.testing.assert_close(found.images.clamp(0, 1), stock, rtol=1e-5, atol=1e-6)
    assert guidance.trace.entries[0].index == 0


def test_a_callback_that_raises_leaves_the_pipeline_as_it_was() -> None:
    pipe = FAMILIES["sd-ddim"]()
    latents = noise_for(pipe)
    plainly = own_call(pipe, latents=latents.clone())

    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("a loss of the user's")

    guidance = bd.SymplecticAdjointGuidance(broken, 1)
    with pytest.raises(RuntimeError, match="a loss of the user's"):
        own_call(pipe, latents=latents.clone(), callback_on_step_end=guidance)
    assert type(pipe.scheduler).step is type(pipe.scheduler).__mro__[0].step
    assert torch.equal(own_call(pipe, latents=latents), plainly)


# -- beside bd.sample ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "solver", "form"),
    [
        ("sd-ddim", bd.Euler(), "exponential"),
        ("sd-dpm", bd.DPMSolverPP(), "data"),
        ("sd3", bd.Euler(), "original"),
    ],
)
@pytest.mark.parametrize("repeats", [1, 2])
def test_guide_is_guided_sample_on_the_pipelines_view(
    family: str, solver: Any, form: str, repeats: int
) -> None:
    """Two hosts that have nothing in common but their mathematics."""
    pipe = FAMILIES[family]()
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, **({} if family == "sd3" else {"timestep_spacing": "leading"})
    )
    if family == "sd-ddim":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    latents = noise_for(pipe)
    options = {"repeats": repeats, "seed": [5], "subgrid": "uniform"}
    found = bd.guide(
        pipe,
        "a cat",
        sag(3, **options),
        num_inference_steps=STEPS,
        latents=latents.clone(),
        guidance_scale=4.0,
    )
    view = bd.as_denoiser(pipe, "a cat", 4.0)
    config = pipe.vae.config

    def decode(x0: Tensor) -> Tensor:
        shifted = x0 / config.scaling_factor + (config.shift_factor or 0.0)
        return pipe.vae.decode(shifted, return_dict=False)[0] / 2 + 0.5

    sampled = bd.sample(
        view.model,
        latents,
        view.cond,
        solver=solver,
        form=form,
        grid=bd.pipeline_grid(pipe, STEPS),
        guidance=sag(3, decode=decode, **options),
    )
    with torch.no_grad():
        images = decode(sampled.x0)
    torch.testing.assert_close(found.images, images, rtol=1e-3, atol=2e-4)


def test_ddim_and_euler_make_the_same_guided_picture() -> None:
    """One run in two coordinates: x = alpha x0 + sigma eps, and x = x0 + sigma eps."""
    found = []
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        pipe = with_scheduler(tiny_sd(), name, timestep_spacing="leading", steps_offset=1)
        if name == "DDIMScheduler":
            pipe.scheduler = type(pipe.scheduler).from_config(
                pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True
            )
        latents = noise_for(pipe)
        if name == "EulerDiscreteScheduler":
            pipe.scheduler.set_timesteps(STEPS)
            sigma = float(pipe.scheduler.sigmas[0])
            # the same noisy state: the pipeline multiplies by init_noise_sigma
            latents = latents * math.sqrt(sigma**2 + 1) / float(pipe.scheduler.init_noise_sigma)
        guided = bd.guide(
            pipe, "a cat", sag(2, repeats=2, seed=[1]), num_inference_steps=STEPS, latents=latents
        )
        found.append(guided.images)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=5e-4)


# -- what is refused, before any sampling ----------------------------------------------------------


def counting(pipe: Any) -> list[int]:
    calls: list[int] = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def detached(images: Tensor) -> Tensor:
    return images.detach().mean((1, 2, 3))


def mean(images: Tensor) -> Tensor:
    return images.mean()


@pytest.mark.parametrize(
    ("guidance", "call", "words"),
    [
        (lambda: sag(7), {}, "n = 7 is more than"),
        (lambda: bd.SymplecticAdjointGuidance(dark, 1, steps=[9]), {}, "step 9 is out of range"),
        (
            lambda: bd.SymplecticAdjointGuidance(lambda x: x.mean(), 1),
            {"num_images_per_prompt": 2},
            "one value per sample",
        ),
        (lambda: bd.SymplecticAdjointGuidance(detached, 1), {}, "does not depend on the picture"),
        (lambda: sag(), {"seed": [1, 2]}, "each of the 1 pictures"),
        (lambda: sag(), {"num_inference_steps": 0}, "num_inference_steps must be"),
        (lambda: sag(), {"generator": torch.Generator()}, "seed= of guide"),
        (lambda: sag(), {"guidence_scale": 3.0}, "takes no argument 'guidence_scale'"),
    ],
)
def test_bad_input_is_refused_before_any_sampling(guidance: Any, call: dict[str, Any], words: str) -> None:
    pipe = FAMILIES["sd-ddim"]()
    calls = counting(pipe)
    with pytest.raises(InputError, match=words):
        bd.guide(pipe, "a cat", guidance(), **{"num_inference_steps": STEPS, **call})
    assert not calls


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_step_that_draws_noise_draws_anew_in_each_attempt(name: str) -> None:
    """Against a loop by hand: the scheduler's own steps, time travel between them, one generator throughout."""
    pipe = with_scheduler(tiny_sd(), name)
    embeds, latents = embeds_for(pipe), noise_for(pipe)
    travelling = Guidance(plain, dark, steps=[0], repeats=[2] * STEPS, seed=[3])
    found = guided(pipe, travelling, latents, seed=5, guidance_scale=1.0)

    scheduler, generator, noise = pipe.scheduler, torch.Generator().manual_seed(5), Streams([3])
    scheduler.set_timesteps(STEPS)
    x = latents * scheduler.init_noise_sigma
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            for k in range(2):
                if k:
                    x = renoised(following, *levels(scheduler, i), noise.like(x))  # noqa: F821
                    if getattr(scheduler, "step_index", None) is not None:
                        scheduler._step_index -= 1
                z = scheduler.scale_model_input(x, t)
                out = pipe.unet(z, t, encoder_hidden_states=embeds["prompt_embeds"]).sample
                following = scheduler.step(out, t, x, generator=generator).prev_sample
            x = following
        images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(found.images, images, rtol=1e-4, atol=1e-5)


def levels(scheduler: Any, i: int) -> tuple[Level, Level]:
    """The level that step i leads to, and the one it starts from."""
    if hasattr(scheduler, "sigmas"):
        return Level(1.0, float(scheduler.sigmas[i + 1])), Level(1.0, float(scheduler.sigmas[i]))
    t = int(scheduler.timesteps[i])
    before = int(scheduler.previous_timestep(t))
    signal = [float(scheduler.alphas_cumprod[j]) if j >= 0 else 1.0 for j in (before, t)]
    return Level(signal[0] ** 0.5, (1 - signal[0]) ** 0.5), Level(signal[1] ** 0.5, (1 - signal[1]) ** 0.5)


def test_schedulers_that_take_guidance_back_are_refused_by_name() -> None:
    pipe = with_scheduler(tiny_sd(), "HeunDiscreteScheduler")
    with pytest.raises(UnsupportedError, match="HeunDiscreteScheduler"):
        bd.guide(pipe, "a cat", sag(), num_inference_steps=STEPS)


# -- manners ---------------------------------------------------------------------------------------


def test_pictures_of_a_batch_are_those_they_would_be_alone() -> None:
    pipe = FAMILIES["sd-dpm"]()
    options: dict[str, Any] = {"num_inference_steps": STEPS}
    prompts = ["a cat", "a dog"]
    together = bd.guide(pipe, prompts, sag(repeats=2, seed=[1, 2]), seed=[7, 8], **options).images
    for i in range(2):
        alone = bd.guide(pipe, prompts[i], sag(repeats=2, seed=[i + 1]), seed=[7 + i], **options).images
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_same_seed_the_same_bits() -> None:
    pipe = FAMILIES["sd-dpm"]()
    runs = [
        bd.guide(pipe, "a cat", sag(repeats=2), num_inference_steps=STEPS, seed=4).images for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_a_loss_alone_is_guided_by_with_the_defaults() -> None:
    pipe = FAMILIES["sd-ddim"]()
    found = bd.guide(pipe, "a cat", dark, num_inference_steps=20, seed=1)
    own = bd.guide(pipe, "a cat", bd.SymplecticAdjointGuidance(dark), num_inference_steps=20, seed=1)
    assert torch.equal(found.images, own.images)
    assert [e.index for e in found.trace.entries] == list(range(6, 14))
    assert found.pil[0].size == (16, 16)


def test_prompts_reach_the_loss() -> None:
    pipe, seen = FAMILIES["sd-ddim"](), []

    def loss(images: Tensor, prompts: Any) -> Tensor:
        seen.append(prompts)
        return dark(images)

    bd.guide(
        pipe, "a cat", bd.SymplecticAdjointGuidance(loss, 1, steps=[3]), num_inference_steps=STEPS,
        num_images_per_prompt=2,
    )  # fmt: skip
    assert seen == [["a cat", "a cat"]] * 2


def test_a_video_is_guided() -> None:
    pipe = tiny_animatediff()
    call: dict[str, Any] = {"num_frames": 2, "num_inference_steps": STEPS, "seed": 1, **SIZE}
    free, pulled = (bd.guide(pipe, "a cat", g, **call) for g in (Guidance(plain, dark), sag(2)))
    assert free.images.shape == pulled.images.shape == (1, 2, 3, PICTURE, PICTURE)
    per_frame = [dark(found.images.flatten(0, 1)).mean() for found in (free, pulled)]
    assert per_frame[1] < per_frame[0]
    assert len(pulled.pil[0]) == 2


def test_flagged_pictures_are_told_and_not_blackened() -> None:
    pipe = tiny_sd(safety_checker=True)
    found = bd.guide(pipe, "a cat", Guidance(plain, dark), num_inference_steps=STEPS, seed=0)
    assert found.flagged is not None
    assert len(found.flagged) == 1
    assert found.images.abs().max() > 0
