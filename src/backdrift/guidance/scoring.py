"""How clean samples are scored: decoded, looked at by a loss, and told where to go.

The gradient is taken in two parts, each at its own scale: the loss's by the pictures, then through the decoder. Numbers
between them are brought to about 1 by powers of two, which change nothing but the range: in half precision a gradient
of 1e-8 would be 0 (:func:`scaled`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..losses import FunctionLoss, Loss
from ..losses.base import of_any_range

Decode = Callable[[Tensor], Tensor]


class Score(NamedTuple):
    """A loss at clean samples.

    Attributes:
        values: (B,), as the loss gives them.
        pull: what lowers the loss (raises it, where it is maximised) when subtracted: the gradient by the samples.
        pictures: (B, 3, H, W), or videos; None where they are not kept.
    """

    values: Tensor
    pull: Tensor
    pictures: Tensor | None = None


@dataclass(frozen=True)
class Scoring:
    """How clean samples are scored.

    Attributes:
        loss: pictures and prompts -> (B,).
        maximize: whether it is to rise.
        decode: clean samples -> pictures, in place of the host's own.
        preview: the longest side of the pictures kept for the trace; 0 for none.
        prompts: for the loss, one per sample or one for all, in place of the host's.
        chunk: how many samples are decoded and looked at together; None for all.
    """

    loss: Loss
    maximize: bool = False
    decode: Decode | None = None
    preview: int = 0
    prompts: list[str] | None = None
    chunk: int | None = None

    def check(self, batch: int) -> None:
        """Raise unless the prompts are for that many samples.

        Raises:
            InputError: they are for another number.
        """
        if self.prompts is not None and len(self.prompts) not in (1, batch):
            raise InputError(
                f"got {len(self.prompts)} prompts for {batch} samples: give the guidance one, or one for each"
            )

    def rehearse(self, x0: Tensor, decode: Decode, prompts: Sequence[str] | None) -> None:
        """See, on any samples of the right shape, that the loss can be used: one decoding, without a gradient.

        Raises:
            InputError: the loss has the wrong shape, or does not depend on the picture.
        """
        rows = slice(0, self.chunk)
        with torch.enable_grad(), of_any_range():  # noise decodes to anything
            leaf = x0[rows].detach().requires_grad_()
            pictures, seen = self._pictures(leaf, decode)
            values = self._values(seen, self._each(prompts, len(x0)), rows)
        self._check_graph(pictures, leaf, values, seen)

    def score(self, x0: Tensor, decode: Decode, prompts: Sequence[str] | None, *, ranged: bool) -> Score:
        """The loss of clean samples (B, …) and its gradient by them, each sample's own.

        Args:
            decode: the host's.
            prompts: the host's.
            ranged: its pictures are on the scale of [0, 1] for sure.

        Raises:
            InputError: see :meth:`rehearse`.
        """
        each, size = self._each(prompts, len(x0)), self.chunk or len(x0)
        parts = [
            self._part(x0, slice(at, at + size), decode, each, ranged and self.decode is None)
            for at in range(0, len(x0), size)
        ]
        if len(parts) == 1:
            return parts[0]
        kept = [part.pictures for part in parts if part.pictures is not None]
        return Score(
            torch.cat([part.values for part in parts]),
            torch.cat([part.pull for part in parts]),
            torch.cat(kept) if kept else None,
        )

    def _part(self, x0: Tensor, rows: slice, decode: Decode, each: list[str] | None, ranged: bool) -> Score:
        with torch.enable_grad(), of_any_range() if ranged else nullcontext():
            leaf = x0[rows].detach().requires_grad_()
            pictures, seen = self._pictures(leaf, decode)
            values = self._values(seen, each, rows)
            self._check_graph(pictures, leaf, values, seen)
            (by_picture,) = torch.autograd.grad(values.sum(), seen)
            large, factors = scaled(by_picture)
            (pull,) = torch.autograd.grad(pictures, leaf, large.to(pictures.dtype))
        pull = pull / factors.view(-1, *[1] * (pull.ndim - 1)).to(pull.dtype)
        kept = pictures.detach() if self.preview else None
        return Score(values.detach(), -pull if self.maximize else pull, kept)

    def _pictures(self, x0: Tensor, decode: Decode) -> tuple[Tensor, Tensor]:
        """What samples (b, …) decode to, and a leaf like it for the loss, in float32 at least where that is ours."""
        pictures = (self.decode or decode)(x0)
        shape = tuple(pictures.shape) if isinstance(pictures, Tensor) else ()
        if len(shape) not in (4, 5) or shape[0] != len(x0) or shape[-3] != 3:
            shown = shape if isinstance(pictures, Tensor) else type(pictures).__name__
            raise InputError(
                f"decode= makes of {len(x0)} clean samples pictures ({len(x0)}, 3, H, W) or videos ({len(x0)}, F, 3, "
                f"H, W); got {shown}"
            )
        seen = pictures.detach()
        return pictures, (seen if isinstance(self.loss, FunctionLoss) else wide(seen)).requires_grad_()

    def _values(self, pictures: Tensor, each: list[str] | None, rows: slice) -> Tensor:
        """The loss (b,) of pictures (b, 3, H, W), or of videos (b, F, 3, H, W) as the mean over their frames."""
        own = None if each is None else each[rows]
        if pictures.ndim != 5:
            return self.loss(pictures, own)
        count, frames = pictures.shape[:2]
        own = None if own is None else [p for p in own for _ in range(frames)]
        return self.loss(pictures.flatten(0, 1), own).view(count, frames).mean(1)

    def _each(self, prompts: Sequence[str] | None, batch: int) -> list[str] | None:
        found = self.prompts if self.prompts is not None else prompts
        if found is None:
            return None
        return list(found) if len(found) > 1 else list(found) * batch

    def _check_graph(self, pictures: Tensor, leaf: Tensor, values: Tensor, seen: Tensor) -> None:
        if not depends(values, seen):
            raise InputError(
                f"the loss {self.loss.spec!r} does not depend on the picture in a way that gradients can follow: it "
                "detaches, rounds, or runs under no_grad"
            )
        if not depends(pictures, leaf):
            raise InputError(
                "the pictures do not depend on the clean samples in a way that gradients can follow: decode= detaches, "
                "rounds, or runs under no_grad"
            )


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least: gradients by pictures underflow in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def scaled(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient (B, …) with each sample's largest entry brought to 1/2 to 1, and the factors (B,) that did it.

    The factors are powers of two, so in float32 a vector–Jacobian product of the one, divided by them, has the bits of
    one of the other. In half precision it has digits where the other would have zeros: a mean over a picture's pixels
    has a gradient of about 1e-6, and 6e-8 is the smallest number there is.
    """
    largest = gradient.detach().flatten(1).abs().amax(1)
    exponent = torch.frexp(largest.float()).exponent.clamp(-100, 100)
    exponent = torch.where(largest.isfinite(), exponent, torch.zeros_like(exponent))
    factors = torch.ldexp(torch.ones_like(largest), -exponent)
    return gradient * factors.view(-1, *[1] * (gradient.ndim - 1)), factors


def depends(value: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of ``value`` reaches the leaf."""
    if value is leaf:
        return True
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
    return False
