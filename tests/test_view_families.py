"""The view of a pipeline's call: family by family the pipeline's own run, its gradients, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError, UnsupportedError
from tiny_conditioned import CASES, normal, picture, text, tokens
from tiny_families import tiny_animatediff, tiny_modular, tiny_pixart, tiny_pixels, tiny_sana, tiny_wan
from tiny_pipelines import (
    TOKENS,
    WIDTH,
    embeds_for,
    noise_for,
    tiny_controlnet,
    tiny_flux,
    tiny_sd,
    tiny_sdxl,
)

N = 4
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def with_scheduler(build: Callable[[], Any], name: str, **config: Any) -> Any:
    """A pipeline with another scheduler."""
    import diffusers

    pipe = build()
    pipe.scheduler = getattr(diffusers, name)(**config)
    return pipe


def ddim(build: Callable[[], Any], **config: Any) -> Any:
    return with_scheduler(build, "DDIMScheduler", **{**TABLE, "clip_sample": False, **config})


def flow(build: Callable[[], Any], **config: Any) -> Any:
    return with_scheduler(build, "FlowMatchEulerDiscreteScheduler", **{"shift": 3.0, **config})


def shifted() -> Any:
    """Flux-dev's own scheduler shifts its times by the picture's size."""
    return flow(tiny_flux, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)


def guided_flux() -> Any:
    """Flux-dev's network is told the guidance scale."""
    from diffusers import FluxTransformer2DModel

    pipe = tiny_flux()
    config = {k: v for k, v in pipe.transformer.config.items() if k != "_use_default_values"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer = FluxTransformer2DModel.from_config({**config, "guidance_embeds": True}).eval()
    return pipe


def sentences(pipe: Any) -> dict[str, Any]:
    call = {**tokens(1, TOKENS, WIDTH), "latents": noise_for(pipe), "guidance_scale": 3.0}
    return {k: v for k, v in call.items() if k != "negative_prompt"}


def film(pipe: Any) -> dict[str, Any]:
    pair = {
        "prompt_embeds": normal(1, TOKENS, WIDTH, seed=1),
        "negative_prompt_embeds": normal(1, TOKENS, WIDTH, seed=2),
    }
    size = {"height": 16, "width": 16, "num_frames": 2, "guidance_scale": 3.0}
    return {**pair, **size, "latents": normal(1, 4, 2, 8, 8)}


Case = tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]
VIEWS: dict[str, Case] = {
    "sdxl, Euler": (tiny_sdxl, text),
    "sdxl, DDIM, v, rescaled": (
        lambda: ddim(tiny_sdxl, prediction_type="v_prediction", timestep_spacing="trailing"),
        lambda pipe: {**text(pipe), "guidance_rescale": 0.7},
    ),
    "sdxl, EDM": (lambda: with_scheduler(tiny_sdxl, "EDMEulerScheduler"), text),
    "sdxl, EDM, v": (
        lambda: with_scheduler(tiny_sdxl, "EDMEulerScheduler", prediction_type="v_prediction", sigma_data=1.0),
        text,
    ),
    "sdxl, Euler in continuous time": (
        lambda: with_scheduler(
            tiny_sdxl, "EulerDiscreteScheduler", prediction_type="v_prediction", timestep_type="continuous",
            use_karras_sigmas=True, sigma_min=0.002, sigma_max=80.0,
        ),
        text,
    ),
    "flux, shifted by size": (shifted, text),
    "flux, told the scale": (guided_flux, text),
    "pixart, DDIM": (lambda: ddim(tiny_pixart), lambda pipe: {**sentences(pipe), "height": 16, "width": 16}),
    "sana, flow": (
        lambda: flow(tiny_sana),
        lambda pipe: {**sentences(pipe), "height": 32, "width": 32, "latents": normal(1, 4, 16, 16)},
    ),
    "wan, flow": (lambda: flow(tiny_wan), film),
    "animatediff": (tiny_animatediff, film),
    "pixels, DDIM": (lambda: tiny_pixels("DDIMPipeline"), lambda pipe: {"batch_size": 2}),
    **{
        name: CASES[name]
        for name in (
            "flux, true guidance", "t2i adapter", "controlnet", "sd3 controlnet", "flux controlnet", "flux fill",
            "flux kontext", "inpainting, 9 channels", "img2img", "sd, two pictures",
        )
    },
}  # fmt: skip


