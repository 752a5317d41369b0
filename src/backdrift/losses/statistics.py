"""Losses on simple statistics of a picture: brightness, contrast, saturation, sharpness, a colour.

Alone (``brightness``) the statistic itself is the value, so minimising it makes the picture darker and
``-brightness`` brighter; with a goal (``brightness:0.8``) the value is ``(statistic - goal)^2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from . import measurements
from .base import Loss
from .registry import register


class Statistic(Loss):
    """A measurement as a loss, optionally its squared distance to a ``goal``."""

    def __init__(self, goal: float | None = None) -> None:
        super().__init__()
        self.goal = goal
        self.spec = self.name if goal is None else f"{self.name}:{goal:g}"

    @classmethod
    def from_text(cls, text: str) -> Statistic:
        if not text:
            return cls()
        try:
            return cls(float(text))
        except ValueError:
            raise InputError(
                f"The loss {cls.name!r} takes a number as its goal, got {text!r}. "
                f"Write {cls.name!r} to minimise it or for instance '{cls.name}:0.5'."
            ) from None

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        value = self.measure(images)
        return value if self.goal is None else (value - self.goal).square()

    def measure(self, images: Tensor) -> Tensor:
        """The statistic, ``(N,)``."""
        raise NotImplementedError


@register("brightness", argument="[goal]", example="brightness:0.8")
class Brightness(Statistic):
    """Mean luma."""

    def measure(self, images: Tensor) -> Tensor:
        return measurements.mean_brightness(images)


@register("contrast", argument="[goal]", example="-contrast")
class Contrast(Statistic):
    """Standard deviation of the luma."""

    def measure(self, images: Tensor) -> Tensor:
        return measurements.contrast(images)


@register("saturation", argument="[goal]")
class Saturation(Statistic):
    """Mean ``max - min`` over the channels of a pixel (smooth where HSV's saturation is not, in the dark)."""

    def measure(self, images: Tensor) -> Tensor:
        return measurements.mean_chroma(images)


@register("sharpness", argument="[goal]", example="-10*sharpness")
class Sharpness(Statistic):
    """High-frequency energy of the luma."""

    def measure(self, images: Tensor) -> Tensor:
        return measurements.high_frequency_energy(images)


@register("colour", argument="a colour name or #rrggbb", example="colour:#2060c0")
class Colour(Loss):
    """Squared distance of the picture's mean colour to a colour.

    Args:
        colour: Red, green and blue in [0, 1].
    """

    def __init__(self, colour: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("goal", torch.tensor(colour, dtype=torch.float64), persistent=False)
        self.goal: Tensor
        self.spec = "colour:#" + "".join(f"{round(c * 255):02x}" for c in colour)

    @classmethod
    def from_text(cls, text: str) -> Colour:
        from PIL import ImageColor

        try:
            red, green, blue = ImageColor.getrgb(text)[:3]
        except ValueError:
            raise InputError(
                f"The loss 'colour' takes a CSS colour name or #rrggbb, got {text!r}. Write for instance "
                "colour:red or colour:#2060c0."
            ) from None
        return cls((red / 255, green / 255, blue / 255))

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        return (images.mean((2, 3)) - self.goal.to(images)).square().mean(1)
