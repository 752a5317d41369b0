"""The object that users hold: a rule, a loss, and when they act."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..gradients import Job
from ..host import Host
from ..losses import resolve
from .attempt import Attempt, Rule, plain
from .estimate import Estimator
from .scoring import Scoring
from .streams import Streams
from .trace import Entry, GuidanceTrace
from .travel import renoised
from .when import Repeats, When

if TYPE_CHECKING:
    from .listening import Listener

Losses = str | Callable[..., Tensor] | Mapping[Any, float] | Sequence[tuple[float, Any]]


class Guidance:
    """A rule of guidance with its loss, its steps and its noise; one run at a time.

    Args:
        rule: the state after a step, from an :class:`~backdrift.guidance.attempt.Attempt`. It may have ``begin()``,
            called before each run; ``check(guided, total)``, which raises where it cannot act on guided steps; and
            ``fits(batch)``, which raises where it is for another number of samples.
        loss, start, stop, steps, repeats, maximize, seed, decode, decode_chunk_size, callback, strip, prompts: as in
            :class:`~backdrift.SymplecticAdjointGuidance`.
        estimator: how clean samples are estimated; in one Euler step, exactly differentiated, unless told otherwise.

    Attributes:
        trace: what was done in the last run.
    """

    #: What diffusers' ``MultiPipelineCallbacks`` asks its callbacks for.
    tensor_inputs = ("latents",)

    def __init__(
        self,
        rule: Rule,
        loss: Losses,
        *,
        estimator: Estimator | None = None,
        start: float = 0.3,
        stop: float = 0.7,
        steps: Sequence[int] | Sequence[bool] | None = None,
        repeats: Repeats = 1,
        maximize: bool = False,
        seed: int | Sequence[int] = 0,
        decode: Callable[[Tensor], Tensor] | None = None,
        decode_chunk_size: int | None = None,
        callback: Callable[[Entry], Any] | None = None,
        strip: bool | int = False,
        prompts: str | Sequence[str] | None = None,
    ) -> None:
        self.rule, self.loss = rule, resolve(loss)
        self.when = When.of(start, stop, steps, repeats)
        self.estimator = estimator or Estimator()
        if not isinstance(maximize, bool):
            raise InputError(f"maximize is True or False; got {maximize!r}")
        for name, value in (("decode", decode), ("callback", callback)):
            if value is not None and not callable(value):
                raise InputError(f"{name} must be callable; got {type(value).__name__}")
        self.scoring = Scoring(
            self.loss,
            maximize,
            decode,
            _size("strip", {True: 128, False: 0}[strip] if isinstance(strip, bool) else strip, 0),
            _texts(prompts),
            None if decode_chunk_size is None else _size("decode_chunk_size", decode_chunk_size, 1),
        )
        self.seed, self.callback = seed, callback
        self.trace = GuidanceTrace()
        self.listener: Listener | None = None
        self._streams = Streams(seed)
        self._guided: frozenset[int] = frozenset()
        self._attempts: list[int] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.loss.spec!r}, {self.rule!r}, {self.when!r})"

    def check(self, total: int, batch: int | None = None) -> None:
        """Raise what can be known of a run of ``total`` steps on ``batch`` samples before it begins.

        Raises:
            InputError: a guided step is out of range, the estimate asks for more steps than are left, or there are not
                as many seeds, prompts or strengths as samples.
        """
        guided = self.when.guided(total)
        self.when.attempts(total)
        check = getattr(self.rule, "check", None)
        if check is not None:
            check(guided, total)
        if batch is None:
            return
        Streams(self.seed).check(batch)
        self.scoring.check(batch)
        fits = getattr(self.rule, "fits", None)
        if fits is not None:
            fits(batch)

    def begin(self, total: int, batch: int) -> None:
        """A run of ``total`` steps on ``batch`` samples begins: a new trace, the noise from its start.

        Raises:
            InputError: as :meth:`check`.
        """
        self.check(total, batch)
        self._guided, self._attempts = frozenset(self.when.guided(total)), self.when.attempts(total)
        self._streams = Streams(self.seed)
        self.trace = GuidanceTrace(total)
        begin = getattr(self.rule, "begin", None)
        if begin is not None:
            begin()

    def rehearse(self, x0: Tensor, decode: Callable[[Tensor], Tensor], prompts: list[str] | None) -> None:
        """Find out before sampling whether the loss can be used: one decoding.

        Args:
            x0: any samples of the run's shape, (B, …), of about unit variance.
            decode: the host's.

        Raises:
            InputError: the loss has the wrong shape, or does not depend on the picture.
        """
        self.scoring.rehearse(x0, decode, prompts)

    def __call__(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """A pipeline's ``callback_on_step_end``: ``pipe(prompt, callback_on_step_end=guidance)``.

        The pipeline's first step cannot be guided so, and what is wrong is found out after it; inside
        :meth:`listening` and with :func:`backdrift.guide` neither holds.

        Raises:
            InputError: the guidance does not fit the run.
            UnsupportedError: the pipeline's steps cannot be taken again.
        """
        from .listening import called_back  # knows this class

        return called_back(self, pipe, step, callback_kwargs)

    def listening(self, pipe: Any) -> AbstractContextManager[Guidance]:
        """A block in which one call of ``pipe`` with this callback is heard, and may be guided, from its first step
        on."""
        from .listening import listening  # knows this class

        return listening(self, pipe)

    def acts(self, index: int) -> bool:
        """Whether a step of the present run is anything else than the sampler's own."""
        return index in self._guided or self._attempts[index] > 1

    def states(self, job: Job) -> Iterator[Tensor]:
        """The states of a guided run of :func:`backdrift.sample`, after the first."""
        from .sampled import states  # knows this class

        return states(job, self)

    def advance(self, host: Host) -> Tensor:
        """The state after one step of a host: its own step, guided and repeated where that is asked for."""
        guided = host.index in self._guided
        x, following = host.x, host.x
        for number in range(self._attempts[host.index]):
            if number:
                host.renew()
                x = renoised(following, host.end, host.start, self._streams.like(following))
            following = self._attempt(host, x, number, guided)
        return following

    def _attempt(self, host: Host, x: Tensor, number: int, guided: bool) -> Tensor:
        begun, before = time.perf_counter(), host.calls if number else 0
        entry = Entry(host.index, number)
        attempt = Attempt(host, x, self.estimator, self.scoring, self._streams.like, entry)
        with torch.no_grad():
            following = (self.rule if guided else plain)(attempt).detach()
        entry.calls.forward += host.calls - before
        entry.seconds = time.perf_counter() - begun
        if not guided:
            self.trace.plain_calls += entry.calls.forward
            return following
        self.trace.entries.append(entry)
        if self.callback is not None:
            self.callback(entry)
        return following


def _size(name: str, value: Any, least: int) -> int:
    """A whole number.

    Raises:
        InputError: it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}; got {value!r}")
    return value


def _texts(prompts: str | Sequence[str] | None) -> list[str] | None:
    """Prompts as a list.

    Raises:
        InputError: they are no texts.
    """
    if prompts is None:
        return None
    found = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(found, list | tuple) or not found or not all(isinstance(p, str) for p in found):
        raise InputError(f"prompts are a text, or one for each sample; got {prompts!r}")
    return list(found)
