"""Every gradient method on pipelines, through their ``Denoiser`` view: noise, embeddings and LoRA weights.

UNet with noise prediction (Stable Diffusion) and transformer with flow matching (Stable Diffusion 3), in float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.gradients import (
    AdjointDEIS,
    ContinuousAdjoint,
    Exact,
    GradientMethod,
    Plain,
    Reversible,
    SymplecticAdjoint,
)
from backdrift.grids import TimeGrid
from backdrift.pipelines.view import as_denoiser
from backdrift.sampling import sample
from backdrift.solvers import RK4, Euler, Heun, McCallumFoster, ReversibleHeun, Solver
from tiny_pipelines import embeds_for, noise_for, tiny_sd, tiny_sd3

FAMILIES = {"sd": tiny_sd, "sd3": tiny_sd3}
# A dozen of the thousand times: random networks swing with the time embedding's fast waves, of period 2 pi.
ENDS = {"sd": (500.0, 488.0), "sd3": (0.5, 0.488)}
EXACT: dict[str, tuple[Solver, GradientMethod]] = {
    "exact": (Heun(), Exact("min")),
    "symplectic Euler": (Euler(), SymplecticAdjoint()),
    "symplectic Heun": (Heun(), SymplecticAdjoint()),
    "symplectic RK4, stored": (RK4(), SymplecticAdjoint("stored")),
    "reversible Heun": (ReversibleHeun(), Reversible()),
    "reversible Euler": (McCallumFoster(Euler()), Reversible()),
}
CONTINUOUS: dict[str, tuple[Solver, GradientMethod, int]] = {
    "AdjointDPM": (Heun(), ContinuousAdjoint(Heun()), 2),
    "AdjointDPM, recomputed": (Heun(), ContinuousAdjoint(Heun(), trajectory="recompute"), 2),
    "vanilla": (Heun(), ContinuousAdjoint(Heun(), form="original"), 2),
    "AdjointDEIS-1": (Heun(), AdjointDEIS(1), 1),
    "AdjointDEIS-2M": (Heun(), AdjointDEIS(2), 2),
    "AdjointDEIS-2S": (Heun(), AdjointDEIS(2, "S"), 2),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def with_lora(family: str) -> Any:
    from peft import LoraConfig

    pipe = FAMILIES[family]()
    network = pipe.unet if family == "sd" else pipe.transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    network.double()
    return pipe


def gradients(family: str, steps: int, solver: Solver, method: GradientMethod) -> list[Tensor]:
    """Of a loss on the end state, by the noise, the embeddings and the LoRA weights."""
    pipe = with_lora(family)
    x = noise_for(pipe).double().requires_grad_()
    embeds = {k: v.double().requires_grad_() for k, v in embeds_for(pipe).items()}
    view = as_denoiser(pipe, guidance_scale=3.0, train="lora", interpolation="spline", **embeds)
    network = pipe.unet if family == "sd" else pipe.transformer
    weights = [p for name, p in network.named_parameters() if "lora" in name]
    start, end = ENDS[family]
    grid = TimeGrid("logsnr", steps=steps, start=start, end=end)
    solution = sample(view.model, x, view.cond, solver=solver, grid=grid, form="exponential", gradient=method)
    slope = torch.linspace(-1, 1, solution.x0.numel(), dtype=torch.float64).view_as(solution.x0)
    found = torch.autograd.grad((solution.x0 * slope).sum(), [x, *embeds.values(), *weights])
    groups = (found[:1], found[1 : 1 + len(embeds)], found[1 + len(embeds) :])
    return [torch.cat([g.flatten() for g in group]) for group in groups]


def error(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@cache
def true_flow(family: str) -> list[Tensor]:
    return gradients(family, 40, RK4(), Plain())


@each_family
@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_equal_plain_autograd(name: str, family: str) -> None:
    solver, method = EXACT[name]
    found, expected = gradients(family, 4, solver, method), gradients(family, 4, solver, Plain())
    assert max(error(found, expected)) < 1e-11
    assert all(float(g.norm()) > 1e-6 for g in expected)


@each_family
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_methods_approach_the_true_flows_gradient(name: str, family: str) -> None:
    solver, method, order = CONTINUOUS[name]
    coarse, fine = (error(gradients(family, n, solver, method), true_flow(family)) for n in (8, 16))
    for before, after in zip(coarse, fine, strict=True):
        assert after < 0.03
        assert before / after > 2 ** (order - 0.35)
