"""The view of a pipeline's call: family by family the pipeline's own run, its gradients, and its batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError
from tiny_conditioned import normal, text
from tiny_pipelines import noise_for, tiny_sdxl
from viewed_calls import VIEWS, apart, built, ddim, gradients, leaves_of, own_run, view_of


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
    "wan, flow", "animatediff", "cogvideox", "stable audio", "controlnet", "t2i adapter",
    "inpainting, 9 channels", "img2img",
]  # fmt: skip


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
        "cogvideox",
        "stable audio",
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
