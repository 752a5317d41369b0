"""Pictures from files, photographs' names and PIL, as tensors in [0, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .photographs import photograph


def load_picture(given: Any) -> Tensor:
    """A picture as a float32 tensor ``(3, H, W)`` in [0, 1], the right way up; transparency is laid on white.

    Args:
        given: A PIL picture; a picture file, of any kind that Pillow reads (also grey, with a palette, CMYK, or of 16
            bits); or the name of a photograph that an installed scikit-image or scikit-learn carries, such as
            ``skimage/coffee`` (a file of that path comes first).

    Raises:
        InputError: When the file is missing or is not a picture, or there is no such photograph.
    """
    from PIL import Image

    if isinstance(given, Image.Image):
        return _as_tensor(given, "the picture")
    if not isinstance(given, str | Path):
        raise InputError(
            f"A picture is a file, a photograph's name or a PIL picture, got {type(given).__name__}."
        )
    if "://" in str(given):
        raise InputError(
            f"{str(given)!r} is an address, and nothing is fetched: save the picture, give its file."
        )
    path = Path(given).expanduser()
    if not path.is_file():
        found = photograph(given)
        if found is None:
            raise InputError(f"The picture {str(path)!r} does not exist (seen from {Path.cwd()}).")
        path = found
    try:
        with Image.open(path) as opened:
            opened.load()
            return _as_tensor(opened, repr(str(path)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} cannot be read as a picture: {error}") from error


def _as_tensor(picture: Any, name: str) -> Tensor:
    """``(3, H, W)`` of a PIL picture.

    Raises:
        InputError: its numbers have no scale (mode F).
    """
    import numpy
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)  # cameras write down which way up they were held
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = numpy.asarray(picture).astype("float32") / 65535
        return torch.from_numpy(grey)[None].expand(3, -1, -1).clone()
    if picture.mode == "F":
        raise InputError(
            f"{name} has floating-point numbers without a scale (mode F): give a tensor in [0, 1]."
        )
    if "A" in picture.getbands() or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return torch.from_numpy(numpy.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
