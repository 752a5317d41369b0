"""``differentiable``: the user's own call of a diffusers pipeline, with exact gradients under a memory plan."""

from __future__ import annotations

import copy
import threading
import time
from contextlib import nullcontext
from contextvars import ContextVar, Token
from functools import cache, wraps
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import InputError, MissingGradientError, UnsupportedError
from ..memory import Ledger, MemoryPlan, Role
from ..stats import RunStats
from ..weights import Adapters
from .calls import PipelineCall
from .draws import Noise, checking, drawing
from .endings import Ending, ending_of
from .forwards import check_networks, own_forwards
from .modular import guiders, is_modular, with_twin_blocks
from .outputs import SafetyBeside, first_tensor, to_pil, unclamped, with_flags
from .reach import check_reached, wanted
from .refusals import check_components, check_pipeline, image_processors, plain_class
from .shadow import Train, copied_scheduler, networks, shadow, trained_parameters
from .states import check_states, own_hooks, remembered
from .steps import check_numbers, check_steps
from .targets import numbers, with_targets
from .trainable import check_trainable
from .twins import twin

__all__ = ["DifferentiableRun", "differentiable"]

_ACTIVE: ContextVar[MappingProxyType[int, DifferentiableRun]] = ContextVar("backdrift_runs")
_LOCK = threading.Lock()
_ENTERED: dict[int, int] = {}  # id of a pipeline -> blocks it is inside of, over all threads
_CHECKED: set[Any] = set()  # calls whose inputs were all found in their graphs


def differentiable(
    pipe: Any,
    memory: MemoryPlan | str | int = "auto",
    train: Train = None,
    clamp: bool = False,
    noise: torch.Tensor | None = None,
) -> DifferentiableRun:
    """Make calls of a diffusers pipeline differentiable, exactly, in bounded memory.

    As a context manager it changes what ``pipe(...)`` does inside the block, in this thread only. As a plain
    function, ``differentiable(pipe, ...)(prompt, ...)`` makes one such call without any block.

    Gradients reach the initial noise (``latents=``), prompt embeddings, control and start images, any other
    tensor handed in, and the weights that ``train`` names. They are those of plain autograd through the same
    call, bit for bit on a CPU. ``backward()`` may run inside the block or after it.

    Args:
        pipe: any diffusers pipeline, ordinary or modular.
        memory: ``"min"`` (one network call's activations at a time), ``"max"`` (plain autograd), ``"auto"``
            (from what is free), a number of bytes, or a size such as ``"6GiB"``.
        train: which weights get gradients: None, a component's name, ``"lora"`` (the active adapters of all
            components, text encoders included), a pattern such as ``"unet.*attn2*"``, or several of these.
        clamp: end in diffusers' own clamp to [0, 1], which has no gradient where pictures are saturated.
        noise: takes the place of the pipeline's own first random draw of this shape, for pipelines without
            ``latents=``; before the scheduler scales it. Other draws stay as they are.

    Returns:
        The run. Inside it every call returns the pipeline's usual output with a tensor in it, whatever
        ``output_type`` says: pictures (``.images``) as (N, 3, H, W) and videos (``.frames``) as (N, frames, 3,
        H, W), both in [0, 1] and not clamped unless asked for; sound (``.audios``) as the pipeline makes it,
        (N, channels, samples) or (N, samples); with ``output_type="latent"`` the latents.

    Raises:
        UnsupportedError: the pipeline cannot be differentiated as it stands; says why and what to do.
        InputError: ``train`` names nothing; or, from the call, it draws no noise of the shape of ``noise``.
        BudgetError: ``memory`` is malformed; or, from the call, too small (names the smallest that works).
        MissingGradientError: from the call, if a tensor handed in requires grad and would get none.
        StateChangedError: from the backward pass, if weights, adapters or flags have changed.

    Example:
        >>> with bd.differentiable(pipe, memory="auto") as run:
        ...     images = pipe("a red seven", latents=noise, num_inference_steps=31).images
        >>> loss(images).backward()
        >>> run.stats
    """
    return DifferentiableRun(pipe, memory=memory, train=train, clamp=clamp, noise=noise)


