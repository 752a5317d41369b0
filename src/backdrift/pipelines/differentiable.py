"""``differentiable``: the user's own call of a diffusers pipeline, with exact gradients under a memory plan."""

from __future__ import annotations

import copyreg
import threading
import time
import weakref
from contextlib import nullcontext
from contextvars import ContextVar, Token
from functools import cache, partial, wraps
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import InputError, MissingGradientError, UnsupportedError
from ..memory import Ledger, MemoryPlan, Role
from ..planning.choices import Choices
from ..planning.plan import Plan
from ..residence import Residence, Turns
from ..stats import RunStats
from ..through import All, Through
from ..trace import Trace, Watch
from ..weights import Adapters
from .calls import PipelineCall
from .choosing import Chooser
from .clone import clone_of
from .draws import Noise, drawing
from .endings import Ending, ending_of
from .forwards import check_networks
from .offloaded import Offloading
from .outputs import SafetyBeside, first_tensor, to_pil, with_flags
from .parallel import after_call, before_call, check_parallel
from .parts import divide, in_parts, parts_of
from .reach import check_reached, wanted
from .refusals import check_components, check_pipeline, plain_class
from .rehearsal import role_of
from .shadow import Train, networks, trained_parameters
from .states import check_states, remembered
from .stepping import Loop
from .steps import check_numbers, check_steps
from .targets import numbers, with_targets
from .trainable import check_trainable

__all__ = ["DifferentiableRun", "differentiable"]

