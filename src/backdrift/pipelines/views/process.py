"""The noising process that a scheduler of diffusers' stands for, whatever its own rule for stepping.

| scheduler | state of the view | schedule | prediction |
|---|---|---|---|
| with a table ``alphas_cumprod`` | the network's input: x; Euler's x / sqrt(sigma² + 1) | VP, discrete | its own |
| of flows (FlowMatch…, or ``use_flow_sigmas``) | x | flow | its own |
| EDM… (Karras et al. 2022), CosineDPM…, Euler's in continuous time | x = x0 + sigma eps | EDM | x0, preconditioned |
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...grids import TimeGrid
from ...predictions import PREDICTIONS
from ...schedules import EDM, VP, Flow, Schedule

__all__ = ["Preconditioning", "Process", "grid_of", "is_flow", "process_of", "table_of", "times_of"]

Interpolation = Literal["linear", "spline"]
_WARPED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@dataclass(frozen=True)
class Preconditioning:
    """How a network F gives x0 at a state of noise level sigma (Karras et al. 2022, equation 7).

    x0 = c_skip x + c_out F(c_in x, c_noise), with d = sigma_data, r² = sigma² + d²: c_in = 1/r, c_skip = d²/r²,
    c_out = ± sigma d / r.

    Attributes:
        sigma_data: d.
        sign: of c_out; -1 for what diffusers calls ``"v_prediction"``.
        noise: what c_noise is: ``"log"``, log(sigma) / 4, or ``"angle"``, 2 arctan(sigma) / pi (Stable Audio's).
    """

    sigma_data: float
    sign: float
    noise: Literal["log", "angle"] = "log"

    def told(self, sigma: Tensor) -> Tensor:
        """c_noise, of the shape of ``sigma``."""
        return 0.25 * sigma.log() if self.noise == "log" else sigma.atan() / math.pi * 2


@dataclass(frozen=True)
class Process:
    """A noising process as a :class:`~backdrift.Denoiser` takes it.

    Attributes:
        schedule: alpha and sigma of the view's state.
        prediction: what the view's network returns.
        preconditioning: that the view's network does around the pipeline's own; None for none.
    """

    schedule: Schedule
    prediction: str
    preconditioning: Preconditioning | None = None

    def told(self, t: float) -> float:
        """What a network is told at the schedule's time ``t``, but for a factor."""
        if self.preconditioning is None:
            return t
        return float(self.preconditioning.told(torch.tensor(t, dtype=torch.float64)))

    def state(self, scheduler: Any, sample: Tensor, timestep: Any) -> tuple[Tensor, Tensor]:
        """The view's state and the network's input of a scheduler's state, with their graph."""
        z = sample
        if hasattr(scheduler, "scale_model_input"):
            z = copy.copy(scheduler).scale_model_input(sample, timestep)
        return (z if self.preconditioning is None else sample), z


def process_of(scheduler: Any, interpolation: Interpolation = "linear") -> Process:
    """The process of a scheduler.

    Args:
        scheduler: of diffusers.
        interpolation: of a trained table.

    Raises:
        UnsupportedError: none is known; says what to use.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith("EDM"):
        return _edm(scheduler, name, float(config.sigma_data))
    if name == "CosineDPMSolverMultistepScheduler":
        return _edm(scheduler, name, float(config.sigma_data), "angle")
    if config.get("timestep_type", "discrete") == "continuous":
        if config.prediction_type != "v_prediction":
            raise UnsupportedError(
                f"{name} with timestep_type='continuous' and prediction_type={config.prediction_type!r} tells its "
                "network no times in log(sigma): use timestep_type='discrete'"
            )
        return _edm(scheduler, name, 1.0)
    if is_flow(scheduler):
        if config.get("invert_sigmas"):
            raise UnsupportedError(
                f"{name} with invert_sigmas counts its noise backwards: use FlowMatchEulerDiscreteScheduler without it"
            )
        prediction = "flow_prediction" if name.startswith("FlowMatch") else config.prediction_type
        return Process(Flow(), _known(name, prediction))
    return Process(
        VP.discrete(table_of(scheduler), interpolation),
        _known(name, config.get("prediction_type", "epsilon")),
    )


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's states are (1 - sigma) x0 + sigma eps."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def table_of(scheduler: Any) -> Tensor:
    """The scheduler's trained table (n,).

    Raises:
        UnsupportedError: it has none.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UnsupportedError(
            f"{type(scheduler).__name__} has no alphas_cumprod to read the schedule from; give the pipeline a "
            "scheduler that has, such as DDIMScheduler"
        )
    return torch.as_tensor(table)


def times_of(scheduler: Any, process: Process) -> list[float]:
    """The times of all steps' starts and of the last end, after ``set_timesteps``; they may repeat some."""
    schedule, config = process.schedule, scheduler.config
    if not isinstance(schedule, VP):
        return [float(s) for s in scheduler.sigmas.cpu().double()]
    warped = any(config.get(key) for key in _WARPED)
    if warped and len(scheduler.sigmas) == len(scheduler.timesteps) + 1:
        return [_time(schedule, float(s)) for s in scheduler.sigmas.cpu().double()]
    times = [float(t) for t in scheduler.timesteps]
    return [*times, *_last(scheduler, times[-1])]


def grid_of(scheduler: Any, times: Sequence[float]) -> TimeGrid:
    """The grid of a scheduler's times.

    Raises:
        UnsupportedError: they repeat some (Heun, PNDM).
    """
    if any(a <= b for a, b in itertools.pairwise(times)):
        raise UnsupportedError(
            f"{type(scheduler).__name__} asks the network more than once at a time, so its times are no grid; use "
            "a TimeGrid of your own, or DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    return TimeGrid(times)


def _time(schedule: Any, ratio: float) -> float:
    """The time at which sigma/alpha is ``ratio``; a trained end's own where float32 knows no difference."""
    if ratio == 0:
        return float(schedule.t_clean)
    for end in (schedule.t_max, 0.0):
        if math.isclose(float(schedule.rho(end)), ratio, rel_tol=1e-6):
            return float(end)
    return float(schedule.t_from_rho(ratio))


def _last(scheduler: Any, t: float) -> list[float]:
    """Where the scheduler's last step leads: sigma = 0 (t = -1), or the cleanest trained time."""
    final = getattr(scheduler, "final_alpha_cumprod", None)
    if final is None:
        clean = scheduler.config.get("final_sigmas_type", "zero") == "zero"
    else:
        clean = float(final) == 1.0
    if clean:
        return [-1.0]
    return [0.0] if t > 0 else []


def _edm(scheduler: Any, name: str, sigma_data: float, noise: Literal["log", "angle"] = "log") -> Process:
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise UnsupportedError(
            f"{name} with prediction_type={prediction!r} is not known; allowed: epsilon, v_prediction"
        )
    sign = 1.0 if prediction == "epsilon" else -1.0
    return Process(EDM(), "sample", Preconditioning(sigma_data, sign, noise))


def _known(name: str, prediction: str) -> str:
    prediction = "sample" if prediction == "original_sample" else prediction
    if prediction not in PREDICTIONS:
        raise UnsupportedError(
            f"{name} with prediction_type={prediction!r} is not known; allowed: {', '.join(PREDICTIONS)}"
        )
    return prediction
