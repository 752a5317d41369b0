"""What a run of ``differentiable`` does under a budget for everything: planned before its first call of each kind."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..budget import MemoryPlan, format_size
from ..errors import BudgetError, UnsupportedError
from ..losses import InParts
from ..planning.choices import Choices
from ..planning.job import Job
from ..planning.meta import weight_bytes
from ..planning.plan import Plan, make_plan
from ..through import Random, Through
from .homes import way_of
from .offloaded import execution_device
from .planned import count_job
from .shadow import Train, networks
from .stand_in import alike

_JOBS: weakref.WeakKeyDictionary[Any, dict[Any, Job]] = weakref.WeakKeyDictionary()
_MOST = 8  # kinds of calls that are remembered of a pipeline


class Chooser:
    """Chooses how a pipeline's calls are run.

    Args:
        memory: of :func:`~backdrift.differentiable`; a plan or its choices are followed as they are.
        loss: counted in the budget; see :func:`~backdrift.plan`.

    Attributes:
        plan: of the last call; None where nothing had to be planned, or could be.
    """

    def __init__(
        self, pipe: Any, memory: Plan | Choices | MemoryPlan | str | int, train: Train, clamp: bool, loss: Any
    ) -> None:
        self._pipe, self._train, self._clamp, self._loss = pipe, train, clamp, loss
        self.plan = memory if isinstance(memory, Plan) else None
        self._fixed = (
            memory.choices if isinstance(memory, Plan) else memory if isinstance(memory, Choices) else None
        )
        self.memory = MemoryPlan("min") if self._fixed is not None else MemoryPlan.parse(memory)  # type: ignore[arg-type]
        _check_supported(self._fixed, execution_device(pipe) is not None, isinstance(loss, InParts))

    def choose(
        self, args: Any, kwargs: Any, noise: torch.Tensor | None, through: Through
    ) -> tuple[Choices, MemoryPlan]:
        """How one call is run, and what its ledger follows.

        Raises:
            BudgetError: nothing fits; names the smallest budget that works.
        """
        choices, followed = self._chosen(args, kwargs, noise, through)
        if isinstance(self._loss, InParts) and (self._fixed is not None or self.plan is not None):
            self._loss.size = choices.loss
        return choices, followed

    def _chosen(
        self, args: Any, kwargs: Any, noise: torch.Tensor | None, through: Through
    ) -> tuple[Choices, MemoryPlan]:
        if self._fixed is not None:
            return self._fixed, _followed(self._fixed)
        if self.memory.mode != "bytes" or not torch.is_grad_enabled():
            return Choices(), self.memory
        budget = self.memory.budget or 0
        try:
            job = self._job(args, kwargs, noise, through)
        except UnsupportedError as problem:
            return Choices(), self._unplanned(budget, problem)
        # A loss in parts is for its caller to make; weights wait elsewhere if the user has sent them there.
        device = execution_device(self._pipe)
        self.plan = make_plan(
            job,
            budget,
            offload=False,
            offloaded=device is not None,
            park=(device or self._pipe.device).type != "cpu",
            micro=isinstance(self._loss, InParts),
        )
        return self.plan.choices, _followed(self.plan.choices)

    def _job(self, args: Any, kwargs: Any, noise: torch.Tensor | None, through: Through) -> Job:
        jobs = _JOBS.setdefault(self._pipe, {})
        if isinstance(
            through, Random
        ):  # the draws differ in which steps they are, not in how many: one stands for all
            through = replace(through, seed=0, first=0)
        key = (
            _signature(args, kwargs, noise),
            _state(self._pipe),
            repr(self._train),
            self._clamp,
            _same(self._loss),
            through,
        )
        if key not in jobs:
            if len(jobs) >= _MOST:
                jobs.pop(next(iter(jobs)))
            jobs[key] = count_job(
                self._pipe,
                kwargs,
                self._train,
                self._loss,
                0,
                args=args,
                clamp=self._clamp,
                noise=noise,
                through=through,
            )
        return jobs[key]

    def _unplanned(self, budget: int, problem: UnsupportedError) -> MemoryPlan:
        """A budget for the calls alone: what the weights leave."""
        warnings.warn(f"{problem}. Calls are kept as they fit beside the weights", stacklevel=4)
        weights = sum(weight_bytes(m) for m in vars(self._pipe).values() if isinstance(m, nn.Module))
        if budget <= weights:
            raise BudgetError(
                f"memory={format_size(budget)} is too small: the weights alone take {format_size(weights)}"
            ) from problem
        self.plan = None
        return MemoryPlan("bytes", budget - weights)


def _followed(choices: Choices) -> MemoryPlan:
    if choices.keep is None:
        return MemoryPlan("max")
    return MemoryPlan("keep", keep=choices.keep, park=choices.latents == "cpu")


def _check_supported(choices: Choices | None, offloaded: bool, in_parts: bool) -> None:
    """Raise for choices that a run cannot make.

    Raises:
        UnsupportedError: a loss in parts that is the caller's own to evaluate, or weights that wait on the CPU although
            the pipeline is not set up so.
    """
    if choices is None:
        return
    if choices.weights != "device" and not offloaded:
        raise UnsupportedError(
            f"weights={choices.weights!r} is planned for, but a run does not send weights away by itself: call "
            "pipe.enable_model_cpu_offload() first"
        )
    if choices.loss is not None and not in_parts:
        raise UnsupportedError(
            f"loss={choices.loss!r} is planned for, but a run does not call your loss: score with "
            "scorer = backdrift.losses.InParts(loss), and pass loss=scorer; or pass choices with loss=None"
        )


def _signature(args: Any, kwargs: Any, noise: torch.Tensor | None) -> Any:
    """What calls of the same job have in common."""
    leaves, spec = pytree.tree_flatten(
        (args, {k: v for k, v in kwargs.items() if not k.startswith("callback")})
    )
    return (repr(spec), tuple(_seen(x) for x in leaves), _seen(noise))


def _same(thing: Any) -> Any:
    """A key that only this object has: an ``id`` would pass to the next one, a reference would keep it alive."""
    return thing if thing is None or isinstance(thing, str) else weakref.ref(thing)


def _seen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (alike(value), value.detach().flatten().tolist() if value.numel() <= 64 else None).__repr__()
    if isinstance(getattr(value, "values", None), dict):  # the state of a modular pipeline
        return tuple((k, _seen(v)) for k, v in value.values.items())
    return value if isinstance(value, str | int | float | bool | type(None)) else type(value)


def _set_up(layer: nn.Module) -> Any:
    """What a user may switch on a layer that changes what calls hold: mode, attention, slices, tiles, adapters."""
    own = vars(layer)
    processor = own.get("processor")
    tiles = tuple(v for k, v in own.items() if k.startswith(("use_", "tile_")))
    adapters = (own["_active_adapter"], own.get("_disable_adapters")) if "_active_adapter" in own else None
    return (
        layer.training,
        own.get("gradient_checkpointing"),
        own.get("_chunk_size"),
        type(processor),
        getattr(processor, "slice_size", None),
        repr((tiles, adapters)),
    )


def _state(pipe: Any) -> Any:
    """Of the pipeline, what decides over bytes and calls."""
    scheduler = getattr(pipe, "scheduler", None)
    parts = tuple(
        (
            name,
            _same(module),
            tuple(_set_up(child) for child in module.modules()),
            tuple((p.dtype, p.requires_grad) for p in module.parameters()),
            way_of(module),
        )
        for name, module in networks(pipe).items()
    )
    return (
        type(scheduler),
        repr(getattr(scheduler, "config", None)),
        parts,
        torch.backends.cuda.flash_sdp_enabled(),
    )
