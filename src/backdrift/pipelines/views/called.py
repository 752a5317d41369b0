"""The view of a pipeline's call: model, conditioning and where it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import nests
from ...denoiser import Denoiser
from ...errors import MissingGradientError, UnsupportedError
from ..combination import learned
from ..recorded import is_control, outputs_of
from .kept import kept
from .listener import NO_VIEW
from .network import PROGRAM, Preconditioned, Program, ViewNetwork, prediction_in
from .observed import Observed
from .split import CallPlan, Made, Slot, taken_apart

__all__ = ["Called", "called"]

Half = dict[str, Any]


@dataclass(frozen=True)
class Called:
    """What a call is, as a ``Denoiser``.

    Attributes:
        model: the network with schedule, prediction and guidance.
        cond: its conditioning.
        x_T: where the call starts, (B, …), with its graph.
    """

    model: Denoiser
    cond: Half
    x_T: Tensor


def called(found: Observed, given: Mapping[str, Any], trained: Mapping[str, Tensor]) -> Called:
    """The view of an observed call.

    Args:
        found: the call.
        given: the user's arguments; gradients reach those that require grad.
        trained: the weights that get gradients, by dotted name.

    Raises:
        MissingGradientError: something that requires grad has no part in the view.
        UnsupportedError: how the pipeline calls its networks, or combines what they return, is not known.
    """
    name = type(found.clone).__name__
    if found.output.shape != found.z.shape:
        raise UnsupportedError(
            f"{name} gives its scheduler {tuple(found.output.shape)} for latents of {tuple(found.z.shape)} (a learned "
            "variance), so it has no view: use DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    programs, halves, parts = _programs(found)
    combination = learned(found.clone, parts, found.output, NO_VIEW)
    guided = combination.cond != combination.uncond
    chosen = [halves[combination.cond], *([halves[combination.uncond]] if guided else [])]
    modules = {call.name: call.module for call in found.calls}
    _check_reached(found.state, chosen, given, trained, set(modules))
    leaves = [tensor for tensor in nests.tensors(dict(given)) if tensor.requires_grad]
    chosen, state = _lasting(
        [_with_leaves(half, leaves) for half in chosen], found.state, [*leaves, *trained.values()]
    )
    cond, uncond = [*chosen, None][:2]
    network: Any = ViewNetwork(programs, modules, found.z.shape[1:])
    dtype = found.calls[0].input.dtype
    if found.process.preconditioning is not None:
        network = Preconditioned(network, found.process.preconditioning, dtype)
        dtype = torch.promote_types(dtype, torch.float32)
    model = Denoiser(
        network,
        found.process.schedule,
        found.process.prediction,
        guidance_scale=combination.scale if guided else 1.0,
        uncond=uncond,
        guidance_rescale=combination.rescale,
        time_scale=found.scale,
        dtype=dtype,
    )
    assert cond is not None
    return Called(model, cond, state)


def _programs(found: Observed) -> tuple[list[Program], list[Half], list[Tensor]]:
    """The calls as programs; and of each part that guidance combines, its tensors and its output.

    A batch with both halves of guidance is one program with two parts; two calls are two programs with one each.
    """
    samples = len(found.z)
    made: dict[int, Made] = {}
    controls: dict[int, tuple[CallPlan, list[dict[str, Tensor]]]] = {}
    programs: list[Program] = []
    halves: list[Half] = []
    parts: list[Tensor] = []
    for number, call in enumerate(found.calls):
        where = call.where(found.z)
        if is_control(call):
            earlier = sum(found.calls[k].name == call.name for k in controls)
            prefix = f"{call.name}.{earlier}." if earlier else f"{call.name}."
            controls[number] = taken_apart(call, where, samples, made, prefix)
            made |= {id(tensor): Made(number, i) for i, tensor in enumerate(outputs_of(call.output))}
            continue
        call.check_arguments(made)
        plan, own = taken_apart(call, where, samples, made)
        numbers = sorted({place.call for place in plan.places() if isinstance(place, Made)})
        for i in range(where.copies):
            half: Half = dict(own[i])
            for k in numbers:
                if len(controls[k][1]) != where.copies:
                    raise UnsupportedError(
                        f"{type(found.clone).__name__} calls {controls[k][0].name} for another number of samples than "
                        f"{call.name} (guess_mode), so it has no view: use bd.differentiable"
                    )
                half |= controls[k][1][i]
            halves.append(half)
        parts += prediction_in(call.output, found.z.shape[1:]).chunk(where.copies)
        programs.append(Program({k: controls[k][0] for k in numbers}, plan))
    if len(programs) == 1 and len(halves) > 1 and _shares(programs[0]):
        programs = programs * len(halves)  # what all samples share, but has a gradient, is in no batch
    if len(programs) > 1:
        for i, half in enumerate(halves):
            half[PROGRAM] = i
    return programs, halves, parts


def _shares(program: Program) -> bool:
    plans = [*program.controls.values(), program.main]
    return any(isinstance(place, Slot) and not place.each for plan in plans for place in plan.places())


def _with_leaves(half: Half, leaves: Sequence[Tensor]) -> Half:
    """The same, with the user's own tensors where the pipeline passes them on as they are.

    So a view goes on to be right when they are changed in place, as optimisers do.
    """

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        return next((leaf for leaf in leaves if _is_passed_on(leaf, value)), value)

    return {key: own(value) for key, value in half.items()}


def _lasting(halves: Sequence[Half], state: Tensor, inputs: Sequence[Tensor]) -> tuple[list[Half], Tensor]:
    """The same, for more than one backward pass."""
    found = {
        id(value): value
        for value in [state, *nests.tensors(list(halves))]
        if value.requires_grad and value.grad_fn is not None and all(value is not own for own in inputs)
    }
    lasting = dict(zip(found, kept(list(found.values()), inputs), strict=True))
    return [
        {key: lasting.get(id(value), value) for key, value in half.items()} for half in halves
    ], lasting.get(id(state), state)


def _is_passed_on(leaf: Tensor, value: Tensor) -> bool:
    """Whether ``value`` was made of ``leaf`` by an identity."""
    if leaf.shape != value.shape or leaf.dtype != value.dtype or not torch.equal(leaf, value):
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(value.shape, generator=generator).to(value)
    (back,) = torch.autograd.grad(value, leaf, probe, retain_graph=True, allow_unused=True)
    return back is not None and torch.equal(back, probe)


def _check_reached(
    state: Tensor,
    halves: Sequence[Half],
    given: Mapping[str, Any],
    trained: Mapping[str, Tensor],
    inside: set[str],
) -> None:
    """See that what requires grad has a part in the view.

    Raises:
        MissingGradientError: naming what has none.
    """
    if not torch.is_grad_enabled():
        return
    asked = [(key, tensor) for key, value in given.items() for tensor in nests.tensors(value)]
    asked = [(key, tensor) for key, tensor in asked if tensor.requires_grad]
    # Of the networks that the view calls, sampling itself sees to it. Of others some weights may be idle, not all.
    asked += [
        (key.split(".")[0], weight) for key, weight in trained.items() if key.split(".")[0] not in inside
    ]
    ends = [tensor for tensor in [state, *nests.tensors(list(halves))] if tensor.requires_grad]
    if not asked:
        return
    found: Sequence[Tensor | None] = [None] * len(asked)
    if ends:
        zeros = [torch.zeros_like(end) for end in ends]
        tensors = [tensor for _, tensor in asked]
        found = torch.autograd.grad(ends, tensors, zeros, retain_graph=True, allow_unused=True)
    reached = {key for (key, _), gradient in zip(asked, found, strict=True) if gradient is not None}
    lost = [key for key, _ in asked if key not in reached]
    if lost:
        raise MissingGradientError(
            f"{lost[0]} requires grad, but no gradient would reach it: the networks of this call are given nothing "
            "that was made of it (a negative prompt without guidance, a text encoder whose prompt was handed in as "
            "embeddings). Pass it detached, or leave it out of train="
        )
