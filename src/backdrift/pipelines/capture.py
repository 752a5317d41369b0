"""A pipeline's own sampling loop as a row of hosts for guidance: its network calls and its scheduler's steps, heard.

The loop belongs to the pipeline and is not taken apart. Hooks on its networks take down each call of a step; the
scheduler's class is exchanged for one of the same name, whose ``step`` asks here first. :meth:`Capture.detach` takes
both away again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .. import nests
from ..errors import InputError, UnsupportedError
from .captured import CapturedHost, Given
from .clone import clone_of
from .decoding import Decoder
from .forwards import check_networks
from .frozen import Frozen
from .levels import Levels, levels_of, position_of
from .recorded import Recorded
from .refusals import check_components
from .shadow import shadow, unwrapped
from .states import caches_of, check_states
from .stepped import KEY as _KEY
from .stepped import Stepping
from .stepping import _is_denoiser, listened

__all__ = ["Capture"]

Take = Callable[[CapturedHost], Tensor]
Opening = Callable[[Tensor, Callable[[Tensor], Tensor], int | None], object]


class Capture:
    """Listens to one pipeline object until it is detached; a context manager.

    Args:
        pipe: a diffusers pipeline with one scheduler. Its networks and its scheduler are listened to; nothing else of
            it is changed.
        take: gives the next state of each step, (B, …), in the scheduler's place. None to leave the loop as it is, and
            use :attr:`last`.
        decode: pictures (B, 3, H, W) in [0, 1] of clean latents, in place of the pipeline's own decoder.
        prompts: one per sample.
        done: how many steps of the present run are over already, for a capture that begins in the middle.
        opening: called once, before the pipeline's first network call, with latents of its shape (as the network sees
            them, perhaps twice), the way from clean ones to pictures, and how many steps the pipeline says it will take
            (None where it does not).
        networks: makes frozen copies of the networks, where ``pipe`` is a copy of another pipeline; then it has been
            checked.

    Attributes:
        pipe: the pipeline.
        last: the host of the last step; of use in ``callback_on_step_end``. What its step leads to is what the
            scheduler remembers from then on.
        prompts: as given; may be changed at any time.
        owner: who made it, if that was said; not kept alive.

    Raises:
        UnsupportedError: the pipeline has no such scheduler or networks, or hooks or attention processors through which
            no gradient passes.
        InputError: it is listened to already.
    """

    def __init__(
        self,
        pipe: Any,
        take: Take | None = None,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        prompts: list[str] | None = None,
        done: int = 0,
        opening: Opening | None = None,
        networks: Frozen | None = None,
    ) -> None:
        if networks is None:
            _check(pipe)
        own = vars(pipe)
        self._denoisers = {name: value for name, value in own.items() if _listens(value)}
        scheduler = own.get("scheduler")
        if scheduler is None or not hasattr(scheduler, "step") or not self._denoisers:
            what = (
                "no network that takes a timestep"
                if scheduler is not None
                else "no scheduler of diffusers' kind"
            )
            raise UnsupportedError(f"{type(pipe).__name__} has {what}, so its steps cannot be guided")
        if _KEY in vars(scheduler) or "step" in vars(scheduler):
            raise InputError("this pipeline's scheduler is listened to already: detach that first")
        self.pipe, self.take, self.prompts = pipe, take, prompts
        self.last: CapturedHost | None = None
        self._owner: weakref.ref[Any] | None = None
        self._scheduler, self._done, self._opening = scheduler, done, opening
        self._frozen = Frozen(pipe) if networks is None else networks
        self._decoder = Decoder(pipe, decode, networks=self._frozen)
        self._thread, self._busy = threading.get_ident(), False
        self._calls: list[Recorded] = []
        self._pending: dict[str, tuple[Any, Any]] = {}
        self._levels: Levels | None = None
        self._timesteps: Any = None  # of the run that the levels belong to
        self._first = self._position = -1
        me = weakref.ref(self)  # the pipeline must not keep it alive
        handles = []
        for name, module in self._denoisers.items():
            handles.append(module.register_forward_pre_hook(_before(me, name), with_kwargs=True))
            handles.append(module.register_forward_hook(_after(me, name), with_kwargs=True))
        base: Any = type(scheduler)
        scheduler.__dict__[_KEY] = _Link(me)
        scheduler.__class__ = listened(base, _KEY)
        offloading = self._frozen.offloading
        leave = offloading.leave if networks is None else offloading.close
        self._finalizer = weakref.finalize(self, _restore, handles, scheduler, base, leave)

    @classmethod
    def of_clone(cls, pipe: Any, take: Take | None = None, **options: Any) -> Capture:
        """Listen to a copy of a pipeline on the same weights: ``capture.pipe`` is the one to call.

        Threads that do so do not disturb each other. The copy's call is under no ``torch.no_grad`` of its own.

        The copy of an offloaded pipeline has no hooks, and its networks' weights come and go all the same.

        Raises:
            UnsupportedError: as above.
        """
        _check(pipe)
        networks = Frozen(pipe)

        def dressed(name: str, module: nn.Module) -> nn.Module:
            if networks.comes_and_goes(name):  # of a network whose weights come and go no shadow can be made
                networks.make_of(name, shadow(module, set()))
            return networks.offloading.dressed(name, module)

        clone = clone_of(pipe, set(), dressed)
        networks.offloading.place(clone)
        vars(clone).pop("_num_timesteps", None)  # of an older call
        _forget(clone)
        return cls(clone, take, networks=networks, **options)

    @staticmethod
    def on(pipe: Any) -> Capture | None:
        """Who listens to a pipeline."""
        link = vars(getattr(pipe, "scheduler", None) or object).get(_KEY)
        return None if link is None else link.capture()

    @property
    def owner(self) -> Any:
        return None if self._owner is None else self._owner()

    @owner.setter
    def owner(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)

    def detach(self) -> None:
        """Leave the pipeline as it was before. May be called twice."""
        self._finalizer()
        self._calls, self._pending = [], {}
        self._frozen.forget()

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- the networks ---------------------------------------------------------------------------------------------

    def before(self, name: str, args: Any, kwargs: Any) -> None:
        """A network is about to be called."""
        if self._hears():
            # Lists and dictionaries are copied: some networks take elements out of them.
            self._pending[name] = nests.transform(lambda tensor: tensor, (args, kwargs))
            if self._opening is not None:
                opening, self._opening = self._opening, None
                coming = Recorded(name, self._denoisers[name], *self._pending[name], None)
                count = vars(self.pipe).get("_num_timesteps")
                levels_of(self._scheduler)  # a scheduler that is not known is refused now
                with self._asleep():
                    opening(
                        self._decoder.state_in(coming),
                        self._decoder.of([coming]),
                        count if isinstance(count, int) else None,
                    )

    def after(self, name: str, output: Any) -> None:
        """It has returned."""
        if self._hears() and name in self._pending:
            args, kwargs = self._pending.pop(name)
            self._calls.append(Recorded(name, self._denoisers[name], args, kwargs, output))

    def _hears(self) -> bool:
        return not self._busy and threading.get_ident() == self._thread

    @contextmanager
    def _asleep(self) -> Iterator[None]:
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before

    def _copy(self, call: Recorded) -> nn.Module:
        """The frozen copy of a network, made anew in each run: adapters and weights may be others.

        Raises:
            UnsupportedError: the network has hooks of diffusers'.
        """
        hook = next(caches_of(unwrapped(call.module)), None)
        if hook is not None:
            raise UnsupportedError(
                f"{call.name} has the hook {hook}. Caches keep one call's results for the next, and guidance makes "
                f"calls of its own between them. Take it off: pipe.{call.name}.disable_cache()"
            )
        ours = self._frozen.of(call.name, call.module)
        _unhook(ours)
        return ours

    # -- the scheduler --------------------------------------------------------------------------------------------

    def step(self, scheduler: Any, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of the scheduler's ``step``."""
        if not self._hears():
            return fn(*args, **kwargs)
        if scheduler is not self._scheduler:
            raise UnsupportedError(
                f"{type(self.pipe).__name__} steps with a copy of its scheduler too, so its steps cannot be guided"
            )
        stepping = Stepping(scheduler, fn, args, kwargs)
        host = self._host(scheduler, stepping)
        if self.take is None:
            out = fn(*args, **kwargs)
            self.last = host
            return out
        self.last = host
        state = self.take(host)
        return stepping.with_state(state)

    def _host(self, scheduler: Any, stepping: Stepping) -> CapturedHost:
        calls, self._calls = self._calls, []
        position = position_of(scheduler, stepping.timestep)
        if scheduler.timesteps is not self._timesteps or position <= self._position or self._levels is None:
            self._levels, self._timesteps = levels_of(scheduler), scheduler.timesteps
            self._first, self._done = position - self._done, 0
            self._frozen.forget()
        self._position = position
        count = vars(self.pipe).get("_num_timesteps")  # fewer than the scheduler's where a run ends early
        rest = len(self._levels) - self._first
        total = min(rest, count) if isinstance(count, int) and count > position - self._first else rest
        given = Given(
            self.pipe,
            calls,
            self._levels,
            position,
            stepping.sample,
            stepping.output,
            stepping.again,
            stepping.renew,
            self._copy,
            self._decoder.of(calls),
            self._asleep,
        )
        return CapturedHost(given, position - self._first, total, self.prompts)