class DifferentiableRun:
    """Differentiable calls of one pipeline under one memory plan; made by :func:`differentiable`.

    Calls made in one run share its budget as long as their graphs are alive.

    Attributes:
        pipe: the pipeline.
        stats: what was called, redone and held (:class:`~backdrift.stats.RunStats`).
        trained: dotted names of the weights that get gradients.
        noise: what takes the place of each call's own draw; may be exchanged between calls.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        memory: MemoryPlan | str | int = "auto",
        train: Train = None,
        clamp: bool = False,
        noise: torch.Tensor | None = None,
    ) -> None:
        check_pipeline(pipe)
        check_components(pipe)
        check_steps(pipe)
        check_networks(pipe)
        check_states(pipe)
        self.pipe, self.clamp, self.noise = pipe, clamp, noise
        self.stats = RunStats()
        trained = trained_parameters(pipe, train)
        check_trainable(pipe, trained)
        self.trained = tuple(trained)
        self._train = train
        self._ledger = Ledger(memory, stats=self.stats, defer=True)
        self._tokens: list[Token[Any]] = []
        self._pictures: torch.Tensor | None = None
        self._flags: list[bool] | None = None

    def __enter__(self) -> DifferentiableRun:
        with _LOCK:
            count = _ENTERED.get(id(self.pipe), 0)
            if count == 0:
                cls: Any = type(self.pipe)
                self.pipe.__class__ = _switching(cls)
            _ENTERED[id(self.pipe)] = count + 1
        runs = _ACTIVE.get(MappingProxyType({}))
        self._tokens.append(_ACTIVE.set(MappingProxyType({**runs, id(self.pipe): self})))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ACTIVE.reset(self._tokens.pop())
        with _LOCK:
            _ENTERED[id(self.pipe)] -= 1
            if _ENTERED[id(self.pipe)] == 0:
                del _ENTERED[id(self.pipe)]
                self.pipe.__class__ = plain_class(type(self.pipe))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One differentiable call: the pipeline's own arguments, the pipeline's own output with a tensor."""
        if torch.is_inference_mode_enabled():
            raise InputError("differentiable inside torch.inference_mode(): leave that, it forbids gradients")
        check_components(self.pipe)
        check_steps(self.pipe)
        check_networks(self.pipe)
        check_states(self.pipe)
        start = time.perf_counter()
        ending = ending_of(plain_class(type(self.pipe)), self.clamp)
        call = PipelineCall.of(self.pipe, args, kwargs, ending.output_type if ending is not None else "pt")
        noise = None if self.noise is None else Noise(self.noise)
        arguments = call.arguments | ({} if noise is None else {"noise": noise.tensor})
        clone, safety = self._clone(ending, noise)
        # A user's no_grad around the call is meant: it samples as cheaply as ever, and returns a tensor.
        inputs = wanted(arguments) if torch.is_grad_enabled() else {}
        check_numbers(inputs)
        with_targets(call)
        with self._ledger.run(), drawing(noise), nullcontext() if ending is None else ending:
            out = call.run(clone)
        if noise is not None:
            noise.check()
        out = out if ending is None else ending.in_place_of_arrays(out)
        out = with_flags(out, safety.flags if safety is not None else None)
        result = first_tensor(out)
        if torch.is_grad_enabled():
            self._check_result(result, inputs, arguments)
        self._pictures = None if call.latent or result is None else result.detach()
        self._flags = safety.flags if safety is not None else None
        self.stats.seconds_forward += time.perf_counter() - start
        return out

    @property
    def pil(self) -> list[Any]:
        """PIL copies of the last call's pictures (clamped, rounded to 8 bits).

        Raises:
            InputError: no pictures yet, or the last call returned latents.
        """
        if self._pictures is None:
            raise InputError("no pictures: call the pipeline first, with an output_type other than 'latent'")
        return to_pil(self.pipe, self._pictures)

    @property
    def flagged(self) -> list[bool] | None:
        """What the safety checker says of the last call's pictures; None without a checker."""
        return self._flags

    def __repr__(self) -> str:
        name = plain_class(type(self.pipe)).__name__
        return f"DifferentiableRun({name}, memory={self._ledger.plan}, trained={len(self.trained)} weights)"

    def _clone(self, ending: Ending | None, noise: Noise | None) -> tuple[Any, SafetyBeside | None]:
        """The pipeline that really runs: the user's, on shadow networks, with a scheduler of its own."""
        weights = trained_parameters(self.pipe, self._train)
        check_trainable(self.pipe, weights)
        trained = {id(p) for p in weights.values()}
        parts = networks(self.pipe)
        clone = copy.copy(self.pipe)
        clone.__class__ = twin(plain_class(type(self.pipe)))
        # Straight into __dict__: the pipeline's __setattr__ would edit the configuration that both share.
        own = clone.__dict__
        users = Adapters(list(parts.items()))
        for name, module in parts.items():
            ours = shadow(module, trained)
            own_forwards(module, ours)
            own_hooks(module, ours)
            own[name] = self._planned(name, ours, users, ending)
            if noise is not None and name.startswith(("unet", "transformer")):
                own[name].forward = checking(own[name].forward, noise)
        for name, value in list(own.items()):
            if name.endswith("scheduler") and hasattr(value, "step"):
                own[name] = copied_scheduler(value)
                if noise is not None:
                    own[name].step = checking(own[name].step, noise)
        if is_modular(type(self.pipe)):
            own["_blocks"] = with_twin_blocks(self.pipe._blocks)
            own |= {name: copied_scheduler(value) for name, value in guiders(self.pipe).items()}
        if not self.clamp:
            own |= {name: unclamped(p) for name, p in image_processors(self.pipe).items()}
        if own.get("watermark") is not None:
            own["watermark"] = None  # drawn in numpy, where gradients end
        safety = None
        if own.get("safety_checker") is not None and hasattr(clone, "run_safety_checker"):
            safety = SafetyBeside(self.pipe.run_safety_checker)
            own["run_safety_checker"] = safety
        return clone, safety

    def _planned(self, name: str, module: nn.Module, users: Adapters, ending: Ending | None) -> nn.Module:
        """The shadow with its calls under the memory plan."""
        role: Role = "network"
        if "encoder" in name or name in ("safety_checker", "image_projection"):
            role = "other"
        methods = ["forward"]
        if hasattr(module, "decode") or hasattr(module, "encode"):
            role = "decoder"
            methods += [m for m in ("encode", "decode") if hasattr(module, m)]
        for method in methods:
            planned = self._plan(getattr(module, method), name, module, role, users)
            setattr(module, method, planned if ending is None else ending.asleep(planned))
        return module

    def _plan(self, fn: Any, name: str, module: nn.Module, role: Role, users: Adapters) -> Any:
        ledger, modules = self._ledger, [(name, module)]

        @wraps(fn)
        def planned(*args: Any, **kwargs: Any) -> Any:
            run, state = fn, remembered(module)
            if state is not None:
                run, args = state.around(fn), (state.tensors, *args)
            return ledger.call(
                run, *args, modules=modules, owned=True, role=role, check=users.check, **kwargs
            )

        return planned

    def _check_result(
        self, result: torch.Tensor | None, inputs: dict[str, torch.Tensor], arguments: dict[str, Any]
    ) -> None:
        if result is None:
            raise UnsupportedError(
                f"{type(self.pipe).__name__} did not return a tensor, so nothing can be differentiated"
            )
        if not result.requires_grad:
            if inputs or self.trained:
                raise MissingGradientError(
                    f"the pictures do not depend on {', '.join([*inputs, *self.trained[:3]])} in a way that "
                    "gradients can follow"
                )
            return
        # The walk costs some milliseconds a step, so once per kind of call.
        schedule = type(getattr(self.pipe, "scheduler", None))
        key = (type(self.pipe), schedule, frozenset(arguments), frozenset(inputs), numbers(arguments))
        if key not in _CHECKED:
            check_reached(result, inputs)
            _CHECKED.add(key)


@cache
def _switching(base: type) -> type:
    """A subclass of a pipeline's class, by the same name, whose call is differentiable inside a block."""

    @wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _ACTIVE.get(MappingProxyType({})).get(id(self))
        return base.__call__(self, *args, **kwargs) if run is None else run(*args, **kwargs)

    body = {
        "__call__": __call__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_backdrift_base": base,
    }
    return type(base.__name__, (base,), body)
