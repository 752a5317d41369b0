"""Which steps of a sampling run carry the gradient: all, the last ones, some at random, or those named.

A run takes the state x_0 (noise) to x_N (finished) in N steps,

    e_i = network(x_i, t_i, c),        x_{i+1} = step_i(x_i, e_i),        i = 0 … N - 1,

(``step_i`` is the scheduler's or the solver's arithmetic; with a history it also sees earlier e and x). With the
adjoint ``a_i = dL/dx_i``, plain backpropagation is

    a_i = (d step_i/dx_i + d step_i/de_i · de_i/dx_i)^T a_{i+1},
    dL/dw = sum_i (de_i/dw)^T (d step_i/de_i)^T a_{i+1}.

A choice here changes four things in that, and nothing in the values that are computed:

* In a step that is *not chosen*, e_i is a constant: the network is called once, without a graph, keeps nothing and is
  not redone. The state's own path, ``d step_i/dx_i``, stays, but for ``Last``.
* ``Last(K)`` also *cuts* the state where its first step begins: x_{N-K} is a constant, and so is everything before
  (``torch.no_grad`` over the first N - K steps). No gradient reaches the noise.
* ``detach_input``: the network's input is a constant, ``e_i = network(sg(x_i), t_i, c)``: the term ``de_i/dx_i`` is
  left out. ``input_discount = g`` keeps g times it.
* ``discount = g``: at each boundary between two steps the adjoint is multiplied by g, so ``a_i`` becomes ``g a_i`` for
  0 < i < N, and step i's share of a weight's gradient is worth ``g^(N-1-i)``.

Where these are from. DRaFT-K (Clark et al. 2024, *Directly Fine-Tuning Diffusion Models on Differentiable Rewards*) is
``Last(K)``. AlignProp (Prabhudesai et al. 2023) detaches e_i before a step drawn at random, which gives weights the
same gradient as ``Last(K)`` with a K drawn for each update. DRTune (Wu et al. 2024, *Deep Reward Supervisions for
Tuning Text-to-Image Diffusion Models*) trains some steps, network inputs detached: ``Random(K, detach_input=True)``, or
``Steps`` at equal distances. LeapAlign (Liang et al. 2026) scales the gradient by the network's input down instead of
dropping it: ``input_discount``, here on the sampler's own steps. ReFL (Xu et al. 2023) and DRaFT-LV leave the sampler's
path, for a picture predicted in one step or noised again: they are other losses, and not a choice of steps.
``discount`` has no paper that we know of: it is truncation with a soft end.

None but ``All()`` gives the gradient of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["All", "Chosen", "Last", "Random", "Steps", "Through"]


class Chosen(NamedTuple):
    """What a choice comes to in a run of known length.

    Attributes:
        total: steps of the run.
        steps: those that carry the gradient, rising.
        cut: the step at whose beginning the state is cut off from all before; 0: nowhere.
    """

    total: int
    steps: tuple[int, ...]
    cut: int = 0


@dataclass(frozen=True)
class Through:
    """Base of the choices, with what they have in common.

    Args:
        detach_input: whether no gradient flows through the networks' input latents (see the module's text).
        discount: what the adjoint is multiplied by at each boundary between two steps, in (0, 1].
        input_discount: what the gradient by the networks' input latents is multiplied by, in (0, 1].
        clip_step: the largest norm, per sample, of the adjoint that a step's end hands back into the step; larger ones
            are scaled down to it. The gradient is then not the loss's. None: no clipping.

    Raises:
        InputError: a value is out of its range.
    """

    detach_input: bool = field(default=False, kw_only=True)
    discount: float = field(default=1.0, kw_only=True)
    input_discount: float = field(default=1.0, kw_only=True)
    clip_step: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("discount", "input_discount"):
            value = getattr(self, name)
            if not _number(value) or not 0 < value <= 1:
                more = ": to leave the term out, detach_input=True" if name == "input_discount" else ""
                raise InputError(f"{name} must be in (0, 1]; got {value!r}{more}")
        if self.clip_step is not None and not (_number(self.clip_step) and self.clip_step > 0):
            raise InputError(f"clip_step must be a positive norm, or None; got {self.clip_step!r}")
        if not isinstance(self.detach_input, bool):
            raise InputError(f"detach_input must be True or False; got {self.detach_input!r}")
        if self.detach_input and self.input_discount != 1:
            raise InputError("detach_input leaves out what input_discount scales: give one of them")

    def choose(self, total: int, draw: int = 0) -> Chosen:
        """The steps that carry the gradient in a run of ``total`` steps.

        Args:
            total: steps of the run.
            draw: the number of the draw, for ``Random``.

        Raises:
            InputError: a step is asked for that the run does not have.
        """
        raise NotImplementedError

    def at(self, draw: int) -> Through:
        """The same choice, whose first draw is number ``draw`` further on."""
        return self

    @property
    def exact(self) -> bool:
        """Whether the gradient is that of the loss: all steps, nothing left out, scaled or clipped."""
        return False

    @property
    def spec(self) -> str:
        """The choice as text that :meth:`parse` takes."""
        words = self._words()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.kw_only and value != f.default:
                words.append(f.name if value is True else f"{f.name}={value!r}")
        name = type(self).__name__.lower()
        return f"{name}:{','.join(words)}" if words else name

    def _words(self) -> list[str]:
        return []

    @staticmethod
    def parse(value: Any) -> Through:
        """A choice, or one from text: ``"all"``, ``"last:3"``, ``"random:3,seed=1"``, ``"steps:0,5,-1,detach_input"``.

        Behind the colon stand the choice's own numbers, then options by their names.

        Raises:
            InputError: it is neither.
        """
        if isinstance(value, Through):
            return value
        if not isinstance(value, str):
            shown = (
                f"the class {value.__name__}, without brackets" if isinstance(value, type) else repr(value)
            )
            raise InputError(f"through must be All(), Last(K), Random(K) or Steps([...]); got {shown}")
        return _parsed(value)

    def input_of(self, x: Tensor) -> Tensor:
        """What a network is given in a chosen step in place of its input latents; equal to them."""
        if self.detach_input:
            return x.detach()
        return scaled_gradient(x, self.input_discount)


@dataclass(frozen=True)
class All(Through):
    """Every step carries the gradient; without options it is the loss's own."""

    def choose(self, total: int, draw: int = 0) -> Chosen:
        return Chosen(total, tuple(range(total)))

    @property
    def exact(self) -> bool:
        return self == All()


