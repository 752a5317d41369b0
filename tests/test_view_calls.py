"""The view of a pipeline's call: what it shares with the user, its grid, its solvers, and what has none."""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

import pytest
import torch

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError, UnsupportedError
from tiny_conditioned import CASES, picture, text
from tiny_families import tiny_modular, tiny_wan
from tiny_pipelines import embeds_for, noise_for, tiny_controlnet, tiny_flux, tiny_sd, tiny_sdxl
from viewed_calls import TABLE, N, built, film, leaves_of, own_run, seeded, view_of, with_scheduler


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
    strange = with_scheduler(tiny_sdxl, "EulerDiscreteScheduler", timestep_type="continuous")
    refusal("timestep_type", strange, prompt="a")
    heun = with_scheduler(tiny_sdxl, "HeunDiscreteScheduler", **TABLE)
    view = bd.as_denoiser(heun, "a", num_inference_steps=3)
    with pytest.raises(UnsupportedError, match="more than once"):
        view.grid()
    with torch.no_grad():  # the view itself needs no times of the scheduler's
        assert bd.sample(view.model, view.x_T, view.cond, grid=bd.TimeGrid("logsnr", 3)).x0.isfinite().all()
