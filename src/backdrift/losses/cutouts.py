"""A loss on random crops of a picture: the mean over them, so that no single framing is what pleases it.

Crops are squares whose side is ``short * (least + (1 - least) u^power)`` with u uniform in [0, 1), placed uniformly
(Crowson's cut-outs for CLIP guidance; AdjointDPM's vocabulary expansion takes 16 of them with power 0.3). They are
drawn once, so the loss is a function: the same picture has the same value, in every call and at every place in a
batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .base import Loss
from .registry import register

_NUMBERS = re.compile(r"(\d+)(?:/([\d.e-]+)/([\d.e-]+)/(\d+))?")


@register("cutouts", argument="a number of crops, then a loss", example="cutouts:4 clip:a blue two")
class Cutouts(Loss):
    """The mean of a loss over random crops of each picture.

    Args:
        loss: as for :func:`backdrift.losses.resolve`.
        count: crops, each one evaluation of the loss.
        power: small ones favour large crops.
        least: the smallest side, as a part of the picture's shorter one, in (0, 1].
        seed: of the crops.

    Raises:
        InputError: a number cannot be used.

    Example:
        >>> fits = bd.losses.Cutouts("clip:a blue two", count=16)
    """

    def __init__(
        self, loss: Any, count: int = 16, power: float = 0.3, least: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__()
        from .spec import resolve

        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"count={count!r} must be a whole number of crops, at least 1.")
        if not (power > 0 and math.isfinite(power)) or not 0 < least <= 1:
            raise InputError(f"power={power!r} must be positive, and least={least!r} lie in (0, 1].")
        self.loss = resolve(loss)
        self.count, self.power, self.least = count, power, least
        generator = torch.Generator().manual_seed(seed)
        #: per crop: the draw of its side, and its place
        self.draws: list[list[float]] = torch.rand(
            count, 3, generator=generator, dtype=torch.float64
        ).tolist()
        usual = (power, least, seed) == (0.3, 0.5, 0)
        more = "" if usual else f"/{power:g}/{least:g}/{seed}"
        self.spec = f"cutouts:{count}{more} {self.loss.spec}"

    @classmethod
    def from_text(cls, text: str) -> Cutouts:
        numbers, _, rest = text.strip().partition(" ")
        found = _NUMBERS.fullmatch(numbers)
        if found is None or not rest.strip():
            raise InputError(
                "cutouts take a number of crops and a loss, as in 'cutouts:16 clip:a blue two' (or 'cutouts:"
                f"16/power/least/seed clip:a blue two'); got {text!r}."
            )
        count, power, least, seed = found.groups()
        if power is None:
            return cls(rest.strip(), int(count))
        return cls(rest.strip(), int(count), float(power), float(least), int(seed))

    def crops(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Top, left and side of each crop of a picture of that size."""
        short, found = min(height, width), []
        for size, down, right in self.draws:
            side = max(1, round(short * (self.least + (1 - self.least) * size**self.power)))
            found.append((int(down * (height - side + 1)), int(right * (width - side + 1)), side))
        return found

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        each = [
            self.loss(images[..., top : top + side, left : left + side], prompts)
            for top, left, side in self.crops(*images.shape[-2:])
        ]
        return torch.stack(each).mean(0)
