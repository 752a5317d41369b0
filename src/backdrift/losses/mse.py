"""Mean squared error to a target picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .base import Loss, check_images
from .photographs import photograph
from .registry import register
from .resize import resize


@register("mse", argument="a picture file", example="mse:target.png")
class MSE(Loss):
    """Mean over pixels and channels of ``(image - target)^2``.

    Args:
        target: ``(3, H, W)`` or ``(N, 3, H, W)`` in [0, 1]; one target serves every sample. A target of
            another size but the same proportions is resized (antialiased) to the pictures'.

    Raises:
        InputError: When the target is no picture, has other proportions than the pictures, or when there
            are several targets but not one for each picture.
    """

    def __init__(self, target: Tensor) -> None:
        super().__init__()
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


def load_picture(path: str | Path) -> Tensor:
    """A picture as a float32 tensor ``(3, H, W)`` in [0, 1]; transparency is laid on white.

    Args:
        path: A picture file; or the name of a photograph that an installed scikit-image or scikit-learn carries, such
            as ``skimage/coffee`` (a file of that path comes first).

    Raises:
        InputError: When the file is missing or is not a picture, or there is no such photograph.
    """
    import numpy
    from PIL import Image, UnidentifiedImageError

    given, path = path, Path(path).expanduser()
    if not path.is_file():
        found = photograph(given)
        if found is None:
            raise InputError(f"The picture {str(path)!r} does not exist (seen from {Path.cwd()}).")
        path = found
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a picture: {error}") from error
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return torch.from_numpy(numpy.asarray(flat).copy()).permute(2, 0, 1).float() / 255