@dataclass(frozen=True)
class Last(Through):
    """The last ``k`` steps carry the gradient, and the state is cut where they begin (DRaFT-K).

    No gradient reaches the noise or any latent before; asking for one raises. ``Steps(range(-k, 0))`` is the same
    without the cut. With ``k`` equal to the number of steps nothing is cut.

    Args:
        k: how many steps, 1 or more; when a run begins, at most its steps.
    """

    k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("Last", self.k)

    def choose(self, total: int, draw: int = 0) -> Chosen:
        _check_enough("Last", self.k, total)
        return Chosen(total, tuple(range(total - self.k, total)), total - self.k)

    def _words(self) -> list[str]:
        return [str(self.k)]


@dataclass(frozen=True)
class Random(Through):
    """``k`` steps drawn at random carry the gradient; the state's path is kept throughout.

    Every set of k steps is equally likely. The draw depends on ``seed`` and on the number of the draw alone, never on
    torch's global random state. Numbers begin at ``first``: call n (from 0) of a run of ``differentiable`` makes draw
    ``first + n``, iteration i of ``optimize`` draw ``first + i``, ``sample`` draw ``first``. What was drawn is in the
    run's ``trace.steps``.

    Args:
        k: how many steps, 1 or more; when a run begins, at most its steps.
        seed: a whole number, 0 or more.
        first: the number of the first draw.
    """

    k: int = 1
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("Random", self.k)
        for name in ("seed", "first"):
            if not _whole(getattr(self, name)) or getattr(self, name) < 0:
                raise InputError(f"{name} must be a whole number, 0 or more; got {getattr(self, name)!r}")

    def choose(self, total: int, draw: int = 0) -> Chosen:
        _check_enough("Random", self.k, total)
        # A seed of its own for each draw; 2^31 apart, so that two seeds do not share draws.
        generator = torch.Generator().manual_seed((self.seed * 2**31 + self.first + draw) % 2**63)
        order = torch.randperm(total, generator=generator).tolist()
        return Chosen(total, tuple(sorted(order[: self.k])))

    def at(self, draw: int) -> Random:
        return replace(self, first=self.first + draw)

    def _words(self) -> list[str]:
        more = [f"{name}={getattr(self, name)}" for name in ("seed", "first") if getattr(self, name)]
        return [str(self.k), *more]


