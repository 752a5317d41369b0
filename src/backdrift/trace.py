"""The gradient on its way back through a run: how large it is at each step, and how it grows.

Gradients through many steps may grow without bound. Here they are measured as they pass, by hooks on the states at the
boundaries between steps and on the networks' outputs; the same hooks discount and clip them where that was asked for.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError
from .through import Chosen, Through

__all__ = ["Trace", "Watch"]

#: from this factor between a step's gradient and the finished latents' on, a chain counts as exploding
EXPLODING = 1e3


class Trace:
    """Gradient norms of one run, step by step; filled by its last backward pass.

    Norms are 2-norms over all samples together, as they arrive: behind the clipping and the discount of later
    boundaries, before those of their own. None stands for what no backward pass has come by (yet).

    Attributes:
        through: the choice of steps.
        steps: the steps that carried the gradient, rising (what ``Random`` drew); None until the run knows.
    """

    def __init__(self, through: Through) -> None:
        self.through = through
        self.steps: tuple[int, ...] | None = None
        self.total = 0
        self._latents: dict[int, Tensor] = {}
        self._outputs: dict[int, dict[int, Tensor]] = {}
        self._clipped: dict[int, Tensor] = {}

    @property
    def latents(self) -> list[float | None]:
        """N + 1 norms: of the gradient at the latents that enter step i, and last at the finished ones."""
        return [_value(self._latents.get(i)) for i in range(self.total + 1)]

    @property
    def eps(self) -> list[float | None]:
        """N norms: of the gradient at the network's output in step i (guidance done); of several, the root of the sum
        of squares."""
        found = []
        for i in range(self.total):
            norms = [_value(norm) for norm in self._outputs.get(i, {}).values()]
            known = [norm for norm in norms if norm is not None]
            found.append(math.hypot(*known) if known else None)
        return found

    @property
    def growth(self) -> list[float | None]:
        """N ratios latents[i] / latents[i + 1]: how much larger the gradient leaves step i backwards than it came."""
        norms = self.latents
        return [_ratio(norms[i], norms[i + 1]) for i in range(self.total)]

    @property
    def clipped(self) -> tuple[int, ...]:
        """Boundaries (numbered as ``latents``) where the gradient of at least one sample was clipped."""
        return tuple(i for i in sorted(self._clipped) if bool(self._clipped[i]))

    @property
    def exploding(self) -> bool:
        """Whether a gradient at some step's latents is not finite, or over 1000 times that at the finished latents."""
        norms = self.latents
        known = [norm for norm in norms if norm is not None]
        if not all(map(math.isfinite, known)):
            return True
        return bool(known and norms[-1]) and max(known) > EXPLODING * known[-1]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "through": self.through.spec,
            "steps": None if self.steps is None else list(self.steps),
            "latents": self.latents,
            "eps": self.eps,
            "growth": self.growth,
            "clipped": list(self.clipped),
            "exploding": self.exploding,
        }

    def __repr__(self) -> str:
        rows = ["step  carries  latents     growth   eps"]
        for i, (norm, growth, eps) in enumerate(zip(self.latents, self.growth, self.eps, strict=False)):
            carries = "yes" if self.steps is None or i in self.steps else "no"
            rows.append(f"{i:4}  {carries:7}  {_text(norm):10}  {_text(growth):7}  {_text(eps)}")
        rows.append(f" end           {_text(self.latents[-1])}")
        return "\n".join([f"Trace({self.through.spec})", *rows, *(["exploding"] if self.exploding else [])])

    @staticmethod
    def together(traces: Sequence[Trace]) -> dict[str, Any] | None:
        """The traces of several runs on parts of one batch as one, as :meth:`as_dict`; None of none.

        Norms are added up as those of parts of one vector are.
        """
        if not traces:
            return None
        parts = [trace.as_dict() for trace in traces]
        whole = dict(parts[0])
        for name in ("latents", "eps"):
            rows = zip(*(part[name] for part in parts), strict=False)
            whole[name] = [None if None in row else math.hypot(*row) for row in rows]
        norms = whole["latents"]
        whole["growth"] = [_ratio(a, b) for a, b in pairwise(norms)]
        whole["clipped"] = sorted({i for part in parts for i in part["clipped"]})
        whole["exploding"] = any(part["exploding"] for part in parts)
        return whole


class Watch:
    """Puts the hooks of one run.

    Args:
        trace: where norms go.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace, self.chosen = trace, Chosen(0, ())

    def begin(self, chosen: Chosen | None) -> None:
        """The run knows its steps; None if it does not."""
        if chosen is not None:
            self.chosen = chosen
            self.trace.total, self.trace.steps = chosen.total, chosen.steps

    def boundary(self, i: int, x: Tensor) -> None:
        """``x`` is the state that enters step i, or with i = N the finished one."""
        if not x.requires_grad or not torch.is_grad_enabled():
            return
        through, total = self.trace.through, self.chosen.total
        factor = through.discount if 0 < i < total else 1.0
        limit = through.clip_step if i > 0 else None
        if x.is_leaf:  # the user's own tensor: it keeps no hook longer than the run's trace is there
            handle = x.register_hook(_weakly(self.trace, i))
            weakref.finalize(self.trace, handle.remove)
            return
        x.register_hook(_hook(self.trace, i, factor, limit))

    def output(self, i: int, eps: Tensor, number: int = 0) -> None:
        """``eps`` is the network's output in step i, the ``number``-th of that step."""
        if not eps.requires_grad or eps.is_leaf or not torch.is_grad_enabled():
            return
        trace = self.trace

        def seen(grad: Tensor) -> None:
            if _is_one(grad):
                trace._outputs.setdefault(i, {})[number] = _norm(grad)

        eps.register_hook(seen)


def _hook(trace: Trace, i: int, factor: float, limit: float | None) -> Callable[[Tensor], Tensor | None]:
    def passing(grad: Tensor) -> Tensor | None:
        if _is_one(grad):
            trace._latents[i] = _norm(grad)
        elif limit is not None:
            raise UnsupportedError(
                "clip_step clips one gradient, not many at once: leave is_grads_batched out"
            )
        if factor == 1 and limit is None:
            return None
        changed = grad if factor == 1 else grad * factor
        if limit is not None:
            changed, trace._clipped[i] = clipped(changed, limit)
        return changed

    return passing


def _weakly(trace: Trace, i: int) -> Callable[[Tensor], None]:
    reference = weakref.ref(trace)

    def seen(grad: Tensor) -> None:
        found = reference()
        if found is not None and _is_one(grad):
            found._latents[i] = _norm(grad)

    return seen


def clipped(grad: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Rows of ``grad`` (B, …) scaled down to the norm ``limit`` where they are longer, and whether any was.

    Rows within the limit keep their bits; one that is not finite stays as it is.
    """
    rows = grad.detach().reshape(len(grad), -1) if grad.ndim else grad.detach().reshape(1, 1)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=_wide(grad))
    long = norms > limit
    scale = torch.where(long, limit / norms, torch.ones_like(norms)).to(grad.dtype)
    scale = torch.where(norms.isfinite(), scale, torch.ones_like(scale))
    return grad * scale.reshape(-1, *[1] * (grad.ndim - 1)) if grad.ndim else grad * scale[0], long.any()


def _is_one(grad: Tensor) -> bool:
    """Whether a gradient is one: many at once (``is_grads_batched``, ``vmap``) are not measured."""
    many = torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)
    return not many


def _norm(grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad.detach(), dtype=_wide(grad))


def _wide(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


def _value(norm: Tensor | None) -> float | None:
    return None if norm is None else float(norm)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
