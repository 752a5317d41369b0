"""Whose face it is, by an ArcFace network (Deng et al., 2019): the distance of face embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Loss
from .classifier import check_eval, split_model
from .clip import angle_loss
from .reference import Picture, as_pictures, match, spec_of
from .registry import register
from .resize import prepare

#: Side in pixels, and pixel statistics, that the published ArcFace networks take.
SIDE, MEAN, STD = 112, 0.5, 0.5


@register("identity", argument="a picture file @ a network file", example="identity:target.png@face.pt")
class Identity(Loss):
    """Distance between unit embeddings of the pictures' faces and a reference face.

    ArcFace networks know aligned faces that fill a square; nothing here finds or aligns a face. Give a reference that
    is cropped so, and the ``box`` of the face in the pictures where it is not their centre square.

    Args:
        reference: A picture file, or a tensor ``(3, H, W)`` (or one for each sample, ``(N, 3, H, W)``) in [0, 1].
        model: A module from ``(N, 3, 112, 112)`` RGB pictures in [-1, 1] to embeddings ``(N, D)``, in eval mode; an
            ONNX file such as insightface's ``w600k_r50.onnx`` (with the extra ``faces``, onnx2torch); or a TorchScript
            file (``.pt``).
        distance: ``"l2"``, the length of the difference, as in SAG's and FreeDoM's face guidance; ``"cosine"``; or
            ``"spherical"``, half the squared angle.
        box: Top, left, bottom and right of the face in the pictures, as parts of height and width in [0, 1].
        size: Side in pixels that the network wants.

    Raises:
        InputError: When something cannot be loaded, the network is in training mode, or it does not return embeddings.
    """

    bounded = True

    def __init__(
        self,
        reference: Picture,
        model: nn.Module | str | Path,
        distance: Literal["l2", "cosine", "spherical"] = "l2",
        box: tuple[float, float, float, float] | None = None,
        size: int = SIDE,
    ) -> None:
        super().__init__()
        if distance not in ("l2", "cosine", "spherical"):
            raise InputError(f"distance must be 'l2', 'cosine' or 'spherical', got {distance!r}.")
        if box is not None and not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise InputError(
                "box must be (top, left, bottom, right) with 0 <= top < bottom <= 1 and 0 <= left < right <= 1, "
                f"got {box}."
            )
        pictures = as_pictures(reference, "identity")
        self.network = model if isinstance(model, nn.Module) else load_face_network(model)
        check_eval(self.network, "face network")
        self.distance, self.box, self.size = distance, box, size
        self.register_buffer("mean", torch.full((3,), MEAN), persistent=False)
        self.register_buffer("std", torch.full((3,), STD), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.spec = spec_of("identity", reference, str(model) if isinstance(model, str | Path) else None)
        weight = next(self.network.parameters(), self.mean)
        with torch.no_grad():
            known = self.embed(pictures.to(weight.device))
        self.register_buffer("known", known, persistent=False)
        self.known: Tensor

    @classmethod
    def from_text(cls, text: str) -> Identity:
        picture, model = split_model(text)
        if model is None:
            raise InputError(
                "The loss 'identity' needs a face network: identity:face.png@w600k_r50.onnx (none has a common home)."
            )
        return cls(picture, model)

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        if self.box is not None:
            height, width = images.shape[-2:]
            top, left, bottom, right = self.box
            rows = slice(round(top * height), max(round(top * height) + 1, round(bottom * height)))
            columns = slice(round(left * width), max(round(left * width) + 1, round(right * width)))
            images = images[..., rows, columns]
        embedded = self.embed(images)
        known = match(self.known, images, "identity").expand_as(embedded)
        if self.distance == "l2":
            return torch.linalg.vector_norm(embedded - known, dim=-1)
        return angle_loss(embedded, known, "cosine" if self.distance == "cosine" else "spherical")

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings ``(N, D)`` of pictures of faces, in the pictures' dtype."""
        pixels = prepare(images, self.size, self.mean, self.std, "bilinear")
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        found = self.network(pixels if weight is None else pixels.to(weight.dtype))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"A face network must return embeddings ({len(images)}, D), got {got}.")
        return nn.functional.normalize(found.to(images.dtype), dim=-1)


def load_face_network(source: str | Path) -> nn.Module:
    """An ONNX file as a torch module, or a TorchScript file; in eval mode, frozen.

    Raises:
        InputError: When the file is missing or of neither kind, or onnx2torch is not installed.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"The face network {str(source)!r} does not exist (seen from {Path.cwd()}).")
    if path.suffix == ".onnx":
        try:
            from onnx2torch import convert
        except ImportError as error:
            raise InputError(
                f"Reading {path.name} needs onnx2torch: pip install 'backdrift[faces]' ({error})."
            ) from error
        network: nn.Module = convert(str(path))
    else:
        try:
            network = torch.jit.load(str(path), map_location="cpu")
        except RuntimeError as error:
            raise InputError(
                f"{str(source)!r} is neither an ONNX file (.onnx) nor TorchScript; hand the network in as a module."
            ) from error
    for parameter in network.parameters():  # TorchScript has no requires_grad_ for all of them
        parameter.requires_grad_(False)
    return network.eval()
