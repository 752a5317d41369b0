"""A pipeline's own loop run once without its networks: which calls it makes, on what, and what it holds between them.

The networks stand on the meta device, where each kind of call is measured once, and answer with zeros. What the
pipeline computes itself, on tensors the size of latents, it really computes, on the CPU, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from .. import blocks
from ..blocks import Level
from ..errors import BackdriftError, UnsupportedError
from ..planning.count import Count
from ..planning.job import Component, Job, Kind, Moment, Role
from ..planning.meta import like, set_dtypes, storage_bytes, to_meta, weights_of
from ..planning.profile import Guests, Profile, profile
from ..residence import Residence, layers
from ..through import All, Through
from .calls import PipelineCall
from .clone import clone_of
from .draws import Noise, drawing
from .endings import Ending, ending_of
from .homes import homes_of, way_of
from .outputs import first_tensor
from .quantised import stand_ins
from .refusals import plain_class
from .shadow import Train, networks, trained_parameters
from .stand_in import alike, answer, meta_leaves, rows, stand_in_call, template, tiling, zeros_like
from .stepping import Loop
from .targets import with_targets

__all__ = ["rehearse"]

_HERE = property(lambda self: torch.device("cpu"))


class Rehearsal(NamedTuple):
    """What :func:`rehearse` returns.

    Attributes:
        job: without a loss.
        pictures: on the meta device, as the pipeline returns them; None if it returns no tensor.
    """

    job: Job
    pictures: torch.Tensor | None


def role_of(name: str, module: nn.Module) -> Role:
    """What a component's calls count as."""
    if hasattr(module, "decode") or hasattr(module, "encode"):
        return "decoder"
    if "encoder" in name or name in ("safety_checker", "image_projection"):
        return "other"
    return "network"


def rehearse(
    pipe: Any,
    args: Any,
    kwargs: Any,
    train: Train = None,
    *,
    clamp: bool = False,
    noise: torch.Tensor | None = None,
    through: Through = All(),  # noqa: B008
) -> Rehearsal:
    """The job that ``pipe(*args, **kwargs)`` and a backward pass from its pictures are.

    Args:
        pipe: a diffusers pipeline; its networks may be on the meta device.
        args, kwargs: of its call. Large tensors are replaced by zeros, generators by new ones.
        train, clamp, noise, through: as in :func:`~backdrift.differentiable`.

    Returns:
        The job, without a loss, and the shape of its pictures.

    Raises:
        UnsupportedError: the pipeline's loop cannot be run this way; says where it stopped.
    """
    cls = plain_class(type(pipe))
    ending = ending_of(cls, clamp)
    stage = _Stage(pipe, train, clamp, ending, noise, through)
    call = PipelineCall.of(pipe, args, kwargs, ending.output_type if ending is not None else "pt")
    try:
        return stage.play(call)
    except BackdriftError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{cls.__name__} cannot be planned: its loop, run without networks, stopped with "
            f"{type(error).__name__}: {error}"
        ) from error


