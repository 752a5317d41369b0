"""The noise levels of a diffusers scheduler's run, as its own arithmetic uses them, and their times in a Schedule.

Three kinds of schedulers are known, by what their state is:

* variance preserving, ``x = alpha x0 + sigma eps``: DDIM and DDPM (levels from the trained table), DPM-Solver, DEIS and
  UniPC without its corrector (levels from ``scheduler.sigmas``, which are sigma/alpha);
* Euler's, ``x = x0 + sigma eps``: the network sees ``z = x / sqrt(sigma^2 + 1)``, which is variance preserving;
* flows, ``x = (1 - sigma) x0 + sigma eps``: FlowMatchEuler, and the second group with ``use_flow_sigmas``.

Schedulers that step back to an older state are refused: they would take back what guidance did to the newer one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UnsupportedError
from ..host import Level
from ..predictions import PREDICTIONS
from ..schedules import VP, Flow, Schedule

__all__ = ["Levels", "levels_of", "position_of"]

_TABLE = ("DDIMScheduler", "DDPMScheduler")
_MULTISTEP = ("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler")
_SINGLESTEP = "DPMSolverSinglestepScheduler"
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
_FLOW = "FlowMatchEulerDiscreteScheduler"
_ADVICE = (
    "use DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler, EulerDiscreteScheduler, "
    "EulerAncestralDiscreteScheduler, or FlowMatchEulerDiscreteScheduler for a flow (each has "
    "from_config(pipe.scheduler.config))"
)
_ROUNDING = 1e-6  # relative; sigmas and tables are float32


@dataclass(frozen=True)
class Levels:
    """The levels of the N steps of a scheduler after ``set_timesteps``.

    Attributes:
        schedule: the coordinates of the network's input ``z``.
        prediction: what the network returns (:mod:`backdrift.predictions`).
        starts: of each step, the level that it steps from, in x's own coordinates.
        ends: of each step, the level that it leads to; DDIM's own rule for it is not always the next one's start.
        scales: of each start, the number in ``z = scale * x``.
        times: the schedule's times of the N starts and of the last end.
    """

    schedule: Schedule
    prediction: str
    starts: tuple[Level, ...]
    ends: tuple[Level, ...]
    scales: tuple[float, ...]
    times: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def seen(self, index: int) -> Level:
        """The level of step ``index``'s start in z's coordinates."""
        alpha, sigma = self.starts[index]
        return Level(self.scales[index] * alpha, self.scales[index] * sigma)

    def times_from(self, index: int) -> tuple[float, ...]:
        """The times from step ``index`` on, strictly falling: a step that leads nowhere is left out."""
        found = [self.times[index]]
        for t in self.times[index + 1 :]:
            if t < found[-1]:
                found.append(t)
        return tuple(found)


def levels_of(scheduler: Any) -> Levels:
    """The levels of a scheduler's run.

    Args:
        scheduler: of diffusers, after ``set_timesteps``.

    Raises:
        UnsupportedError: another scheduler, or settings of it, whose steps cannot be guided; says which to use.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name in _TABLE:
        return _from_table(scheduler, name)
    if name in _EULER:
        if config.get("timestep_type", "discrete") != "discrete":
            raise UnsupportedError(
                f"{name} with timestep_type={config.timestep_type!r} is not known: {_ADVICE}"
            )
        return _preserving(scheduler, name, divided=True)
    if name == _FLOW:
        if config.get("invert_sigmas"):
            raise UnsupportedError(f"{name} with invert_sigmas counts its noise backwards: {_ADVICE}")
        return _flowing(scheduler, "flow_prediction")
    if name in _MULTISTEP or name == _SINGLESTEP:
        _check_forward_only(scheduler, name)
        if config.get("use_flow_sigmas"):
            return _flowing(scheduler, _prediction(scheduler, name, ("epsilon", "sample", "flow_prediction")))
        return _preserving(scheduler, name, divided=False)
    raise UnsupportedError(f"steps of {name} cannot be guided: {_ADVICE}")


def position_of(scheduler: Any, timestep: Any) -> int:
    """The place in ``scheduler.timesteps`` of the step that begins at ``timestep``.

    Raises:
        UnsupportedError: the scheduler does not have that time.
    """
    for name in ("step_index", "begin_index"):
        found = getattr(scheduler, name, None)
        if found is not None:
            return int(found)
    if hasattr(scheduler, "index_for_timestep"):
        return int(scheduler.index_for_timestep(timestep))
    places = (scheduler.timesteps == timestep).nonzero()
    if len(places) == 0:
        raise UnsupportedError(
            f"{type(scheduler).__name__} steps at {timestep}, which is none of its timesteps"
        )
    return int(places[0])


