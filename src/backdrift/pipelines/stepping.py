"""The steps of a pipeline's own sampling loop, seen from its networks and its scheduler.

A pipeline's loop belongs to the pipeline: it is not taken apart, only listened to. A *step* is what the pipeline does
between two returns of ``scheduler.step``: the calls of its denoising networks (guidance halves, control networks, a
second network for the low noise levels), the arithmetic around them, and the scheduler's step that ends it. Schedulers
that call more often than they step (Heun, KDPM2, DPM-SDE: two calls; PNDM: four in a Runge–Kutta step, two in its first
linear multistep) have all calls of one such step together, so a run has as many steps as its progress bar shows.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingGradientError, UnsupportedError
from ..stats import RunStats
from ..through import Chosen, Through
from ..trace import Watch

_KEY = "_backdrift_loop"
_NOISES = ("latents", "noise")  # arguments that are the state at the start, and nothing else


class Loop:
    """One call of a pipeline, which steps carry the gradient in it, and where it is now.

    Args:
        through: the choice of steps.
        draw: the number of the draw, for ``Random``.
        inputs: names of the call's arguments that require grad.
        watch: measures, discounts and clips the gradient; None where none will be taken.
        stats: network calls without a graph are counted here.

    Attributes:
        chosen: the steps; None until the loop begins, and where nothing has to be chosen and the length is unknown.
    """

    def __init__(
        self,
        through: Through,
        *,
        draw: int = 0,
        inputs: tuple[str, ...] = (),
        watch: Watch | None = None,
        stats: RunStats | None = None,
    ) -> None:
        self.through, self.inputs, self.watch, self.stats = through, inputs, watch, stats
        self.draw = draw
        self.chosen: Chosen | None = None
        # Weakly: the pipeline's networks and scheduler lead here, and what they hold must go when the call is over.
        self._clone: Callable[[], Any] = lambda: None
        self._scheduler: Callable[[], Any] = lambda: None
        self._steps: list[int] = []  # of each pass through the loop, its step
        self._passes = 0
        self._begun = self._inside = False
        self._names: list[str] = []  # the parameters of the scheduler's step
        self._graded: dict[str, bool] = {}  # networks that were called, and whether with a graph

    def attach(self, clone: Any) -> None:
        """Listen to a pipeline of the run's own: its networks and its scheduler are changed.

        Raises:
            UnsupportedError: not every step carries the gradient, and the pipeline's loop cannot be followed.
        """
        own, self._clone = clone.__dict__, weakref.ref(clone)
        denoisers = [name for name, value in own.items() if _is_denoiser(value)]
        schedulers = [k for k, v in own.items() if k.endswith("scheduler") and hasattr(v, "step")]
        if not self.through.exact and (schedulers != ["scheduler"] or not denoisers):
            what = (
                "no network that takes a timestep"
                if not denoisers
                else f"the schedulers {', '.join(schedulers)}"
                if schedulers
                else "no scheduler of diffusers' kind"
            )
            raise UnsupportedError(
                f"{type(clone).__name__} has {what}, so its steps cannot be told apart: use through=All()"
            )
        own.pop("_num_timesteps", None)  # of the user's last call
        if not self.through.exact:
            for name in denoisers:
                first = _parameters(type(own[name]).forward)[0]
                own[name].forward = self._listening(name, own[name].forward, first)
        if "scheduler" in schedulers:
            self._scheduler = weakref.ref(own["scheduler"])
            self._listen_to(own["scheduler"])

    def finish(self, trained: tuple[str, ...]) -> None:
        """See, after the call, that it went as expected.

        Raises:
            UnsupportedError: the loop was of another length.
            MissingGradientError: a network with trained weights was never called in a step that carries the gradient.
        """
        if self.through.exact or not self._begun:
            return
        if self._passes != len(self._steps):
            raise UnsupportedError(
                f"the pipeline's loop called its scheduler {self._passes} times, and {len(self._steps)} were expected, "
                "so which steps carried the gradient is not what was asked for: use through=All()"
            )
        for name, graded in self._graded.items():
            if not graded and any(weight.startswith(f"{name}.") for weight in trained):
                raise MissingGradientError(
                    f"weights of {name} are trained, but {name} is not called in the steps that carry the gradient "
                    f"({self._shown()}): choose others, or train another network"
                )

    # -- the networks ---------------------------------------------------------------------------------------------

    def _listening(self, name: str, forward: Callable[..., Any], first: str) -> Callable[..., Any]:
        """A network's ``forward``, whose input latents are the parameter ``first``."""

        @wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._inside or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if not self._carries():
                self._graded.setdefault(name, False)
                if self.stats is not None:
                    self.stats.calls_forward += 1
                with self._entered(), without_graph():
                    return forward(*args, **kwargs)
            self._graded[name] = True
            if args and isinstance(args[0], Tensor):
                args = (self.through.input_of(args[0]), *args[1:])
            elif isinstance(kwargs.get(first), Tensor):
                kwargs[first] = self.through.input_of(kwargs[first])
            with self._entered():
                return forward(*args, **kwargs)

        return called

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    # -- the scheduler --------------------------------------------------------------------------------------------

    def _listen_to(self, scheduler: Any) -> None:
        if "step" in scheduler.__dict__:
            scheduler.step = _followed(scheduler.step, lambda: self)
            return
        # By its class and not by an attribute: pipelines that copy their scheduler copy its attributes.
        scheduler.__dict__[_KEY] = self
        cls: Any = type(scheduler)
        scheduler.__class__ = listened(cls, _KEY)

    def __deepcopy__(self, memo: Any) -> Loop:
        return self

    def step(self, scheduler: Any, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of the scheduler's ``step``."""
        if not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        if scheduler is not None and scheduler is not self._scheduler():
            if self.through.exact:
                return fn(*args, **kwargs)
            raise UnsupportedError(
                "the pipeline steps with a copy of its scheduler too, so its steps cannot be told apart: use "
                "through=All()"
            )
        self._begin()
        if not self._names:
            self._names = _parameters(fn)
        names = self._names
        output, sample = (_argument(names, name, args, kwargs) for name in ("model_output", "sample"))
        number, carries = self._passes, self._carries()
        step = self._steps[number] if number < len(self._steps) else number
        if self.watch is not None and number == 0 and isinstance(sample, Tensor):
            self.watch.boundary(0, sample)
        if not carries and isinstance(output, Tensor):
            args, kwargs = _with_argument(names, "model_output", output.detach(), args, kwargs)
        if carries and self.watch is not None and isinstance(output, Tensor):
            self.watch.output(step, output, number)
        cut = self.chosen is not None and step < self.chosen.cut
        with torch.no_grad() if cut else nullcontext():
            out = fn(*args, **kwargs)
        self._passes += 1
        ends = self._passes >= len(self._steps) or self._steps[self._passes] != step
        state = _state_of(out)
        if ends and self.watch is not None and state is not None:
            self.watch.boundary(step + 1, state)
            self.watch.trace.total = max(self.watch.trace.total, step + 1)
        return out

    # -- the steps ------------------------------------------------------------------------------------------------

    def _carries(self) -> bool:
        self._begin()
        if self.through.exact or self.chosen is None:
            return True
        if self._passes >= len(self._steps):  # behind the loop
            return True
        return self._steps[self._passes] in self.chosen.steps

    def _begin(self) -> None:
        """Before the first call of the loop: how many steps it has, and which are chosen.

        Raises:
            InputError: a step is asked for that the run does not have.
            MissingGradientError: a gradient is asked for that the choice cuts off.
        """
        if self._begun:
            return
        self._begun = True
        self._steps = self._expected()
        total = self._steps[-1] + 1 if self._steps else 0
        if self.through.exact:
            self.chosen = Chosen(total, tuple(range(total))) if total else None
        else:
            if not total:
                raise UnsupportedError(
                    f"{type(self._scheduler()).__name__} does not say how many steps it has: use through=All()"
                )
            self.chosen = self.through.choose(total, self.draw)
            self._check_inputs(self.chosen)
        if self.watch is not None:
            self.watch.begin(self.chosen)

    def _expected(self) -> list[int]:
        """The step of each pass that the loop will make."""
        scheduler, count = self._scheduler(), vars(self._clone()).get("_num_timesteps")
        if not isinstance(count, int):
            times = getattr(scheduler, "timesteps", None)
            if times is None:
                return []
            count = len(times) - (getattr(scheduler, "begin_index", None) or 0)
        return steps_of_passes(scheduler, count)

    def _check_inputs(self, chosen: Chosen) -> None:
        lost = [name for name in self.inputs if name in _NOISES]
        if chosen.cut and lost:
            raise MissingGradientError(
                f"{lost[0]} requires grad, but through={self.through.spec!r} cuts the state where step {chosen.cut} of "
                f"{chosen.total} begins, so no gradient would reach it: Steps(range({chosen.cut}, {chosen.total})) "
                "keeps the state's path, All() everything; or pass it detached"
            )

    def _shown(self) -> str:
        assert self.chosen is not None
        return f"{', '.join(map(str, self.chosen.steps))} of {self.chosen.total}"


def steps_of_passes(scheduler: Any, passes: int) -> list[int]:
    """To which step each of ``passes`` passes through a pipeline's loop belongs."""
    if hasattr(scheduler, "step_plms"):  # PNDM
        runge_kutta = 0
        if not getattr(getattr(scheduler, "config", None), "skip_prk_steps", True):
            runge_kutta = min(len(scheduler.prk_timesteps), passes)
        found = [i // 4 for i in range(runge_kutta)]
        if runge_kutta == 0 and passes > 1:
            found = [0, 0]  # the second pass does the first one's step again, with both outputs' mean
        while len(found) < passes:
            found.append(found[-1] + 1 if found else 0)
        return found
    order = getattr(scheduler, "order", 1) or 1
    return [i // order for i in range(passes)]


@contextmanager
def without_graph() -> Iterator[None]:
    """``torch.no_grad`` whose casts autocast does not keep: a later call would find them, and lose its weights."""
    cache_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cache_enabled)


@cache
def listened(base: Any, key: str) -> Any:
    """A subclass of a scheduler's class, by the same name, whose steps a listener takes.

    It is what the scheduler holds under ``key``: ``listener.step(scheduler, step, args, kwargs)``.
    """

    @wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        listener = self.__dict__.get(key)
        fn = base.step.__get__(self)
        return fn(*args, **kwargs) if listener is None else listener.step(self, fn, args, kwargs)

    body = {
        "step": step,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), body)


def _followed(fn: Callable[..., Any], loop: Callable[[], Loop]) -> Callable[..., Any]:
    @wraps(fn)
    def step(*args: Any, **kwargs: Any) -> Any:
        return loop().step(None, fn, args, kwargs)

    return step


def _is_denoiser(value: Any) -> bool:
    """Whether a component is called in the loop: a network that takes a timestep, and no autoencoder."""
    if not isinstance(value, nn.Module) or hasattr(value, "decode") or hasattr(value, "encode"):
        return False
    return any(name.startswith("timestep") for name in _parameters(type(value).forward))


def _parameters(fn: Any) -> list[str]:
    return [name for name in inspect.signature(fn).parameters if name != "self"]


def _argument(names: list[str], name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def _with_argument(names: list[str], name: str, value: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    if name in kwargs:
        return args, {**kwargs, name: value}
    at = names.index(name)
    return (*args[:at], value, *args[at + 1 :]), kwargs


def _state_of(out: Any) -> Tensor | None:
    state = out[0] if isinstance(out, tuple) and out else getattr(out, "prev_sample", None)
    return state if isinstance(state, Tensor) else None