class _Link:
    """A scheduler's way to its capture; copies of the scheduler share it."""

    def __init__(self, capture: Callable[[], Capture | None]) -> None:
        self.capture = capture

    def step(self, scheduler: Any, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of the scheduler's ``step``."""
        capture = self.capture()
        return fn(*args, **kwargs) if capture is None else capture.step(scheduler, fn, args, kwargs)

    def __deepcopy__(self, memo: Any) -> _Link:
        return self


def _check(pipe: Any) -> None:
    check_components(pipe)
    check_networks(pipe)
    check_states(pipe)


def _listens(value: Any) -> bool:
    return isinstance(value, nn.Module) and _is_denoiser(unwrapped(value))


def _before(capture: Callable[[], Capture | None], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        if (own := capture()) is not None:
            own.before(name, args, kwargs)

    setattr(hook, _KEY, True)
    return hook


def _after(capture: Callable[[], Capture | None], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (own := capture()) is not None:
            own.after(name, output)

    setattr(hook, _KEY, True)
    return hook


def _forget(clone: Any) -> None:
    """Take from a pipeline's copy what it has of a capture that listens to the pipeline."""
    scheduler: Any = vars(clone).get("scheduler")
    if vars(scheduler or object).get(_KEY) is not None:
        _restore([], scheduler, type(scheduler).__bases__[0], lambda: None)
    for module in vars(clone).values():
        if isinstance(module, nn.Module):
            _unhook(module)


def _unhook(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hasattr(hook, _KEY)]:
            del hooks[key]


def _restore(handles: list[Any], scheduler: Any, base: Any, leave: Callable[[], None]) -> None:
    leave()
    for handle in handles:
        handle.remove()
    scheduler.__dict__.pop(_KEY, None)
    if type(scheduler) is listened(base, _KEY):
        scheduler.__class__ = base