_ACTIVE: ContextVar[MappingProxyType[int, DifferentiableRun]] = ContextVar("backdrift_runs")
_LOCK = threading.Lock()
_ENTERED: dict[int, int] = {}  # id of a pipeline -> blocks it is inside of, over all threads
# Of each pipeline, the kinds of calls whose inputs were all found in their graphs.
_CHECKED: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def differentiable(
    pipe: Any,
    memory: Plan | Choices | MemoryPlan | str | int = "auto",
    train: Train = None,
    clamp: bool = False,
    noise: torch.Tensor | None = None,
    loss: Any = None,
    through: Through | str = "all",
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
            (from what is free); a number of bytes or a size such as ``"6GiB"``, for everything on the device, the
            weights too: the fastest way within it is planned (:func:`~backdrift.plan`) and followed; or such a
            plan, or its ``choices``.
        train: which weights get gradients: None, a component's name, ``"lora"`` (the active adapters of all
            components, text encoders included), a pattern such as ``"unet.*attn2*"``, or several of these.
        clamp: end in diffusers' own clamp to [0, 1], which has no gradient where pictures are saturated.
        noise: takes the place of the pipeline's own first random draw of this shape, for pipelines without
            ``latents=``; before the scheduler scales it. Other draws stay as they are.
        loss: what will score the pictures, as in :func:`~backdrift.plan`: room is left for it in a budget. It is
            not called.
        through: which steps carry the gradient: ``All()``, ``Last(K)``, ``Random(K)``, ``Steps([...])`` or their text
            (``"last:3"``; :mod:`backdrift.through` has the equations, docs/through.md the advice). In the others the
            networks are called once, without a graph, and what they return is a constant. A step is what the pipeline
            does between two returns of its scheduler's ``step``: all calls of its denoising networks there, guidance
            halves and control networks among them; the passes of Heun's method, KDPM2's and PNDM's first ones that
            belong together are one step, so there are as many as the progress bar shows. What a pipeline puts into
            its latents between two steps (the known part of an inpainted picture) belongs to the step that follows.

    Returns:
        The run. Inside it every call returns the pipeline's usual output with a tensor in it, whatever
        ``output_type`` says: pictures (``.images``) as (N, 3, H, W) and videos (``.frames``) as (N, frames, 3,
        H, W), both in [0, 1] and not clamped unless asked for; sound (``.audios``) as the pipeline makes it,
        (N, channels, samples) or (N, samples); with ``output_type="latent"`` the latents.

    Raises:
        UnsupportedError: the pipeline cannot be differentiated as it stands; says why and what to do.
        InputError: ``train`` names nothing; or, from the call, it draws no noise of the shape of ``noise``.
        BudgetError: ``memory`` is malformed; or, from the call, too small (names the smallest that works).
        MissingGradientError: from the call, if a tensor handed in requires grad and would get none (before it samples,
            where ``Last`` cuts the noise off).
        StateChangedError: from the backward pass, if weights, adapters or flags have changed.

    Example:
        >>> with bd.differentiable(pipe, memory="auto") as run:
        ...     images = pipe("a red seven", latents=noise, num_inference_steps=31).images
        >>> loss(images).backward()
        >>> run.stats
    """
    return DifferentiableRun(
        pipe, memory=memory, train=train, clamp=clamp, noise=noise, loss=loss, through=through
    )


class DifferentiableRun:
    """Differentiable calls of one pipeline under one memory plan; made by :func:`differentiable`.

    Calls made in one run share its budget as long as their graphs are alive.

    Attributes:
        pipe: the pipeline.
        stats: what was called, redone and held (:class:`~backdrift.stats.RunStats`).
        trained: dotted names of the weights that get gradients.
        noise: what takes the place of each call's own draw; may be exchanged between calls.
        through: which steps carry the gradient; may be exchanged between calls.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        memory: Plan | Choices | MemoryPlan | str | int = "auto",
        train: Train = None,
        clamp: bool = False,
        noise: torch.Tensor | None = None,
        loss: Any = None,
        through: Through | str = "all",
    ) -> None:
        self.through = Through.parse(through)
        check_pipeline(pipe)
        check_components(pipe)
        check_steps(pipe)
        check_networks(pipe)
        check_states(pipe)
        self.pipe, self.clamp, self.noise = pipe, clamp, noise
        self.stats = RunStats()
        trained = trained_parameters(pipe, train)
        check_trainable(pipe, trained)
        check_parallel(pipe, trained)
        self.trained = tuple(trained)
        self._train = train
        self._chooser = Chooser(pipe, memory, train, clamp, loss)
        self._ledger = Ledger(self._chooser.memory, stats=self.stats, defer=True)
        self._tokens: list[Token[Any]] = []
        self._pictures: torch.Tensor | None = None
        self._flags: list[bool] | None = None
        self._trace = Trace(All())
        self._calls = 0

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
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError(
                "differentiable does not work inside torch.func transforms (grad, vjp, jacrev, vmap, …): use "
                "torch.autograd, or forward-mode gradients by torch.autograd.forward_ad"
            )
        check_components(self.pipe)
        check_steps(self.pipe)
        check_networks(self.pipe)
        check_states(self.pipe)
        start = time.perf_counter()
        ending = ending_of(plain_class(type(self.pipe)), self.clamp)
        call = PipelineCall.of(self.pipe, args, kwargs, ending.output_type if ending is not None else "pt")
        noise = None if self.noise is None else Noise(self.noise)
        arguments = call.arguments | ({} if noise is None else {"noise": noise.tensor})
        through = Through.parse(self.through)
        choices, followed = self._chooser.choose(args, kwargs, self.noise, through)
        self._ledger.follow(followed)
        offloading = Offloading(self.pipe, choices.weights)
        clone, safety = self._clone(ending, noise, choices, offloading)
        # A user's no_grad around the call is meant: it samples as cheaply as ever, and returns a tensor.
        inputs = wanted(arguments) if torch.is_grad_enabled() else {}
        loop = self._listen(clone, through, inputs)
        check_numbers(inputs)
        with_targets(call)
        weights = trained_parameters(self.pipe, self._train)
        check_parallel(self.pipe, weights)
        before_call(self.pipe, weights)
        with offloading, self._ledger.run(), drawing(noise), nullcontext() if ending is None else ending:
            out = call.run(clone)
            loop.finish(self.trained)
        if noise is not None:
            noise.check()
        out = out if ending is None else ending.in_place_of_arrays(out)
        out = with_flags(out, safety.flags if safety is not None else None)
        result = first_tensor(out)
        after_call(self.pipe, weights, result)
        if torch.is_grad_enabled():
            self._check_result(result, inputs, arguments, loop)
        self._pictures = None if call.latent or result is None else result.detach()
        self._flags = safety.flags if safety is not None else None
        self.stats.seconds_forward += time.perf_counter() - start
        return out

    @property
    def plan(self) -> Plan | None:
        """What was chosen for the last call, and why; None unless ``memory`` is a size or a plan."""
        return self._chooser.plan

    @property
    def trace(self) -> Trace:
        """The gradient on its way back through the last call: its norm at each step, growth, what was clipped; and
        which steps carried it. Filled by ``backward()``."""
        return self._trace

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
    def parameters(self) -> dict[str, torch.Tensor]:
        """The weights that get gradients, by dotted name: what an optimizer is to be given.

        The networks' own Parameters, but after ``pipe.enable_sequential_cpu_offload()``: there those are on the meta
        device, and gradients arrive at the tensors that stand in accelerate's table for them.
        """
        return trained_parameters(self.pipe, self._train)

    @property
    def flagged(self) -> list[bool] | None:
        """What the safety checker says of the last call's pictures; None without a checker."""
        return self._flags

    def __repr__(self) -> str:
        name = plain_class(type(self.pipe)).__name__
        return f"DifferentiableRun({name}, memory={self._ledger.plan}, trained={len(self.trained)} weights)"

    def _clone(
        self, ending: Ending | None, noise: Noise | None, choices: Choices, offloading: Offloading
    ) -> tuple[Any, SafetyBeside | None]:
        """The pipeline that really runs, its networks' calls under the memory plan."""
        weights = trained_parameters(self.pipe, self._train)
        check_trainable(self.pipe, weights)
        users = Adapters(list(networks(self.pipe).items()))

        def dress(name: str, module: nn.Module) -> nn.Module:
            return self._planned(name, module, users, ending, choices, offloading.residence(name, module))

        trained = {id(p) for p in weights.values()}
        clone = clone_of(self.pipe, trained, dress, clamp=self.clamp, noise=noise)
        offloading.place(clone)
        own, safety = clone.__dict__, None
        if own.get("safety_checker") is not None and hasattr(clone, "run_safety_checker"):
            safety = SafetyBeside(self.pipe.run_safety_checker)
            own["run_safety_checker"] = safety
        return clone, safety

    def _listen(self, clone: Any, through: Through, inputs: dict[str, torch.Tensor]) -> Loop:
        """Follow the pipeline's loop for one call."""
        self._trace = Trace(through)
        loop = Loop(
            through,
            draw=self._calls,
            inputs=tuple(inputs),
            watch=Watch(self._trace),
            stats=self.stats,
        )
        loop.attach(clone)
        self._calls += torch.is_grad_enabled()
        return loop

    def _planned(
        self,
        name: str,
        module: nn.Module,
        users: Adapters,
        ending: Ending | None,
        choices: Choices,
        residence: Residence | None,
    ) -> nn.Module:
        """The shadow with its calls under the memory plan."""
        role = role_of(name, module)
        methods = ["forward", *(m for m in ("encode", "decode") if role == "decoder" and hasattr(module, m))]
        if role != "other":
            divide(module, role, choices, residence)
        for method in methods:
            fn = getattr(module, method)
            fn = fn if residence is None else residence.around(fn)
            turns = None if residence is None else residence.turns
            planned = self._plan(fn, name, module, role, users, choices, turns)
            setattr(module, method, planned if ending is None else ending.asleep(planned))
        return module

    def _plan(
        self,
        fn: Any,
        name: str,
        module: nn.Module,
        role: Role,
        users: Adapters,
        choices: Choices,
        turns: Turns | None,
    ) -> Any:
        ledger, modules = self._ledger, [(name, module)]

        def call(role: Role, *args: Any, **kwargs: Any) -> Any:
            run, state = fn, remembered(module)
            if state is not None:
                run, args = state.around(fn), (state.tensors, *args)
            return ledger.call(
                run, *args, modules=modules, owned=True, role=role, check=users.check, turns=turns, **kwargs
            )

        @wraps(fn)
        def planned(*args: Any, **kwargs: Any) -> Any:
            parts = parts_of(role, choices, args, kwargs)
            if parts == 1 or not torch.is_grad_enabled():
                return call(role, *args, **kwargs)
            earlier: Role = "decoder part" if role == "decoder" else "network part"
            return in_parts(partial(call, earlier), partial(call, role), parts, args, kwargs)

        return planned

    def _check_result(
        self,
        result: torch.Tensor | None,
        inputs: dict[str, torch.Tensor],
        arguments: dict[str, Any],
        loop: Loop,
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
        checked = _CHECKED.setdefault(self.pipe, set())
        key = (
            schedule,
            frozenset(arguments),
            frozenset(inputs),
            numbers(arguments),
            (loop.through, loop.chosen),
        )
        # A callback may be another one by the same name.
        if key not in checked or any(callable(value) for value in arguments.values()):
            check_reached(result, inputs)
            checked.add(key)


@cache
def _switching(base: type) -> type:
    """A subclass of a pipeline's class, by the same name, whose call is differentiable inside a block."""

    @wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _ACTIVE.get(MappingProxyType({})).get(id(self))
        return base.__call__(self, *args, **kwargs) if run is None else run(*args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # A copy, and what is unpickled, is no pipeline of the block: it has the class that can be found by its name.
        reduce: Any = base.__reduce_ex__
        _, _, *rest = reduce(self, max(2, protocol))
        return copyreg._reconstructor, (base, object, None), *rest  # type: ignore[attr-defined]

    body = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_backdrift_base": base,
    }
    return type(base.__name__, (base,), body)
