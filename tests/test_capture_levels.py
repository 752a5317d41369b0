"""The noise levels and times of a scheduler's steps, by its own arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.errors import UnsupportedError
from backdrift.pipelines.levels import levels_of
from captured_runs import STEPS, scheduler

DETERMINISTIC = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "set_alpha_to_one": False}),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}),  # leads elsewhere than the next step starts
    ("DDIMScheduler", {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("UniPCMultistepScheduler", {"disable_corrector": list(range(STEPS)), "final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"prediction_type": "sample", "timestep_spacing": "leading"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
]


@pytest.mark.parametrize(("name", "config"), DETERMINISTIC)
def test_levels_are_the_schedulers_own(name: str, config: dict[str, Any]) -> None:
    own = scheduler(name, **config)
    own.set_timesteps(STEPS)
    levels = levels_of(own)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = levels.starts[0].alpha * x0 + levels.starts[0].sigma * eps
    for i, t in enumerate(own.timesteps):
        start, end, seen = levels.starts[i], levels.ends[i], levels.seen(i)
        x = start.alpha * x0 + start.sigma * eps
        z = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
        torch.testing.assert_close(z, levels.scales[i] * x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(z, seen.alpha * x0 + seen.sigma * eps, rtol=1e-6, atol=1e-6)
        # The schedule, at the time of the start, has the level that the network sees.
        assert float(levels.schedule.alpha(levels.times[i])) == pytest.approx(seen.alpha, rel=1e-5)
        assert float(levels.schedule.sigma(levels.times[i])) == pytest.approx(seen.sigma, rel=1e-5)
        exact = {"epsilon": eps, "sample": x0, "flow_prediction": eps - x0}
        exact["v_prediction"] = seen.alpha * eps - seen.sigma * x0
        after = own.step(exact[levels.prediction], t, x).prev_sample
        torch.testing.assert_close(after.double(), end.alpha * x0 + end.sigma * eps, rtol=0, atol=3e-5)
    # Where the last step leads: the schedule's clean end exactly where sigma is 0.
    last = levels.ends[-1]
    assert float(levels.schedule.sigma(levels.times[-1])) == pytest.approx(last.sigma, abs=1e-5)
    assert all(a > b for a, b in pairwise(levels.times_from(0)))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    ],
)
def test_levels_of_steps_that_draw_noise(name: str, config: dict[str, Any]) -> None:
    """With exact outputs, what a step makes of (x0, eps) and its own noise has the next level's two scales."""
    own = scheduler(name, **config)
    own.set_timesteps(STEPS)
    levels = levels_of(own)
    shape = (1, 1, 8, 8)
    first, other = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    for i, t in enumerate(own.timesteps[:-1]):
        start, end = levels.starts[i], levels.ends[i]

        def step(x0: Tensor, eps: Tensor, t: Tensor = t, i: int = i, start: Any = start) -> Tensor:
            own._step_index, own._begin_index = None, i
            own.lower_order_nums = 0
            generator = torch.Generator().manual_seed(1)
            own.scale_model_input(x0, t)
            x = start.alpha * x0 + start.sigma * eps
            return own.step(eps, t, x, generator=generator).prev_sample.double()

        zero = torch.zeros(shape, dtype=torch.float64)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        drawn = step(zero, zero)
        if name.startswith("DPM"):  # draws in float32
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
        fresh = float((drawn * noise).sum() / (noise * noise).sum())
        torch.testing.assert_close(drawn, fresh * noise, rtol=0, atol=1e-5)
        torch.testing.assert_close(step(first, zero) - drawn, end.alpha * first, rtol=0, atol=1e-4)
        kept = float(((step(zero, other) - drawn) * other).sum() / (other * other).sum())
        assert math.hypot(fresh, kept) == pytest.approx(end.sigma, rel=1e-4)


def test_times_are_the_trained_steps_or_those_of_the_noise() -> None:
    own = scheduler("DPMSolverMultistepScheduler")
    own.set_timesteps(STEPS)
    assert levels_of(own).times == (*map(float, own.timesteps), -1.0)
    own = scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    own.set_timesteps(STEPS)
    levels = levels_of(own)
    for t, rounded, sigma in zip(levels.times, own.timesteps, own.sigmas, strict=False):
        assert float(levels.schedule.rho(t)) == pytest.approx(float(sigma), rel=1e-6)
        assert abs(t - float(rounded)) <= 0.51
    assert any(t != round(t) for t in levels.times)
    own = scheduler("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    own.set_timesteps(STEPS)
    assert levels_of(own).starts[0] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("DPMSolverSinglestepScheduler", {}),
        ("LCMScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
    ],
)
def test_other_schedulers_are_refused_by_name(name: str, config: dict[str, Any]) -> None:
    own = scheduler(name, **config)
    own.set_timesteps(STEPS)
    with pytest.raises(UnsupportedError, match=name):
        levels_of(own)