def _check_forward_only(scheduler: Any, name: str) -> None:
    config = scheduler.config
    if name == _SINGLESTEP and config.solver_order > 1:
        raise UnsupportedError(
            f"{name} of order {config.solver_order} begins its later stages at the state from before the first one, "
            "which takes guidance back: use DPMSolverMultistepScheduler.from_config(pipe.scheduler.config), or "
            "solver_order=1"
        )
    if name == "UniPCMultistepScheduler":
        last = len(scheduler.timesteps) - 1
        if not set(range(last)) <= set(scheduler.disable_corrector) or scheduler.solver_p is not None:
            raise UnsupportedError(
                f"{name} corrects each state from older outputs, which takes guidance back: give it "
                f"disable_corrector=list(range({last})), or {_ADVICE}"
            )


def _prediction(scheduler: Any, name: str, allowed: tuple[str, ...] = PREDICTIONS[:3]) -> str:
    prediction = scheduler.config.prediction_type
    prediction = "sample" if prediction == "original_sample" else prediction
    if prediction not in allowed:
        raise UnsupportedError(
            f"{name} with prediction_type={prediction!r} is not known here; allowed: {', '.join(allowed)}"
        )
    return prediction


def _from_table(scheduler: Any, name: str) -> Levels:
    """DDIM and DDPM: the levels are those of whole trained steps."""
    table = scheduler.alphas_cumprod.cpu().double()
    steps = [int(t) for t in scheduler.timesteps]
    if name == "DDIMScheduler":
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        after, final = [t - stride for t in steps], float(scheduler.final_alpha_cumprod)
    else:
        after, final = [*steps[1:], -1], 1.0
    starts = tuple(_level(float(table[t])) for t in steps)
    ends = tuple(_level(float(table[t]) if t >= 0 else final) for t in after)
    last = float(after[-1]) if after[-1] >= 0 else -1.0 if final == 1.0 else 0.0
    times = (*map(float, steps), last)
    return Levels(VP.discrete(table), _prediction(scheduler, name), starts, ends, (1.0,) * len(steps), times)


def _level(alpha_squared: float) -> Level:
    return Level(math.sqrt(alpha_squared), math.sqrt(1 - alpha_squared))


def _preserving(scheduler: Any, name: str, *, divided: bool) -> Levels:
    """Levels from ``scheduler.sigmas`` = sigma/alpha; ``divided``: the state is x/alpha."""
    prediction = _prediction(scheduler, name)
    schedule = VP.discrete(scheduler.alphas_cumprod)
    ratios = [float(s) for s in scheduler.sigmas.cpu().double()]
    alphas = [1 / math.hypot(1, ratio) for ratio in ratios]
    noises = [1.0 if math.isinf(ratio) else a * ratio for a, ratio in zip(alphas, ratios, strict=True)]
    levels = [
        Level(1.0, r) if divided else Level(a, s) for a, s, r in zip(alphas, noises, ratios, strict=True)
    ]
    scales = tuple(alphas[:-1]) if divided else (1.0,) * (len(ratios) - 1)
    times = tuple(_time(schedule, ratio) for ratio in ratios)
    return Levels(schedule, prediction, tuple(levels[:-1]), tuple(levels[1:]), scales, times)


def _flowing(scheduler: Any, prediction: str) -> Levels:
    times = tuple(float(s) for s in scheduler.sigmas.cpu().double())
    levels = [Level(1 - s, s) for s in times]
    return Levels(Flow(), prediction, tuple(levels[:-1]), tuple(levels[1:]), (1.0,) * (len(times) - 1), times)


def _time(schedule: Schedule, ratio: float) -> float:
    """The time at which sigma/alpha is ``ratio``: a trained step's own where float32 knows no difference."""
    if ratio == 0:
        return schedule.t_clean
    if math.isinf(ratio):
        return schedule.t_max
    if not schedule.zero_terminal:  # type: ignore[attr-defined]
        low, high = (float(schedule.rho(t)) for t in (0.0, schedule.t_max))
        if abs(ratio - high) <= _ROUNDING * high:
            return schedule.t_max
        if abs(ratio - low) <= _ROUNDING * low:
            return 0.0
    t = float(schedule.t_from_rho(ratio))
    nearest = float(round(t))
    near: Tensor = schedule.rho(nearest)
    return nearest if abs(float(near) - ratio) <= _ROUNDING * ratio else t
