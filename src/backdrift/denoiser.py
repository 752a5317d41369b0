"""A network together with what is needed to read it: schedule, prediction, guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .conditioning import Branch, Conditions, PerStep, alone, together
from .errors import InputError
from .predictions import check_prediction, conversion
from .scalars import Scalar, plain
from .schedules import Schedule
from .versions import version_of

Network = Callable[[Tensor, Tensor, Any], Any]


class Denoiser:
    """A network read as eps(x, t, cond), x0(x, t, cond), or whatever a form of the ODE asks for.

    Classifier-free guidance (Ho & Salimans 2022) is ``uncond + guidance_scale * (cond - uncond)``; it is the
    same in eps, x0, v and u, so it is applied to the network's own output. Both halves go through the
    network in one call where their conditioning can share a batch (same nest, same shapes but for the first
    dimension), in two calls otherwise.

    Args:
        network: ``network(x, t, cond)`` -> tensor of x's shape (or an object with it as ``.sample``, or a tuple
            with it first). x (B, …); t (B,), float64 beside a float64 state and float32 otherwise, unrounded
            unless ``round_timesteps``; cond as given.
        schedule: the forward process.
        prediction: what the network returns: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or
            ``"flow_prediction"``.
        guidance_scale: 1 (no guidance) or any finite number; needs ``uncond`` unless 1.
        uncond: the conditioning without a prompt, a nest like ``cond`` (None is a value like any other
            where ``cond`` is given); it, too, may be given per step or as a function of time (see
            :mod:`backdrift.conditioning`).
        guidance_rescale: phi of Lin et al. 2023 (section 3.4): the guided output g becomes
            ``phi g std(cond)/std(g) + (1 - phi) g``, std over each sample; in [0, 1], 0 for none.
        time_scale: the network is given ``time_scale * t`` (1000 for Stable Diffusion 3's flow times).
        round_timesteps: give the network the nearest whole number (the even one of two), still as a floating tensor:
            for one that was trained on whole timesteps and takes no others. alpha, sigma and the steps stay exact, so a
            solver's order above 1 is lost where a step is not long beside the rounding.
        dtype: the network's arithmetic; its first floating parameter's if None. A state of more precision is
            cast on entry and the output cast back, so the state never loses digits to the network's dtype.

    Attributes:
        nfe: network calls made so far through this object (redone calls of a backward pass not counted).

    Raises:
        InputError: an argument has an impossible value.
    """

    def __init__(
        self,
        network: Network | nn.Module,
        schedule: Schedule,
        prediction: str = "epsilon",
        *,
        guidance_scale: float = 1.0,
        uncond: Any = None,
        guidance_rescale: float = 0.0,
        time_scale: float = 1.0,
        round_timesteps: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not callable(network):
            raise InputError(f"network must be callable as network(x, t, cond); got {type(network).__name__}")
        if not isinstance(schedule, Schedule):
            raise InputError(f"schedule must be a Schedule such as VP.linear(); got {schedule!r}")
        for name, value in (("guidance_scale", guidance_scale), ("time_scale", time_scale)):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number; got {value!r}")
        if not isinstance(guidance_rescale, int | float) or not 0 <= guidance_rescale <= 1:
            raise InputError(f"guidance_rescale must be a number in [0, 1]; got {guidance_rescale!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating dtype; got {dtype}")
        if round_timesteps and abs(time_scale) * schedule.t_max < 2:
            raise InputError(
                f"round_timesteps is for networks that count whole timesteps; this one is given times up to "
                f"{time_scale * schedule.t_max:g} on {schedule!r}: set time_scale (1000, say), or leave it out"
            )
        self.network = network
        self.schedule = schedule
        self.prediction = check_prediction(prediction)
        self.guidance_scale = float(guidance_scale)
        self.uncond = uncond
        self.guidance_rescale = float(guidance_rescale)
        self.time_scale = float(time_scale)
        self.round_timesteps = bool(round_timesteps)
        self.dtype = dtype
        self.nfe = 0

    def __repr__(self) -> str:
        name = getattr(self.network, "__name__", type(self.network).__name__)
        return f"Denoiser({name}, {self.schedule!r}, {self.prediction!r}, guidance_scale={self.guidance_scale:g})"

    def conditions(self, cond: Any, batch: int) -> Conditions:
        """The network calls of the evaluations of a run, interval by interval.

        Args:
            cond: a nest, a :class:`~backdrift.conditioning.PerStep`, or a function of time.
            batch: rows of the state.
        """
        return Conditions(lambda u, c: self._branches(u, c, batch), self.uncond, cond)

    def _branches(self, uncond: Any, cond: Any, batch: int) -> tuple[Branch, ...]:
        """One call, or two where guidance cannot be batched (uncond first)."""
        if self.guidance_scale == 1:
            return (alone(cond),)
        if cond is None and uncond is None:
            raise InputError(
                f"guidance_scale = {self.guidance_scale:g} needs two conditionings to tell apart, but cond and "
                "uncond are both None: pass uncond= to Denoiser and cond= here, or set guidance_scale=1"
            )
        both = together(uncond, cond, batch, self.schedule.start)
        return (both,) if both is not None else (alone(uncond), alone(cond))

    def run(self, x: Tensor, t: Scalar, branch: Branch) -> Tensor:
        """One network call, with guidance inside where the branch is paired; a pure function of its tensors.

        Args:
            x: state (B, …).
            t: the schedule's time, a Python float; a tensor () where a gradient by it is wanted.
            branch: the call's conditioning, and whether it holds (uncond, cond) as one batch of 2B.

        Returns:
            The network's output in its own prediction, of x's shape and dtype.

        Raises:
            InputError: the output has another shape, or the network has edited ``x``.
        """
        times_dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        paired, rows = branch.paired, len(x) * (2 if branch.paired else 1)
        if isinstance(t, Tensor):
            t = plain(t)
            times = (t * self.time_scale).to(x.device, times_dtype).repeat(rows)
        else:
            times = torch.full((rows,), t * self.time_scale, dtype=times_dtype, device=x.device)
        if self.round_timesteps:
            times = times.round()
        inputs = x.to(self._network_dtype(x))
        kind, version = x.device.type, version_of(x)
        # Autocast's cache of cast weights outlives a call: one made without grad would be found by a redone
        # call and cut its weights off. Within a call nothing is lost by not caching.
        with torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        ):
            rows_in = torch.cat([inputs, inputs]) if paired else inputs
            out = self._tensor(self.network(rows_in, times, branch.at(t, len(x))))
        if branch.witness is not None:
            branch.witness(out)
        if version != version_of(x):
            raise InputError(
                "the network edits its input in place, which is the run's own state: let it begin with x = x.clone(), "
                "or compute out of place (x = x * 2 for x *= 2)"
            )
        out = out.to(x.dtype)
        if out.shape != (rows, *x.shape[1:]):
            raise InputError(
                f"the network returned shape {tuple(out.shape)} for an input of shape {(rows, *x.shape[1:])}; a "
                "prediction has the input's shape (split off a learned variance in a wrapper)"
            )
        return self._guide(*out.chunk(2)) if paired else out

    def combine(self, outputs: list[Tensor]) -> Tensor:
        """The guided output of the branches' outputs."""
        return outputs[0] if len(outputs) == 1 else self._guide(*outputs)

    def output(self, x: Tensor, t: float, cond: Any = None) -> Tensor:
        """The network's guided output in its own prediction, at the schedule's time ``t``."""
        t = self.check_time(t)
        if isinstance(cond, PerStep) or isinstance(self.uncond, PerStep):
            raise InputError(
                "this conditioning is given per step, and a single evaluation belongs to none (nor do the evaluations "
                "by which an adaptive solver looks for its steps): give a nest of tensors or a function of time"
            )
        outputs = []
        for branch in self.conditions(cond, len(x)).at(0):
            self.nfe += 1
            outputs.append(self.run(x, t, branch))
        return self.combine(outputs)

    def __call__(self, x: Tensor, t: float, cond: Any = None) -> Tensor:
        """eps(x, t, cond): the guided noise prediction, of x's shape."""
        return self._read("epsilon", x, t, cond)

    def denoised(self, x: Tensor, t: float, cond: Any = None) -> Tensor:
        """x0(x, t, cond): the guided prediction of the clean sample, of x's shape."""
        return self._read("sample", x, t, cond)

    def check_time(self, t: float) -> float:
        """``t``, if the network may be asked there.

        Raises:
            InputError: outside the schedule's range, or at a clean end beyond the trained times.
        """
        self.schedule.times(t)
        if t == self.schedule.t_clean and t < self.schedule.t_min:
            raise InputError(
                f"a solver asked the network at t = {t:g}, the clean end, where {self.schedule!r} has no trained "
                "time: end the grid at t = 0, or use a solver that does not evaluate the last node"
            )
        return t if isinstance(t, Tensor) else float(t)

    def _read(self, target: str, x: Tensor, t: float, cond: Any) -> Tensor:
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        on_x, on_output = conversion(self.prediction, target, alpha, sigma, t)
        out = self.output(x, t, cond)
        return out if on_x == 0 and on_output == 1 else on_x * x + on_output * out

    def _guide(self, uncond: Tensor, cond: Tensor) -> Tensor:
        guided = uncond + self.guidance_scale * (cond - uncond)
        if self.guidance_rescale == 0:
            return guided
        dims = list(range(1, cond.ndim))
        ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return self.guidance_rescale * (guided * ratio) + (1 - self.guidance_rescale) * guided

    def _network_dtype(self, x: Tensor) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if isinstance(self.network, nn.Module):
            for parameter in self.network.parameters():
                if parameter.is_floating_point() and parameter.itemsize >= 2:
                    return parameter.dtype
        return x.dtype

    @staticmethod
    def _tensor(out: Any) -> Tensor:
        if isinstance(out, Tensor):
            return out
        found = getattr(out, "sample", None)
        if found is None and isinstance(out, tuple | list) and out:
            found = out[0]
        if not isinstance(found, Tensor):
            raise InputError(
                f"the network must return a tensor (or .sample, or a tuple); got {type(out).__name__}"
            )
        return found
