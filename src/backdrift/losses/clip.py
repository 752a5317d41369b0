"""How well pictures fit a text, by CLIP (Radford et al., 2021).

With unit embeddings u of the picture and v of the text and theta the angle between them, the value is
``theta^2 / 2`` ("spherical": the squared great-circle distance ``2 arcsin^2(|u - v| / 2)`` usual in guided
diffusion) or ``1 - cos theta`` ("cosine"). The angle is ``2 atan2(|u - v|, |u + v|)``: unlike arccos and
arcsin it loses no digits near 0 and pi, and its gradient stays finite there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from .base import Loss
from .classifier import split_model
from .registry import register
from .resize import prepare

Distance = Literal["spherical", "cosine"]

#: The pixel statistics that the published CLIP models were trained with.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@register("clip", argument="a text (default: the prompt) [@model]", example="clip:a blue two")
class CLIPText(Loss):
    """Distance between the pictures and a text, or their own prompts, in CLIP's space.

    Args:
        text: The text; ``None`` for each picture's own prompt.
        model: A transformers ``CLIPModel``; by default the built-in one, together with its tokenizer.
        tokenizer: Its ``CLIPTokenizer``.
        distance: ``"spherical"`` or ``"cosine"``.
        mean, std: Pixel statistics of the model; by default OpenAI's (of the built-in model: its own, 0.5).

    Raises:
        InputError: When the text is over the model's token limit, or there is neither text nor prompt.
    """

    bounded = True

    def __init__(
        self,
        text: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        distance: Distance = "spherical",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if distance not in ("spherical", "cosine"):
            raise InputError(f"distance must be 'spherical' or 'cosine', got {distance!r}.")
        if (model is None) != (tokenizer is None):
            raise InputError("Give both a CLIP model and its tokenizer, or neither for the built-in one.")
        if model is None:
            from ..pipelines import assets

            model, tokenizer = assets.load_clip()
            mean, std = mean or (0.5,) * 3, std or (0.5,) * 3
        self.text = text
        self.model = model
        self.tokenizer = tokenizer
        self.distance: Distance = distance
        self.size = int(model.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(mean or OPENAI_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(std or OPENAI_STD), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self._known: dict[str, Tensor] = {}
        self.spec = "clip" if text is None else f"clip:{text}"
        if text is not None:
            self._tokens([text])  # a text that is too long is refused now, not after the first run

    @classmethod
    def from_text(cls, text: str) -> CLIPText:
        wanted, source = split_model(text)
        if source is None:
            return cls(wanted or None)
        return cls(wanted or None, **load_clip(source))

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        if self.text is None and prompts is None:
            raise InputError(
                f"The loss {self.name!r} has neither a text nor a prompt: write for instance {self.name}:a blue two."
            )
        pictures = self.embed_images(images)
        texts = self.embed_texts([self.text] if self.text is not None else list(prompts or ())).to(pictures)
        return self.compare(pictures, texts.expand_as(pictures))

    def compare(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """The value of each pair of unit embeddings ``(N, D)``; ``(N,)``."""
        return angle_loss(pictures, texts, self.distance)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings ``(N, D)`` of ``(N, 3, H, W)`` pictures in [0, 1], in the pictures' dtype."""
        pixels = self.pixels(images)
        pooled = self.model.vision_model(pixel_values=pixels.to(self.model.dtype)).pooler_output
        return _unit(self.model.visual_projection(pooled).to(images.dtype))

    def pixels(self, images: Tensor) -> Tensor:
        """The pictures as the network takes them: resized, cropped, normalised."""
        return prepare(images, self.size, self.mean, self.std)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings ``(len(texts), D)``; a text is embedded once and remembered."""
        new = sorted(set(texts) - self._known.keys())
        if new:
            tokens = self._tokens(new).to(self.model.device)
            pooled = self.model.text_model(**tokens).pooler_output
            for text, row in zip(new, _unit(self.model.text_projection(pooled).float()), strict=True):
                self._known[text] = row
        return torch.stack([self._known[text].to(self.model.device) for text in texts])

    def _tokens(self, texts: list[str]) -> Any:
        limit = int(self.model.config.text_config.max_position_embeddings)
        for text in texts:
            count = len(self.tokenizer(text)["input_ids"])
            if count > limit:
                raise InputError(
                    f"The text {text!r} of the loss {self.name!r} has {count} tokens; the model takes {limit}. "
                    "Shorten it."
                )
        return self.tokenizer(texts, padding="max_length", max_length=limit, return_tensors="pt")


def load_clip(source: str, beside: str | None = None) -> dict[str, Any]:
    """Model, tokenizer and pixel statistics of a CLIP of transformers, as :class:`CLIPText` takes them.

    Args:
        source: Folder or hub id.
        beside: Where the tokenizer is when ``source`` has none.

    Raises:
        InputError: When it cannot be loaded.
    """
    from transformers import CLIPImageProcessor, CLIPModel

    try:
        model = CLIPModel.from_pretrained(source).eval().requires_grad_(False)
        tokenizer = load_tokenizer(source, beside)
    except (OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"No CLIP model can be loaded from {source!r}: {line}") from error
    try:
        how = CLIPImageProcessor.from_pretrained(source)
    except (OSError, ValueError):  # models saved without one were trained with the usual statistics
        return {"model": model, "tokenizer": tokenizer}
    return {"model": model, "tokenizer": tokenizer, "mean": how.image_mean, "std": how.image_std}


def load_tokenizer(source: str, beside: str | None = None) -> Any:
    """The ``CLIPTokenizer`` of a folder or hub id, or of another one where it has none.

    Raises:
        OSError, ValueError: When neither has one.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError):  # missing files show as one or the other
        if beside is None:
            raise
        return CLIPTokenizer.from_pretrained(beside)


def angle_loss(u: Tensor, v: Tensor, distance: Distance) -> Tensor:
    """``theta^2 / 2`` or ``1 - cos(theta)`` of unit vectors ``(N, D)``; ``(N,)``."""
    apart = torch.linalg.vector_norm(u - v, dim=-1)
    if distance == "cosine":
        return apart.square() / 2  # |u - v|^2 = 2 - 2 cos; no digits lost near theta = 0
    together = torch.linalg.vector_norm(u + v, dim=-1)
    return (2 * torch.atan2(apart, together)).square() / 2


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)
