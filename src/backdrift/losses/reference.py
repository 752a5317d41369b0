"""The picture that a loss compares with: from a file or a tensor, one for all samples or one for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import InputError
from .base import check_images, check_range
from .reading import load_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    #: A picture in [0, 1], ``(3, H, W)`` or ``(K, 3, H, W)``; a picture file's path or a photograph's name; or PIL's.
    Picture = Tensor | str | Path | Image
else:
    Picture = Any


def as_pictures(given: Picture, name: str) -> Tensor:
    """``(K, 3, H, W)``, floating point.

    Args:
        given: A picture file, a photograph's name (:func:`~.photographs.photograph`), a PIL picture, or a tensor
            ``(3, H, W)`` or ``(K, 3, H, W)`` in [0, 1].
        name: Of the loss, for the message.

    Raises:
        InputError: When it is none of these, the file cannot be read, or the tensor is on another scale.
    """
    if isinstance(given, str | Path) or hasattr(given, "getbands"):
        if isinstance(given, str) and not given:
            raise InputError(
                f"The loss {name!r} needs a reference picture: {name}:path/to/picture.png, or a photograph's name, "
                f"{name}:skimage/coffee."
            )
        return load_picture(given)[None]
    if not isinstance(given, Tensor) or given.ndim not in (3, 4):
        got = f"{tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(
            f"The reference of the loss {name!r} must be a picture file or a tensor (3, H, W) or (K, 3, H, W) in "
            f"[0, 1], or a PIL picture; got {got}."
        )
    pictures = given.detach() if given.ndim == 4 else given.detach()[None]
    check_images(pictures)
    check_range(pictures, f"{name}, for its reference,")
    return pictures


def match(reference: Tensor, images: Tensor, name: str) -> Tensor:
    """What is known of the references, ``(K, ...)``, in the pictures' dtype, on their device.

    Raises:
        InputError: When there are several references, but not one for each picture.
    """
    if len(reference) not in (1, len(images)):
        raise InputError(
            f"The loss {name!r} has {len(reference)} reference pictures for {len(images)} pictures; "
            "give one, or one for each."
        )
    return reference.to(images)


def spec_of(name: str, given: Picture, model: object = None) -> str:
    """``name:file@model`` as far as these are text."""
    text = f"{name}:{given}" if isinstance(given, str | Path) else name
    return f"{text}@{model}" if isinstance(model, str) else text