def built(name: str) -> tuple[Any, dict[str, Any]]:
    build, arguments = VIEWS[name]
    pipe = build()
    return pipe, arguments(pipe)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def own_run(pipe: Any, call: dict[str, Any], steps: int = N, run: Any = None) -> Tensor:
    """The pipeline's own clean latents; with its own arguments where the view says more kindly that there are none."""
    torch.manual_seed(3)
    more = {"negative_prompt": None} if "prompt_attention_mask" in call else {}
    pixels = type(pipe).__name__ == "DDIMPipeline"
    kind = {"output_type": "np" if pixels else "latent"}
    out = (run or pipe)(**call, **more, **kind, num_inference_steps=steps, generator=seeded())
    found = out.frames if hasattr(out, "frames") else out.images
    return torch.as_tensor(found).permute(0, 3, 1, 2) * 2 - 1 if pixels else found


def view_of(pipe: Any, call: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(3)  # some draw the control picture's latents from the global generator
    return bd.as_denoiser(pipe, **{"num_inference_steps": N, **call, **more}, generator=seeded())


@pytest.mark.parametrize("name", VIEWS)
def test_euler_on_the_calls_grid_is_the_pipelines_own_run(name: str) -> None:
    pipe, call = built(name)
    view = view_of(pipe, call)
    assert view.x_T is not None
    with torch.no_grad():
        solution = bd.sample(view.model, view.x_T, view.cond, grid=view.grid(), solver=bd.Euler())
    expected = own_run(pipe, call)
    found = solution.x0.clamp(-1, 1) if name.startswith("pixels") else solution.x0
    size = float(expected.abs().max())
    # Schedulers hold their levels in float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * size)
    assert float((expected - view.x_T).abs().max()) > 0.1
    # Halves of guidance that the pipeline calls for one after the other stay two calls.
    assert solution.nfe == view.grid().steps * (2 if name in ("flux, true guidance", "wan, flow") else 1)


GRADED = [
    "sdxl, Euler", "sdxl, EDM", "flux, told the scale", "flux, true guidance", "pixart, DDIM", "sana, flow",
    "wan, flow", "animatediff", "controlnet", "t2i adapter", "inpainting, 9 channels", "img2img",
]  # fmt: skip


def leaves_of(call: dict[str, Any]) -> dict[str, Tensor]:
    """Noise, embeddings and pictures of a call, requiring grad."""
    return {
        name: value.detach().clone().requires_grad_()
        for name, value in call.items()
        if isinstance(value, Tensor) and "mask" not in name
    }


def gradients(state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = normal(*state.shape, seed=8).to(state)
    found = torch.autograd.grad((weight * state).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[k] - g).norm() / g.norm()) for k, g in expected.items())


@pytest.mark.parametrize("name", GRADED)
def test_gradients_are_those_through_the_pipelines_own_loop(name: str) -> None:
    pipe, call = built(name)
    leaves = leaves_of(call)
    call |= leaves
    expected = gradients(own_run(pipe, call, run=bd.differentiable(pipe)), leaves)
    assert all(float(g.abs().max()) > 0 for g in expected.values())
    for gradient in (bd.Exact("min"), bd.SymplecticAdjoint()):
        view = view_of(pipe, call)
        x0 = bd.sample(
            view.model, view.x_T, view.cond, grid=view.grid(), solver=bd.Euler(), gradient=gradient
        ).x0
        assert apart(gradients(x0, leaves), expected) < 1e-4
    assert all(p.grad is None for module in pipe.components.values() for p in parameters(module))


def parameters(module: Any) -> list[Tensor]:
    return list(module.parameters()) if isinstance(module, torch.nn.Module) else []


def test_in_float64_state_and_gradients_are_the_pipelines_to_rounding() -> None:
    pipe = ddim(tiny_sdxl, timestep_spacing="trailing")
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.double()
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
    call = {k: v.double() if isinstance(v, Tensor) else v for k, v in text(pipe).items()}
    leaves = leaves_of(call)
    call |= leaves
    own = own_run(pipe, call, run=bd.differentiable(pipe))
    expected = gradients(own, leaves)
    for gradient in (bd.Exact("min"), bd.SymplecticAdjoint()):
        view = view_of(pipe, call)
        x0 = bd.sample(view.model, view.x_T, view.cond, grid=view.grid(), gradient=gradient).x0
        torch.testing.assert_close(x0, own, rtol=1e-11, atol=1e-11)
        assert apart(gradients(x0, leaves), expected) < 1e-10


