"""A pipeline's own call, listened to: what its first step is made of, and that the others are like it.

The call is made on a copy of the pipeline. In its first step the networks are really called; in the others they give
back what they gave in the first: so the rest of the loop costs no network call, and what it does differently shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ..calls import PipelineCall
from ..clone import clone_of
from ..forwards import check_networks
from ..offloaded import Offloading
from ..recorded import Recorded
from ..refusals import check_components
from ..shadow import networks
from ..states import caches_of, check_states
from ..stepping import _is_denoiser, listened
from .listener import KEY, Listener, Over
from .process import Interpolation, Process, process_of, times_of

__all__ = ["Observed", "check_view", "observed"]


@dataclass(frozen=True)
class Observed:
    """A pipeline's call, as its first step shows it.

    Attributes:
        clone: the pipeline that was called: the user's on shadow networks.
        process: of its scheduler.
        calls: the first step's network calls; their arguments have a graph where the user's have.
        state: the view's state at the beginning, (B, …), with its graph.
        z: the networks' input there, without.
        output: what the scheduler was given as the network's output, (B, …).
        scale: what the schedule's time is multiplied with for the network.
        times: of the starts of the call's steps, and of the last one's end; they may repeat some.
    """

    clone: Any
    process: Process
    calls: Sequence[Recorded]
    state: Tensor
    z: Tensor
    output: Tensor
    scale: float
    times: tuple[float, ...]


def observed(
    pipe: Any,
    call: Mapping[str, Any],
    trained: set[int],
    interpolation: Interpolation = "linear",
    outputs: Sequence[Any] | None = None,
    offloading: Offloading | None = None,
) -> Observed:
    """Make a pipeline's call and listen.

    Args:
        pipe: a diffusers pipeline; it is not changed, nor are generators.
        call: the call's keyword arguments.
        trained: ``id`` of the weights that get gradients.
        interpolation: of a trained table.
        outputs: of the first step's network calls, known from before: none is made then.
        offloading: by which an offloaded pipeline's weights come and go; its own if None.

    Raises:
        InputError: an argument that the call does not take.
        UnsupportedError: the pipeline has no scheduler or networks of diffusers' kind, what it is set up with cannot be
            taken over, or its steps are not alike.
    """
    check_view(pipe)
    listener, away = Listener(type(pipe).__name__, outputs), offloading or Offloading(pipe)
    clone = clone_of(pipe, trained, lambda name, ours: listener.dressed(name, away.dressed(name, ours)))
    away.place(clone)
    own = clone.__dict__
    own["_progress_bar_config"] = {"disable": True}
    scheduler: Any = own["scheduler"]
    scheduler.__dict__[KEY] = listener
    scheduler.__class__ = listened(type(scheduler), KEY)  # type: ignore[arg-type]  # a class is hashable
    listener.scheduler = scheduler
    try:
        bound = PipelineCall.of(clone, (), dict(call), "latent")
    except TypeError as problem:
        raise InputError(f"{type(pipe).__name__}'s call: {problem}") from problem
    try:
        with torch.random.fork_rng(_accelerators(pipe)), suppress(Over):
            bound.run(clone)
    finally:
        listener.undress()
        if away.turns is not None:
            away.turns.leave()
    return _heard(listener, clone, interpolation)


def _heard(listener: Listener, clone: Any, interpolation: Interpolation) -> Observed:
    first, scheduler = listener.first, listener.scheduler
    if first is None:
        raise UnsupportedError(f"{listener.name} made its pictures without stepping, so it has no view")
    process = process_of(scheduler, interpolation)
    place = _place(scheduler, listener.times[0])
    times = times_of(scheduler, process)[place : place + len(listener.times) + 1]
    scale = _scale(listener, process, times)
    return Observed(clone, process, first.calls, first.state, first.z, first.output, scale, tuple(times))


def _place(scheduler: Any, timestep: Any) -> int:
    """The place of the call's first step among the scheduler's times."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    found = (scheduler.timesteps == timestep).nonzero()
    return int(found[0]) if len(found) else 0


def _scale(listener: Listener, process: Process, times: Sequence[float]) -> float:
    """What the schedule's times are multiplied with for the network.

    Raises:
        UnsupportedError: what the network was told is no multiple of them (but for rounding).
    """
    trained = float(listener.scheduler.config.get("num_train_timesteps", 1000))
    for scale in (1.0, trained, 1000.0):
        wanted = [scale * process.told(t) for t in times[: len(listener.told)]]
        # Whole timesteps are rounded, and half precision has 3 digits.
        whole = process.preconditioning is None and scale * process.schedule.t_max > 2
        pairs = zip(listener.told, wanted, strict=False)
        if all(abs(a - b) <= (1.0 if whole else 0.0) + 4e-3 * abs(b) + 1e-6 for a, b in pairs):
            return scale
    raise UnsupportedError(
        f"{listener.name} tells its network the time {listener.told[0]:g} where the schedule's is {times[0]:g}, which "
        f"is neither that nor {trained:g} times it, so it has no view: use bd.differentiable"
    )


def check_view(pipe: Any) -> None:
    """Refuse a pipeline that has no view whatever its call is.

    Raises:
        UnsupportedError: says why and what to do.
    """
    check_components(pipe)
    check_networks(pipe)
    check_states(pipe)
    name, scheduler = type(pipe).__name__, vars(pipe).get("scheduler")
    found = {key: module for key, module in networks(pipe).items() if _is_denoiser(module)}
    if not hasattr(scheduler, "step") or not found:
        what = "no network that takes a timestep" if not found else "no scheduler of diffusers' kind"
        raise UnsupportedError(
            f"{name} has {what}, so it has no view: build a Denoiser around your network by hand"
        )
    others = [key for key in ("transformer_2", "unet_2") if getattr(pipe, key, None) is not None]
    if others:
        raise UnsupportedError(
            f"{name} has another network ({others[0]}) for other noise levels, and a Denoiser has one: use "
            "bd.differentiable, or a view of a pipeline without it"
        )
    for key, module in found.items():
        hook = next(caches_of(module), None)
        if hook is not None:
            raise UnsupportedError(
                f"{key} has the hook {hook}: a cache keeps one call's results for the next, and a solver's calls are "
                f"others. Take it off: pipe.{key}.disable_cache()"
            )


def _accelerators(pipe: Any) -> list[Any]:
    device = torch.device(getattr(pipe, "_execution_device", "cpu"))
    return [device] if device.type == "cuda" else []
