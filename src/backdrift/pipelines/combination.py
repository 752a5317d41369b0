"""How a pipeline makes the scheduler's ``model_output`` of what its networks returned: learned, and checked.

With parts u and c (no prompt, prompt) of one batch or of two calls:

* no guidance: ``c``;
* classifier-free guidance (Ho & Salimans 2022): ``g = u + scale (c - u)``;
* rescaled (Lin et al. 2023, section 3.4): ``phi g std(c)/std(g) + (1 - phi) g``, std over each sample.

The scale is the pipeline's own where one of its attributes reproduces the step, else the least-squares one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..accelerators import doubled
from ..errors import UnsupportedError

__all__ = ["Combination", "learned"]

_SCALES = ("guidance_scale", "true_cfg_scale", "real_guidance_scale", "prior_guidance_scale")


@dataclass(frozen=True)
class Combination:
    """A pipeline's guidance at one step.

    Attributes:
        cond, uncond: which parts; the same one without guidance.
        scale: the guidance scale.
        rescale: phi.
    """

    cond: int = 0
    uncond: int = 0
    scale: float = 1.0
    rescale: float = 0.0

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """The guided output of the parts, each (B, …); differentiable."""
        c, u = parts[self.cond], parts[self.uncond]
        if self.cond == self.uncond:
            return c
        guided = u + self.scale * (c - u)
        if self.rescale == 0:
            return guided
        dims = list(range(1, c.ndim))
        rescaled = guided * (c.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        return self.rescale * rescaled + (1 - self.rescale) * guided

    def more(self, parts: Sequence[Tensor]) -> Tensor | None:
        """Conditional minus unconditional; None without guidance."""
        return None if self.cond == self.uncond else parts[self.cond] - parts[self.uncond]


def learned(
    pipe: Any, parts: Sequence[Tensor], output: Tensor, refusal: str = "so its steps cannot be guided"
) -> Combination:
    """The combination that gives ``output``, tried out on what a step really had.

    Args:
        pipe: its attributes are asked for the scale.
        parts: one or two, each (B, …).
        output: what the scheduler was given, of the same shape.
        refusal: what is said where none does: of what the user asked for.

    Raises:
        UnsupportedError: none does.
    """
    if len(parts) > 2:
        raise UnsupportedError(
            f"{type(pipe).__name__} combines {len(parts)} network outputs in one step (skipped layers, several prompts "
            f"or pictures), and not one, or two by classifier-free guidance, {refusal}. Switch that off"
        )
    own, target = [doubled(part) for part in parts], doubled(output)
    if len(parts) == 1:
        candidates = [Combination()]
    else:
        phi = _attribute(pipe, "guidance_rescale") or 0.0
        orders = ((1, 0), (0, 1))
        named = [s for name in _SCALES if (s := _attribute(pipe, name)) is not None]
        # No unconditional half is worth its price at scale 1, so that is asked last.
        candidates = [Combination(c, u, s, r) for r in {phi: 0, 0.0: 0} for s in named for c, u in orders]
        candidates += [_fitted(own, target)]
    unit = torch.finfo(output.dtype).eps
    size = max(float(part.abs().max()) for part in own)
    for candidate in candidates:
        apart = float((candidate(own) - target).abs().max())
        if apart <= 8 * unit * (1 + abs(candidate.scale)) * size:
            return candidate
    raise UnsupportedError(
        f"{type(pipe).__name__} makes the scheduler's input of its network's output by a rule that is neither the "
        "output itself nor classifier-free guidance, uncond + scale * (cond - uncond), nor that with guidance_rescale, "
        f"{refusal}. Switch the rule off (perturbed attention, adaptive projection, …)"
    )


def _fitted(parts: Sequence[Tensor], output: Tensor) -> Combination:
    """The least-squares scale; the part that it leans to is the conditional one."""
    difference = parts[1] - parts[0]
    norm = float((difference * difference).sum())
    scale = float(((output - parts[0]) * difference).sum()) / norm if norm > 0 else 1.0
    return Combination(1, 0, scale) if scale >= 0 else Combination(0, 1, 1 - scale)


def _attribute(pipe: Any, name: str) -> float | None:
    for key in (f"_{name}", name):
        value = getattr(pipe, key, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None