class _Stage:
    """One rehearsal.

    Attributes:
        count: bytes that the pipeline's own arithmetic holds.
    """

    def __init__(
        self,
        pipe: Any,
        train: Train,
        clamp: bool,
        ending: Ending | None,
        noise: torch.Tensor | None,
        through: Through,
    ) -> None:
        self.pipe, self.clamp, self.ending, self.through = pipe, clamp, ending, through
        self.given_noise = noise
        self.trained = {id(p): p.nbytes for p in trained_parameters(pipe, train).values()}
        self.ways = {name: way_of(module) for name, module in networks(pipe).items()}
        self.count = Count()
        self.inside = False
        self.kinds: dict[Any, tuple[Kind, Any]] = {}
        self.calls: list[Kind] = []
        self.owned: list[dict[int, int]] = []  # per call, the storages of its arguments
        self.addresses: list[StorageWeakRef] = []
        self.forward: list[Moment] = []
        self.backward: list[Moment] = []

    def play(self, call: PipelineCall) -> Rehearsal:
        with torch.enable_grad(), self.count:
            noise = None if self.given_noise is None else Noise(zeros_like(self.given_noise))
            self.count.paused = True  # weights are counted by component
            clone = self._clone(noise)
            self.count.paused = False
            stand_in_call(call)
            with_targets(call)
            with drawing(noise), nullcontext() if self.ending is None else self.ending:
                out = call.run(clone)
            result = first_tensor(out if self.ending is None else self.ending.in_place_of_arrays(out))
            self.count.settle()
            pictures = self.count.peak
            self.count.reset_peak()
            del out, clone, noise
            call.bound.arguments.clear()
            if result is not None and result.requires_grad:
                result.sum().backward()
        job = Job(
            name=plain_class(type(self.pipe)).__name__,
            components=self._components(),
            calls=tuple(self.calls),
            forward=tuple(self.forward),
            backward=tuple(self.backward),
            pictures=pictures,
            own=self._own(),
        )
        self.addresses.clear()
        self.pipe = (
            None  # the job measures kinds of calls on this stage when asked, and may outlive the pipeline
        )
        return Rehearsal(job, None if result is None else like(result.detach()))

    def _clone(self, noise: Noise | None) -> Any:
        clone = clone_of(self.pipe, set(self.trained), self._on_stage, clamp=self.clamp, noise=noise)
        clone.__class__ = _on_the_cpu(
            type(clone), _execution_device=_HERE, maybe_free_model_hooks=lambda self: None
        )
        own = clone.__dict__
        if own.get("safety_checker") is not None:
            own["safety_checker"] = None
        own["_progress_bar_config"] = {"disable": True}
        if not self.through.exact:
            Loop(self.through).attach(clone)
        return clone

    def _on_stage(self, name: str, module: nn.Module) -> nn.Module:
        stand_ins(module)
        role = role_of(name, to_meta(module))
        way = self.ways.get(name)
        stays = way is None and any(self.ways.values())
        residence = Residence(module, role, Guests(), [] if stays else layers(module))
        methods = ["forward", *(m for m in ("encode", "decode") if role == "decoder" and hasattr(module, m))]
        for method in methods:
            called = self._stand_in(name, module, method, role, residence)
            setattr(module, method, called if self.ending is None else self.ending.asleep(called))
        module.__class__ = _on_the_cpu(type(module))
        return module

    def _stand_in(
        self, name: str, module: nn.Module, method: str, role: Role, residence: Residence
    ) -> Callable[..., Any]:
        fn, weights = residence.around(getattr(module, method)), weights_of(module)
        full = [t.dtype for t in weights]

        def called(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # a call within a call is part of it
                return fn(*args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            moment = self._moment(len(self.calls))
            self.forward.append(moment)
            self.count.paused = self.inside = True
            try:
                converted = sum(t.nbytes for t, dtype in zip(weights, full, strict=True) if t.dtype != dtype)
                # A spec's text: specs of torch before 2.5 cannot be hashed.
                key = (name, method, repr(spec), torch.is_grad_enabled(), converted, *map(alike, leaves))
                if key not in self.kinds:
                    self.kinds[key] = self._measured(
                        name, module, fn, (leaves, spec), role, converted, residence
                    )
            finally:
                self.count.paused = self.inside = False
            kind, shape = self.kinds[key]
            self.calls.append(kind)
            tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
            self.owned.append({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors})
            # A weak reference keeps the address from being reused for another call's arguments.
            self.addresses += [StorageWeakRef(t.untyped_storage()) for t in tensors]
            return answer(shape, tensors, lambda: self.backward.append(self._moment(moment.call)))

        return called

    def _measured(
        self,
        name: str,
        module: nn.Module,
        fn: Callable[..., Any],
        arguments: tuple[list[Any], Any],
        role: Role,
        converted: int,
        residence: Residence,
    ) -> tuple[Kind, Any]:
        """A kind of calls, measured, and what it returns."""
        leaves, spec = arguments
        templates: list[Any] = []
        weights, graded = weights_of(module), torch.is_grad_enabled()
        now = [t.dtype for t in weights]
        example = meta_leaves(leaves)

        def measure(level: Level, tiled: bool) -> Profile:
            fresh = meta_leaves(example)
            args, kwargs = pytree.tree_unflatten(fresh, spec)
            gradient = [x for x in [*fresh, *module.parameters()] if isinstance(x, torch.Tensor)]
            before, inside = [t.dtype for t in weights], self.inside
            set_dtypes(weights, now)
            self.inside = True
            try:
                with (
                    blocks.installed(module, level, residence),
                    tiling(module, tiled, residence),
                    torch.set_grad_enabled(graded),
                ):
                    return profile(
                        lambda: fn(*args, **kwargs),
                        gradient,
                        lambda out: templates.append(template(out)),
                        residence.turns,  # type: ignore[arg-type]
                    )
            finally:
                self.inside = inside
                set_dtypes(weights, before)

        first = measure("whole", False)
        kind = Kind(
            name, role, rows(example, templates[0]), converted, measure, hasattr(module, "use_tiling")
        )
        kind.known["whole", False] = first
        return kind, templates[0]

    def _moment(self, call: int) -> Moment:
        self.count.settle()
        moment = Moment(call, self.count.peak, self.count.live)
        self.count.reset_peak()
        return moment

    def _components(self) -> tuple[Component, ...]:
        """Every part with weights, the safety checker too, which is not on stage."""
        found = []
        offloaded = any(self.ways.values())
        for name, value in vars(self.pipe).items():
            module = getattr(value, "_orig_mod", value)
            if isinstance(module, nn.Module):
                homes = homes_of(module)
                weights = {id(t): t for t in (homes.get(id(t), t) for t in weights_of(module))}
                trained = sum(self.trained.get(key, 0) for key in weights)
                stays = offloaded and way_of(module) is None
                found.append(Component(name, storage_bytes(weights.values()), trained, stays))
        return tuple(found)

    def _own(self) -> tuple[int, ...]:
        """Per call that a backward pass comes to, bytes of arguments that no other call has too."""
        reached = {moment.call for moment in self.backward}
        users: dict[int, int] = {}
        for storages in self.owned:
            for key in storages:
                users[key] = users.get(key, 0) + 1
        return tuple(
            sum(n for key, n in storages.items() if users[key] == 1) if i in reached else 0
            for i, storages in enumerate(self.owned)
        )


def _on_the_cpu(cls: Any, **more: Any) -> Any:
    """A subclass by the same name that says its device is the CPU."""
    return type(cls.__name__, (cls,), {"device": _HERE, "__module__": cls.__module__, **more})