@pytest.mark.parametrize("train", ["unet.*attn2.to_q*", "text_encoder_2.*fc1*"])
def test_weights_of_the_network_and_of_a_text_encoder_get_gradients(train: str) -> None:
    pipe = tiny_sdxl()
    call = {"prompt": "a b", "negative_prompt": "c", "latents": noise_for(pipe), "guidance_scale": 3.0}
    part = getattr(pipe, train.split(".")[0])
    weights = {k: p for k, p in part.named_parameters() if ("to_q" if "unet" in train else "fc1") in k}
    weights = {k: p for k, p in weights.items() if "unet" not in train or "attn2" in k}
    expected = gradients(own_run(pipe, call, run=bd.differentiable(pipe, train=train)), weights)
    view = view_of(pipe, call, train=train)
    x0 = bd.sample(view.model, view.x_T, view.cond, grid=view.grid(), gradient=bd.Exact()).x0
    assert apart(gradients(x0, weights), expected) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "sdxl, Euler",
        "flux, true guidance",
        "pixart, DDIM",
        "wan, flow",
        "animatediff",
        "controlnet",
        "flux kontext",
    ],
)
def test_one_prompt_serves_a_batch_of_noises(name: str) -> None:
    pipe, call = built(name)
    view = view_of(pipe, call)
    x = torch.cat([view.x_T, normal(*view.x_T.shape, seed=5)])
    with torch.no_grad():
        both = bd.sample(view.model, x, view.cond, grid=view.grid(2)).x0
        each = [bd.sample(view.model, row[None], view.cond, grid=view.grid(2)).x0 for row in x]
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-4, atol=1e-4)
    two = {k: torch.cat([v, v]) if isinstance(v, Tensor) and "embed" in k else v for k, v in call.items()}
    if name in ("sdxl, Euler", "flux, true guidance"):
        view = view_of(pipe, {**two, "latents": x})
        with torch.no_grad():
            again = bd.sample(view.model, x, view.cond, grid=view.grid(2)).x0
        torch.testing.assert_close(again, both, rtol=1e-4, atol=1e-4)
        with pytest.raises(InputError, match="for 2 samples and the state has 3"):
            bd.sample(view.model, torch.cat([x, x[:1]]), view.cond, grid=view.grid(2))


def test_what_is_passed_on_as_it_is_is_the_users_own_tensor() -> None:
    pipe = tiny_sdxl()
    call = {**text(pipe), **leaves_of(embeds_for(pipe))}
    view = view_of(pipe, call)
    assert view.cond["encoder_hidden_states"] is call["prompt_embeds"]
    assert view.cond["added_cond_kwargs.text_embeds"] is call["pooled_prompt_embeds"]
    assert view.model.uncond["encoder_hidden_states"] is call["negative_prompt_embeds"]
    with torch.no_grad():
        call["prompt_embeds"].add_(0.3)
        found = bd.sample(view.model, view.x_T, view.cond, grid=view.grid()).x0
        torch.testing.assert_close(found, own_run(pipe, call), rtol=0, atol=1e-4)


