"""The Denoiser view of a pipeline equals the pipeline's own run, and refuses what it does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.errors import InputError, UnsupportedError
from backdrift.gradients import Exact, Plain
from backdrift.pipelines.view import as_denoiser, pipeline_grid
from backdrift.sampling import sample
from backdrift.solvers import DPMSolverPP
from tiny_pipelines import embeds_for, noise_for, tiny_flux, tiny_sd, tiny_sd3


def double(pipe: Any) -> Any:
    for name in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2"):
        if isinstance(getattr(pipe, name, None), torch.nn.Module):
            getattr(pipe, name).double()
    return pipe


def own_run(pipe: Any, x: Tensor, steps: int, **kwargs: Any) -> Tensor:
    kwargs = {"prompt": "a b", "negative_prompt": "c", "guidance_scale": 5.0, **kwargs}
    return pipe(latents=x, num_inference_steps=steps, output_type="latent", **kwargs).images


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("steps", "spacing"), [(4, "leading"), (7, "leading"), (5, "trailing")])
def test_euler_on_the_exponential_form_is_the_pipelines_ddim(
    prediction: str, steps: int, spacing: str
) -> None:
    from diffusers import DDIMScheduler

    pipe = double(tiny_sd())
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        prediction_type=prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=spacing != "leading",
    )
    table = pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
    if spacing == "leading":
        pipe.scheduler.final_alpha_cumprod = table[0]
    x = noise_for(pipe).double()
    view = as_denoiser(pipe, "a b", 5.0, negative_prompt="c")
    grid = pipeline_grid(pipe, steps)
    with torch.no_grad():
        found = sample(view.model, x, view.cond, grid=grid, form="exponential").x0
    expected = own_run(pipe, x, steps)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert grid.nodes(view.model.schedule)[-1] == (0.0 if spacing == "leading" else -1.0)


def test_euler_on_flow_is_the_pipelines_flow_match_euler() -> None:
    pipe = double(tiny_sd3())
    x = noise_for(pipe).double()
    view = as_denoiser(pipe, "a b", 5.0, negative_prompt="c")
    with torch.no_grad():
        found = sample(view.model, x, view.cond, grid=pipeline_grid(pipe, 5)).x0
    # The pipeline's scheduler holds its sigmas, and steps, in float32.
    torch.testing.assert_close(found, own_run(pipe, x, 5), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_given_embeddings_serve_a_batch_and_get_gradients(make: Any) -> None:
    pipe = make()
    embeds = {k: v.requires_grad_() for k, v in embeds_for(pipe).items()}
    x = torch.cat([noise_for(pipe), noise_for(pipe, seed=1)])

    def run(gradient: Any, batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        view = as_denoiser(pipe, **embeds)
        out = sample(view.model, batch, view.cond, grid=pipeline_grid(pipe, 3), gradient=gradient)
        return out.x0, torch.autograd.grad((out.x0**2).mean(), list(embeds.values()))

    (state, plain), (same, exact) = run(Plain(), x), run(Exact("min"), x)
    assert torch.equal(state, same)
    assert all(torch.equal(a, b) for a, b in zip(plain, exact, strict=True))
    assert all(float(g.abs().max()) > 0 for g in exact)
    alone, _ = run(Plain(), x[1:])
    torch.testing.assert_close(state[1:], alone, rtol=1e-4, atol=1e-4)
    unguided = as_denoiser(
        pipe, guidance_scale=1.0, **{k: v for k, v in embeds.items() if "negative" not in k}
    )
    assert sample(unguided.model, x, unguided.cond, grid=pipeline_grid(pipe, 3)).nfe == 3


def test_weights_get_gradients_only_where_asked_and_flags_stay() -> None:
    pipe = tiny_sd()
    x = noise_for(pipe).requires_grad_()
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    for train, pattern in ((None, ""), ("unet.conv_in*", "conv_in")):
        view = as_denoiser(pipe, "a", train=train)
        sample(view.model, x, view.cond, grid=pipeline_grid(pipe, 2)).x0.sum().backward()
        trained = {name for name, p in pipe.unet.named_parameters() if p.grad is not None}
        assert trained == ({"conv_in.weight", "conv_in.bias"} if pattern else set())
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags


def test_other_schedulers_give_schedule_and_times() -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe = double(tiny_sd())
    config = pipe.scheduler.config
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing="linspace", final_sigmas_type="sigma_min", lower_order_final=False
    )
    view = as_denoiser(pipe, "a b", 5.0, negative_prompt="c")
    x = noise_for(pipe).double()
    times = pipeline_grid(pipe, 6).nodes(view.model.schedule)
    assert times[0] == 999.0
    assert times[-1] == 0.0
    with torch.no_grad():
        found = sample(view.model, x, view.cond, solver=DPMSolverPP(), grid=times).x0
    # The stock scheduler keeps its sigmas in float32.
    torch.testing.assert_close(found, own_run(pipe, x, 6), rtol=1e-4, atol=1e-4)


def test_what_the_view_does_not_know_is_refused() -> None:
    from diffusers import HeunDiscreteScheduler

    with pytest.raises(InputError, match=r"without its text encoders .* prompt_embeds"):
        as_denoiser(tiny_flux())
    pipe = tiny_sd()
    with pytest.raises(InputError, match="not both"):
        as_denoiser(pipe, "a", **embeds_for(pipe))
    with pytest.raises(InputError, match="Stable Diffusion 3"):
        as_denoiser(pipe, pooled_prompt_embeds=torch.zeros(1, 4))
    with pytest.raises(InputError, match="together"):
        as_denoiser(tiny_sd3(), prompt_embeds=torch.zeros(1, 4, 4))
    with pytest.raises(InputError, match="whole number"):
        pipeline_grid(pipe, 0)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedError, match="more than once"):
        pipeline_grid(pipe, 3)
