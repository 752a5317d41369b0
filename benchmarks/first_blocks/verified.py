"""When a gradient counts as verified.

1. **The truth** is a gradient in float64 (float32 where a pipeline cannot be run in float64) that finite differences
   confirm within 1 %. It is plain autograd's through the undecorated call; only where plain autograd does not run
   (pipelines that turn their pictures into arrays) is it the gradient that backdrift finds there. The differences are
   central ones of the pipeline's own call, without gradients, along three directions: the gradient's own and two random
   ones. An error in any component shows along the random ones: with n components a unit vector sees 1/sqrt(n) of the
   gradient, so there the tolerance is that share of the gradient's norm (times 3, for the tails). Several widths of the
   difference are tried, since some pipelines round to float32 inside.
2. **A gradient in the block's own precision** is verified if it is finite, not zero, and is the same bits as plain
   autograd's in that precision (with the weights as they come, or frozen: kernels differ), or no farther from the truth
   than four times the square root of that precision's epsilon (relative to its norm): 1 % in float32, 12 % in float16,
   35 % in bfloat16, where the pictures themselves differ that much from float64's after tens of steps.

The fifteen lines hand the noise in as ``latents=``. Where that makes another picture (a scheduler that draws then draws
other numbers), they are compared with the truth of that call.

The scalar is a fixed weighting of the finished pictures, clamped to [0, 1], plus their squares, summed in float64.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import ways
from .listed import Block

AGREE = 0.01  # between a gradient in float64 and central differences, relative to its norm
_WIDTHS = (
    (torch.float64, 1e-4),
    (torch.float64, 1e-3),
    (torch.float64, 1e-2),
    (torch.float32, 1e-2),
)  # along a unit vector
_RANDOM = 2


@dataclass
class Verdict:
    """What became of one block run one way.

    Attributes:
        status: ``"verified"``, ``"raises"``, ``"no gradient"``, ``"not finite"``, ``"wrong"``.
        says: the error's first line, where one was raised.
        error: distance from the truth, relative to its norm.
        bits: whether it is plain autograd's in the same precision, bit for bit; None: plain autograd does not run.
    """

    status: str
    says: str = ""
    error: float | None = None
    bits: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v not in ("", None)}


@dataclass
class Truth:
    """A gradient that finite differences confirm.

    Attributes:
        gradient: by the noise, in the shape of the pipeline's draw.
        by: whose it is, and in which precision.
        slopes: per direction, |predicted - measured| as a multiple of the tolerance.
    """

    gradient: Tensor
    by: str
    slopes: list[float]


class Judge:
    """Runs one block and says what its gradients are worth.

    Args:
        block: which.
        steps: sampling steps in place of its own.
    """

    def __init__(self, block: Block, steps: int | None = None) -> None:
        self.block, self.steps = block, steps
        generator = torch.Generator().manual_seed(11)
        self.start = torch.randn(block.noise, generator=generator).bfloat16()
        self.failures: list[str] = []
        self._plain: dict[tuple[bool, bool], Tensor] = {}

    def truth(self, handed: bool = False) -> Truth | None:
        """The confirmed gradient; None if there is none, with the reasons in ``failures``.

        Args:
            handed: of the call with ``latents=``.
        """
        found: dict[str, Tensor] = {}
        for twin, width in _WIDTHS:
            for by, way in (("plain autograd", ways.plain), ("backdrift", ways.one_line)):
                name = f"{by} in {str(twin).removeprefix('torch.')}"
                if handed and by == "backdrift":
                    continue
                how: dict[str, Any] = {"handed": True} if handed else {}
                try:
                    if name not in found:
                        noise = self._leaf(twin)
                        found[name] = gradient_of(way(self.block, noise, self.steps, twin, **how), noise)
                    slopes = self.slopes(found[name], twin, width, handed)
                except Exception as error:
                    self.failures.append(f"{name}: {_first_line(error)}")
                    continue
                if max(slopes) <= 1:
                    return Truth(found[name], name, slopes)
                self.failures.append(f"{name}, width {width:g}: off by {max(slopes):.3g} tolerances")
        return None

    def backdrift(self, truth: Truth | None) -> Verdict:
        """The block with its one line."""
        noise = self._leaf(self._precision())
        return self._verdict(lambda: gradient_of(ways.one_line(self.block, noise, self.steps), noise), truth)

    def fifteen(self, truth: Truth | None) -> Verdict:
        """The block with the fifteen lines."""
        noise = self._leaf(self._precision())
        verdict = self._verdict(
            lambda: gradient_of(ways.fifteen_lines(self.block, noise, self.steps), noise), truth
        )
        if verdict.status == "wrong" and not self._same_picture():
            return self._verdict(
                lambda: gradient_of(ways.fifteen_lines(self.block, noise, self.steps), noise),
                self.truth(handed=True),
                handed=True,
            )
        return verdict

    def _same_picture(self) -> bool:
        """Whether ``latents=`` gives what the same noise drawn by the pipeline gives."""
        one, other = (
            ways.sampled(self.block, self._leaf(torch.float32).detach(), self.steps, torch.float32, handed)
            for handed in (False, True)
        )
        return torch.allclose(one, other, atol=1e-4)

    def _verdict(self, work: Any, truth: Truth | None, handed: bool = False) -> Verdict:
        try:
            gradient = work()
        except NoGradient as error:
            return Verdict("no gradient", str(error))
        except Exception as error:
            return Verdict("raises", _first_line(error))
        if not bool(torch.isfinite(gradient).all()):
            return Verdict("not finite")
        if not bool(gradient.any()):
            return Verdict("no gradient", "all zeros")
        bits = self._bits(gradient, handed)
        error = None if truth is None else distance(gradient, truth.gradient)
        allowed = max(AGREE, 4 * math.sqrt(torch.finfo(gradient.dtype).eps))
        right = error is not None and (bits or error <= allowed)
        return Verdict(
            "verified" if right else "wrong" if truth is not None else "unverified", "", error, bits
        )

    def _bits(self, gradient: Tensor, handed: bool) -> bool | None:
        """Whether it is plain autograd's; None where that does not run."""
        for frozen in (False, True):
            if (handed, frozen) not in self._plain:
                noise = self._leaf(self._precision())
                how = {"handed": handed, "frozen": frozen}
                try:
                    made = ways.plain(self.block, noise, self.steps, None, **how)
                    self._plain[handed, frozen] = gradient_of(made, noise)
                except Exception:
                    return None
            if torch.equal(gradient, self._plain[handed, frozen]):
                return True
        return False

    def slopes(
        self, gradient: Tensor, twin: torch.dtype, step: float = 1e-4, handed: bool = False
    ) -> list[float]:
        """|predicted - measured| over the tolerance, along the gradient and along random directions.

        Raises:
            NoGradient: the gradient is zero or not finite.
        """
        norm = gradient.norm().item()
        if not math.isfinite(norm) or norm == 0:
            raise NoGradient("zero or not finite")
        generator = torch.Generator().manual_seed(12)
        random = (
            torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype) for _ in range(_RANDOM)
        )
        ways_to_go = [gradient.cpu(), *random]
        found = []
        for i, way in enumerate(ways_to_go):
            way = (way / way.norm()).to(gradient)
            start = self._leaf(twin).detach()
            with torch.no_grad():
                ends = [
                    loss_of(ways.sampled(self.block, start + side * step * way, self.steps, twin, handed))
                    for side in (1, -1)
                ]
            measured = (ends[0] - ends[1]).item() / (2 * step)
            tolerance = AGREE * norm if i == 0 else 3 * AGREE * norm / math.sqrt(gradient.numel())
            found.append(abs((gradient * way).sum().item() - measured) / tolerance)
        return found

    def _leaf(self, dtype: torch.dtype) -> Tensor:
        return self.start.to(_device(), dtype).requires_grad_()

    def _precision(self) -> torch.dtype:
        """The precision that the block asks for first."""
        source = self.block.source
        named = {
            source.find(f"torch_dtype=torch.{name}"): name for name in ("float16", "bfloat16", "float32")
        }
        named.pop(-1, None)
        return getattr(torch, named[min(named)]) if named else torch.float32


class NoGradient(Exception):
    """The result does not depend on the noise in a way that gradients can follow."""


def loss_of(made: Tensor) -> Tensor:
    """The scalar: a fixed weighting plus squares, of clamped pictures, in float64."""
    values = made.double()
    if made.ndim >= 3 and made.shape[-3] == 3:  # pictures and frames
        values = values.clamp(0, 1)
    return (values * torch.linspace(-1, 1, values.numel()).to(values).reshape(values.shape)).sum() + (
        values.square().sum()
    )


def gradient_of(made: Tensor, noise: Tensor) -> Tensor:
    """By the noise.

    Raises:
        NoGradient: there is none.
    """
    if not made.requires_grad:
        raise NoGradient("the result does not require grad")
    (gradient,) = torch.autograd.grad(loss_of(made), noise, allow_unused=True)
    if gradient is None:
        raise NoGradient("the noise is not in the result's graph")
    return gradient


def distance(found: Tensor, true: Tensor) -> float:
    """Relative to the norm of the true one."""
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _device() -> str:
    from .models import device

    return device
