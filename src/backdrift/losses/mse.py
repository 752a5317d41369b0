"""Mean squared error to a target picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import InputError
from .base import Loss, check_images
from .reading import load_picture
from .registry import register
from .resize import resize


@register("mse", argument="a picture file", example="mse:target.png")
class MSE(Loss):
    """Mean over pixels and channels of ``(image - target)^2``.

    Args:
        target: ``(3, H, W)`` or ``(N, 3, H, W)`` in [0, 1], or a PIL picture; one target serves every sample. A target
            of another size but the same proportions is resized (antialiased) to the pictures'.

    Raises:
        InputError: When the target is no picture, has other proportions than the pictures, or when there
            are several targets but not one for each picture.
    """

    def __init__(self, target: Any) -> None:
        super().__init__()
        target = load_picture(target) if hasattr(target, "getbands") else target
        if not isinstance(target, Tensor) or not target.is_floating_point() or target.ndim not in (3, 4):
            raise InputError(
                "The target of the loss 'mse' must be a floating-point tensor (3, H, W) or (N, 3, H, W), got "
                + (
                    f"{target.dtype} {tuple(target.shape)}."
                    if isinstance(target, Tensor)
                    else f"{type(target)}."
                )
            )
        target = target.detach() if target.ndim == 4 else target.detach()[None]
        check_images(target)
        self.register_buffer("target", target, persistent=False)
        self.target: Tensor
        self.spec = "mse"

    @classmethod
    def from_text(cls, text: str) -> MSE:
        if not text:
            raise InputError("The loss 'mse' needs a target picture: mse:path/to/target.png.")
        return cls(load_picture(text))

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        target = self.target.to(images)
        (height, width), (rows, columns) = images.shape[-2:], target.shape[-2:]
        if height * columns != width * rows:
            raise InputError(
                f"The target of the loss 'mse' is {columns}x{rows} pixels (width x height), the pictures are "
                f"{width}x{height}; give both the same proportions (crop the target)."
            )
        if len(target) not in (1, len(images)):
            raise InputError(f"The loss 'mse' has {len(target)} targets for {len(images)} pictures.")
        return (images - resize(target, (height, width))).square().flatten(1).mean(1)