def test_a_call_of_stable_diffusion_is_the_view_without_one() -> None:
    pipe = tiny_sd()
    short = bd.as_denoiser(pipe, "a b", 5.0, negative_prompt="c")
    long = bd.as_denoiser(pipe, "a b", 5.0, negative_prompt="c", latents=noise_for(pipe))
    assert short.x_T is None
    with torch.no_grad():
        pair = [bd.sample(v.model, noise_for(pipe), v.cond, grid=v.grid(5)).x0 for v in (short, long)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    model, cond = short
    assert model is short.model
    assert cond is short.cond
    torch.testing.assert_close(short.decode(pair[0]), long.decode(pair[0]))
    with pytest.raises(InputError, match="without a call"):
        short.grid()


def test_the_grid_is_that_of_the_call_and_costs_no_network_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = built("flux, shifted by size")
    view = view_of(pipe, call)
    other = view_of(pipe, call, num_inference_steps=7)
    made: list[int] = []
    forward = type(pipe.transformer).forward

    @wraps(forward)
    def counted(*args: Any, **more: Any) -> Any:
        made.append(1)
        return forward(*args, **more)

    monkeypatch.setattr(type(pipe.transformer), "forward", counted)
    schedule = view.model.schedule
    found = view.grid(7).nodes(schedule)
    assert torch.equal(found, other.grid().nodes(schedule))
    assert torch.equal(found, bd.pipeline_grid(view, 7).nodes(schedule))
    assert not made
    assert not torch.allclose(found, torch.linspace(1, 0, 8, dtype=torch.float64))  # shifted
    view_of(pipe, call)
    assert len(made) == 1
    with pytest.raises(UnsupportedError, match=r"use_dynamic_shifting.*grid\(7\)"):
        bd.pipeline_grid(pipe, 7)
    with pytest.raises(UnsupportedError, match=r"times of its own.*grid\(3\)"):
        bd.pipeline_grid(tiny_flux(), 3)
    with pytest.raises(InputError, match="whole number"):
        view.grid(0)
    assert bd.pipeline_grid(tiny_sdxl(), 5).steps == 5


def test_nothing_of_the_users_is_changed() -> None:
    pipe = tiny_controlnet()
    generator = seeded()
    before, random = copy.deepcopy(vars(pipe.scheduler)), torch.get_rng_state()
    kept = {
        name: (type(part), getattr(part, "__dict__", {}).get("forward"))
        for name, part in pipe.components.items()
    }
    call = {**embeds_for(pipe), "image": picture()}
    view = bd.as_denoiser(pipe, **call, generator=generator, num_inference_steps=3)
    assert torch.equal(generator.get_state(), seeded().get_state())
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(pipe.scheduler).keys() == before.keys()
    assert {
        name: (type(part), getattr(part, "__dict__", {}).get("forward"))
        for name, part in pipe.components.items()
    } == kept
    assert torch.equal(view.x_T, torch.randn(1, 4, 8, 8, generator=seeded()))


def test_solvers_reversible_runs_and_guidance_work_on_a_view() -> None:
    pipe, call = built("flux, told the scale")
    view = view_of(pipe, call)
    grid = view.grid()
    with torch.no_grad():
        fine = bd.sample(view.model, view.x_T, view.cond, grid=view.grid(64), solver=bd.RK4()).x0
        first, second = (
            float((bd.sample(view.model, view.x_T, view.cond, grid=grid, solver=s).x0 - fine).norm())
            for s in (bd.Euler(), bd.Heun())
        )
        solver = bd.McCallumFoster(bd.Euler())
        there = bd.sample(view.model, view.x_T, view.cond, grid=grid, solver=solver)
        assert there.pair is not None
        back = bd.encode(view.model, there.pair, view.cond, grid=grid, solver=solver)
    assert second < first
    torch.testing.assert_close(back.first, view.x_T, rtol=1e-4, atol=1e-4)
    losses = []
    for strength in (1e-6, 0.3):
        guidance = bd.SymplecticAdjointGuidance(
            lambda images: images.square().mean((1, 2, 3)),
            1,
            steps=[1],
            strength=bd.guidance.Relative(strength, "epsilon"),
            decode=view.decode,
        )
        with torch.no_grad():
            x0 = bd.sample(view.model, view.x_T, view.cond, grid=grid, guidance=guidance).x0
            losses.append(float(view.decode(x0).square().mean()))
    assert losses[1] < losses[0]


def refusal(match: str, pipe: Any, **call: Any) -> None:
    with pytest.raises((UnsupportedError, InputError, MissingGradientError), match=match):
        bd.as_denoiser(pipe, **{"num_inference_steps": N, **call})


def test_what_has_no_view_is_refused_by_name_before_anything_is_sampled() -> None:
    control = tiny_controlnet()
    late = {**embeds_for(control), "image": picture(), "control_guidance_end": 0.5}
    refusal(r"step 3 of .*ControlNetPipeline gives controlnet another conditioning_scale", control, **late)
    build, arguments = CASES["inpainting, 4 channels"]
    pipe = build()
    call = arguments(pipe)
    refusal("puts something back into the latents", pipe, **call)
    refusal("modular pipeline", tiny_modular())
    wan = tiny_wan()
    vars(wan)["transformer_2"] = wan.transformer
    refusal(r"transformer_2.*bd\.differentiable", wan, **film(wan))
    refusal("takes no colour; it takes prompt", tiny_sdxl(), prompt="a", colour=1)
    refusal("callback_on_step_end belongs", tiny_sdxl(), prompt="a", callback_on_step_end=print)
    refusal("give prompt or prompt_embeds", tiny_sdxl(), prompt="a", **embeds_for(tiny_sdxl()))
    refusal(r"without its text encoders .* prompt_embeds", tiny_flux(), prompt="a")
    sdxl = tiny_sdxl()
    unused = {
        k: v.requires_grad_() if k.startswith("negative_prompt") else v for k, v in embeds_for(sdxl).items()
    }
    refusal("negative_prompt_embeds requires grad", sdxl, **unused, guidance_scale=1.0)
    refusal("text_encoder requires grad", sdxl, **embeds_for(sdxl), train="text_encoder")
    offloaded = tiny_sdxl()
    offloaded.enable_model_cpu_offload(device="cpu")
    refusal("offloaded", offloaded, prompt="a")
    strange = with_scheduler(tiny_sdxl, "EulerDiscreteScheduler", timestep_type="continuous")
    refusal("timestep_type", strange, prompt="a")
    heun = with_scheduler(tiny_sdxl, "HeunDiscreteScheduler", **TABLE)
    view = bd.as_denoiser(heun, "a", num_inference_steps=3)
    with pytest.raises(UnsupportedError, match="more than once"):
        view.grid()
    with torch.no_grad():  # the view itself needs no times of the scheduler's
        assert bd.sample(view.model, view.x_T, view.cond, grid=bd.TimeGrid("logsnr", 3)).x0.isfinite().all()