@dataclass(frozen=True)
class Steps(Through):
    """The steps named carry the gradient; the state's path is kept throughout.

    Args:
        steps: their numbers, from 0 (the first, at the noise); negative ones count from the end, -1 is the last.
    """

    steps: tuple[int, ...] = ()

    def __init__(self, steps: Iterable[int], **options: Any) -> None:
        if isinstance(steps, str) or not isinstance(steps, Iterable):
            raise InputError(f"Steps takes a list of whole numbers; got {steps!r}")
        object.__setattr__(self, "steps", tuple(steps))
        known = {f.name: f.default for f in fields(Through)}
        unknown = sorted(options.keys() - known.keys())
        if unknown:
            raise InputError(f"Steps has no option {unknown[0]!r}; it has {', '.join(known)}")
        for name, default in known.items():
            object.__setattr__(self, name, options.get(name, default))
        super().__post_init__()
        wrong = [step for step in self.steps if not _whole(step)]
        if wrong or not self.steps:
            raise InputError(
                f"Steps takes one or more whole numbers; got {wrong[0]!r}"
                if wrong
                else "Steps([]) would carry no gradient at all: name a step, or call under torch.no_grad()"
            )

    def choose(self, total: int, draw: int = 0) -> Chosen:
        wrong = [step for step in self.steps if not -total <= step < total]
        if wrong:
            raise InputError(
                f"Steps names step {wrong[0]}, and the run has {total} steps: 0 to {total - 1}, or -{total} to -1"
            )
        found = sorted(step % total for step in self.steps)
        twice = [a for a, b in pairwise(found) if a == b]
        if twice:
            raise InputError(f"Steps names step {twice[0]} of the run's {total} twice")
        return Chosen(total, tuple(found))

    def _words(self) -> list[str]:
        return [str(step) for step in self.steps]


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, whose gradient arrives multiplied by ``factor``."""
    if factor == 1 or not x.requires_grad:
        return x
    view = x.view_as(x)
    view.register_hook(lambda grad: grad * factor)
    return view


_KINDS: dict[str, type[Through]] = {"all": All, "last": Last, "random": Random, "steps": Steps}


def _parsed(text: str) -> Through:
    name, _, rest = text.strip().partition(":")
    kind = _KINDS.get(name.strip().lower())
    words = [word.strip() for word in rest.split(",") if word.strip()]
    try:
        if kind is None:
            raise ValueError
        numbers = [int(word) for word in words if word.lstrip("-").isdigit()]
        options = dict(_option(word) for word in words if not word.lstrip("-").isdigit())
        if kind is Steps:
            return Steps(numbers, **options)
        if len(numbers) != (0 if kind is All else 1):
            raise ValueError
        return kind(*numbers, **options)
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"through={text!r} is none of 'all', 'last:3', 'random:3,seed=1', 'steps:0,5,-1', with options such as "
            "'last:3,detach_input,discount=0.9,clip_step=1'"
        ) from None


def _option(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        return name, True
    if value in ("True", "False", "None"):
        return name, {"True": True, "False": False, "None": None}[value]
    return name, int(value) if value.isdigit() and name in ("seed", "first") else float(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(name: str, k: Any) -> None:
    if not _whole(k) or k < 1:
        raise InputError(f"{name} takes a whole number of steps, 1 or more; got {k!r}")


def _check_enough(name: str, k: int, total: int) -> None:
    if k > total:
        raise InputError(f"{name}({k}) asks for more steps than the run's {total}: at most {name}({total})")
