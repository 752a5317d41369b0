"""The picture that a loss compares with: from a file or a tensor, one for all samples or one for each."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import InputError
from .base import check_images
from .mse import load_picture

#: A picture in [0, 1], ``(3, H, W)`` or ``(K, 3, H, W)``, or a picture file's path or a photograph's name.
Picture = Tensor | str | Path


def as_pictures(given: Picture, name: str) -> Tensor:
    """``(K, 3, H, W)``, floating point.

    Args:
        given: A picture file, a photograph's name (:func:`~.photographs.photograph`), or a tensor ``(3, H, W)`` or
            ``(K, 3, H, W)`` in [0, 1].
        name: Of the loss, for the message.

    Raises:
        InputError: When it is none of these, or the file cannot be read.
    """
    if isinstance(given, str | Path):
        if not str(given):
            raise InputError(
                f"The loss {name!r} needs a reference picture: {name}:path/to/picture.png, or a photograph's name, "
                f"{name}:skimage/coffee."
            )
        return load_picture(given)[None]
    if not isinstance(given, Tensor) or given.ndim not in (3, 4):
        got = f"{tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(
            f"The reference of the loss {name!r} must be a picture file or a tensor (3, H, W) or "
            f"(K, 3, H, W) in [0, 1], got {got}."
        )
    pictures = given.detach() if given.ndim == 4 else given.detach()[None]
    check_images(pictures)
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
