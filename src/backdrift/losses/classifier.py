"""A network that says what is in a picture, behind one face.

A :class:`Classifier` hides the differences between three sorts of network: the built-in one with its three
answers (digit, colour, background), an image classifier of transformers, and any module that returns
``(N, K)`` logits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..suggest import closest
from .resize import Kernel, prepare


class Classifier(nn.Module):
    """A network that names what is in a picture, ready for pictures in [0, 1] of any size.

    Args:
        network: Returns ``(N, K)`` logits, an object with ``.logits``, or a dict of head -> logits.
        labels: The classes of each head, ``{head: [name, …]}``; for a network of one head a plain list;
            by default what the network itself tells (``config.id2label``, or ``digits``, ``colours`` and
            ``backgrounds``), else the classes are called by their number.
        size: Side in pixels that the network wants; by default pictures go in as they are.
        mean, std: Normalisation of pictures in [0, 1]; by default none.
        kernel: Of the resizing.

    Raises:
        InputError: When a batch-norm or dropout layer is in training mode, which would mix the samples
            or make the loss random.
    """

    def __init__(
        self,
        network: nn.Module,
        labels: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        *,
        size: int | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        kernel: Kernel = "bicubic",
    ) -> None:
        super().__init__()
        check_eval(network)
        self.network = network
        self.labels = _labels(network) if labels is None else _by_head(labels)
        self.size = size
        self.kernel: Kernel = kernel
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of each head, ``{head: (N, K)}``; the arithmetic is in the network's own dtype."""
        size = self.size or min(images.shape[-2:])
        pixels = images
        if self.size is not None or bool((self.mean != 0).any() or (self.std != 1).any()):
            pixels = prepare(images, size, self.mean, self.std, self.kernel)
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        out: Any = self.network(pixels if weight is None else pixels.to(weight.dtype))
        out = getattr(out, "logits", out)
        heads = dict(out) if isinstance(out, Mapping) else {"class": out}
        for head, logits in heads.items():
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InputError(
                    f"A classifier must return logits of shape ({len(images)}, classes), got {shape}."
                )
            # a class is decided in the pictures' precision, whatever the network's
            heads[head] = logits.to(images.dtype)
        return heads

    def find(self, text: str | int) -> dict[str, int]:
        """The classes that ``text`` names, ``{head: index}``: a label, a number, or a phrase of several.

        In a phrase such as "a red seven on grass" every label is looked for as a word, the longest first,
        and each head takes the first it can; ``head=label`` says it outright.

        Raises:
            InputError: When ``text`` names no class, or a number that is too large.
        """
        if not self.labels:
            if str(text).strip().isdigit():
                return {"class": int(text)}
            raise InputError(f"This classifier's classes have no names; give a number, not {text!r}.")
        text = str(text).strip()
        if "=" in text:
            return dict(self._outright(part) for part in text.split(","))
        for head, names in self.labels.items():
            lowered = [name.lower() for name in names]
            if text.lower() in lowered:
                return {head: lowered.index(text.lower())}
            if text.isdigit() and len(self.labels) == 1:
                return {head: _within(int(text), names)}
        found = self._phrase(text)
        if not found:
            every = [name for names in self.labels.values() for name in names]
            shown = ", ".join(every[:40]) + (f", … ({len(every)} classes)" if len(every) > 40 else "")
            raise InputError(
                f"The classifier knows no class {text!r}.{closest(text, every)} There are: {shown}."
            )
        return found

    def _outright(self, part: str) -> tuple[str, int]:
        head, _, name = (piece.strip() for piece in part.partition("="))
        if head not in self.labels:
            raise InputError(f"The classifier has no head {head!r}; it has {', '.join(self.labels)}.")
        names = list(self.labels[head])
        if name not in names:
            raise InputError(
                f"The classifier's head {head!r} has no class {name!r}.{closest(name, names)} "
                f"There are: {', '.join(names)}."
            )
        return head, names.index(name)

    def _phrase(self, text: str) -> dict[str, int]:
        """Labels as words; "on X" is left to the last head that knows X (the background)."""
        found: dict[str, int] = {}
        words = [(name, head, i) for head, names in self.labels.items() for i, name in enumerate(names)]
        rest = text.lower()
        for name, head, index in sorted(words, key=lambda w: -len(w[0])):  # sorted() is stable
            pattern = (
                rf"\bon {re.escape(name.lower())}\b"
                if head == "background"
                else rf"(?<!on )\b{re.escape(name.lower())}\b"
            )
            if head not in found and re.search(pattern, rest):
                found[head] = index
        return found


def load_classifier(source: str | None = None) -> Classifier:
    """The built-in classifier (``None``), or an image classifier of transformers by path or hub id.

    Raises:
        InputError: When it cannot be loaded.
    """
    if source is None:
        from ..pipelines import assets

        return Classifier(assets.load_classifier(), size=64)
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        network = AutoModelForImageClassification.from_pretrained(source).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"No image classifier can be loaded from {source!r}: {_first_line(error)}"
        ) from error
    try:
        how = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{source!r} has no usable image processor: {_first_line(error)}") from error
    side = how.size.get("shortest_edge") or how.size.get("height")
    if getattr(how, "do_center_crop", False) and getattr(how, "crop_size", None):
        side = how.crop_size["height"]
    mean, std = (how.image_mean, how.image_std) if how.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    kernel: Kernel = "bilinear" if how.resample == 2 else "bicubic"  # Pillow's number for it
    return Classifier(network, size=int(side), mean=mean, std=std, kernel=kernel)


def as_classifier(given: Classifier | nn.Module | None) -> Classifier:
    """``given`` as a :class:`Classifier`; the built-in one for ``None``."""
    if given is None:
        return load_classifier()
    return given if isinstance(given, Classifier) else Classifier(given)


def split_model(text: str) -> tuple[str, str | None]:
    """``"text@model"`` -> ``("text", "model")``; ``("text", None)`` without an ``@``."""
    before, at, after = text.rpartition("@")
    return (before.strip(), after.strip() or None) if at else (text.strip(), None)


def check_eval(network: nn.Module, what: str = "classifier") -> None:
    """Raise :class:`InputError` if a layer would make the answer random or mix the samples."""
    random = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    for name, module in network.named_modules():
        if isinstance(module, random) and module.training:
            raise InputError(
                f"The {what}'s layer {name or type(module).__name__!r} is in training mode: its answer "
                f"would be random or depend on the other samples. Call .eval() on the {what} first."
            )


def _labels(network: nn.Module) -> dict[str, list[str]]:
    named = {"digit": "digits", "colour": "colours", "background": "backgrounds"}
    if all(hasattr(network, attribute) for attribute in named.values()):
        return {
            head: [str(name) for name in getattr(network, attribute)] for head, attribute in named.items()
        }
    names = getattr(getattr(network, "config", None), "id2label", None)
    return {"class": [str(names[i]) for i in sorted(names)]} if names else {}


def _by_head(labels: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, list[str]]:
    if isinstance(labels, Mapping):
        return {head: [str(name) for name in names] for head, names in labels.items()}
    return {"class": [str(name) for name in labels]}


def _within(index: int, names: Sequence[str]) -> int:
    if index >= len(names):
        raise InputError(f"Class {index} does not exist: the classifier has {len(names)} classes.")
    return index


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
