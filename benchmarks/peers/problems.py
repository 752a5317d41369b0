"""The problems: a Gaussian mixture (closed form), the pixel model of real digits, and a UNet of 20 M parameters."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import InputError

from ..problem import FULL, GUIDANCE, SMALL, Size
from ..reversible import Mixture
from .equation import Equation
from .work import QUANTITIES, Counted, Work

ROWS = 16  # of the mixture and of the digits
FLOAT64 = torch.float64


class Metric:
    """``Σ w x0 + 0.3 x0²`` over a state's numbers, divided by the rows: curved, and different in every direction."""

    def __init__(self, like: Tensor) -> None:
        generator = torch.Generator().manual_seed(2)
        self.weights = torch.randn(like.shape[1:], generator=generator, dtype=FLOAT64).to(like)

    def __call__(self, x0: Tensor) -> Tensor:
        return (self.weights * x0 + 0.3 * x0**2).sum() / len(x0)


def mixture(dtype: torch.dtype = FLOAT64, wants: tuple[str, ...] = QUANTITIES) -> Work:
    """Three Gaussians N(mean_k + cond, 0.4² I) in three dimensions, VP linear, t from 1 to 0.001 (rho
    from 152 to 0.011): from what is noise for all purposes to nearly clean data, strongly contracting on the way."""
    schedule = bd.VP.linear()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, generator=generator, dtype=FLOAT64).to(dtype)
    return Work(
        name="mixture",
        network=Counted(Mixture(schedule).to(dtype)),
        schedule=schedule,
        prediction="epsilon",
        x_T=x,
        cond=(0.1 * x.flip(0)).clone(),
        loss=Metric(x),
        start=1.0,
        end=1e-3,
        wants=wants,
    )


def digits(dtype: torch.dtype = torch.float32, wants: tuple[str, ...] = QUANTITIES) -> Work:
    """The shipped pixel model of 8×8 digits, 16 of them; the built-in pipeline's UNet where that asset is missing."""
    try:
        from backdrift.pipelines.assets import load_digits_denoiser

        model = load_digits_denoiser()
    except (ImportError, InputError, FileNotFoundError):
        return _built_in(dtype, wants)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 1, 8, 8, generator=generator, dtype=FLOAT64).to(dtype)
    network: Any = copy.deepcopy(model.network)
    return Work(
        name="digits",
        network=Counted(network.to(dtype)),
        schedule=model.schedule,
        prediction=model.prediction,
        x_T=x,
        cond=torch.eye(10, dtype=dtype).repeat(2, 1)[:ROWS].clone(),
        loss=Metric(x),
        start=1.0,
        end=1e-3,
        wants=wants,
    )


class _Conditioned(nn.Module):
    """A UNet2DConditionModel as ``network(x, t, cond)``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.unet(x, t, encoder_hidden_states=cond).sample


def _built_in(dtype: torch.dtype, wants: tuple[str, ...]) -> Work:
    pipe = bd.load()
    view = bd.as_denoiser(pipe, "a red seven", 3.0)
    (cond,), (uncond,) = (tuple(c.values()) for c in (view.cond, view.model.uncond))
    x = bd.noise(pipe, seed=0).to(dtype)
    schedule = view.model.schedule
    return Work(
        name="built-in",
        network=Counted(_Conditioned(copy.deepcopy(pipe.unet)).to(dtype)),
        schedule=schedule,
        prediction=view.model.prediction,
        x_T=x.clone(),
        cond=cond.detach().to(dtype).clone(),
        loss=Metric(x),
        start=schedule.start,
        end=schedule.end,
        uncond=uncond.detach().to(dtype),
        guidance_scale=3.0,
        wants=wants,
    )


def unet(
    dtype: torch.dtype = torch.float32,
    wants: tuple[str, ...] = QUANTITIES,
    *,
    size: Size = FULL,
    device: torch.device | str = "cpu",
) -> Work:
    """The benchmark's own UNet with random weights, guided, on the schedule of Stable Diffusion."""
    torch.manual_seed(0)
    network = Counted(_Conditioned(size.unet())).to(device, dtype)
    x = torch.randn(1, 4, size.side, size.side).to(device, dtype)
    cond, uncond = (torch.randn(1, size.tokens, size.width).to(device, dtype) for _ in range(2))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=FLOAT64) ** 2
    schedule = bd.VP.discrete(torch.cumprod(1 - betas, 0))
    return Work(
        name="unet",
        network=network,
        schedule=schedule,
        prediction="epsilon",
        x_T=x,
        cond=cond,
        loss=Metric(x),
        start=schedule.start,
        end=schedule.end,
        uncond=uncond,
        guidance_scale=GUIDANCE,
        wants=wants,
    )


def small_unet(dtype: torch.dtype = torch.float32, wants: tuple[str, ...] = QUANTITIES) -> Work:
    """The same, tiny: only to see that everything runs."""
    return unet(dtype, wants, size=SMALL)


PROBLEMS = {"mixture": mixture, "digits": digits, "unet": unet, "small": small_unet}


def true_gradients(make: Any, steps: int) -> dict[str, Tensor]:
    """The gradients of the flow itself, float64: plain autograd through the classical fourth-order method in
    log(alpha/sigma), with so many equal steps, written out here.

    Args:
        make: makes the work, ``make(dtype=...)``.
        steps: of the fourth-order method; its error falls by 16 where they are doubled.
    """
    work: Work = make(dtype=FLOAT64)
    nodes = work.nodes(steps)
    equation = Equation(work, "lam", nodes)
    s, y = equation.nodes, equation.begin()
    work.clear()
    for a, b in itertools.pairwise(s):
        h = b - a
        k1 = equation(a, y)
        k2 = equation(a + h / 2, y + h / 2 * k1)
        k3 = equation(a + h / 2, y + h / 2 * k2)
        k4 = equation(b, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    work.loss(equation.finish(y)).backward()
    return work.gradients()


def relative_errors(found: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:
    """Distance over size in the 2-norm, of each quantity."""
    return {k: float((found[k].double() - v.double()).norm() / v.double().norm()) for k, v in known.items()}
