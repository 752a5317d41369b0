"""PickScore (Kirstain et al., 2023): which picture of a prompt people pick, by a CLIP trained on that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .classifier import split_model
from .clip import CLIPText, load_clip
from .registry import register

CHECKPOINT = "yuvalkirstain/PickScore_v1"
#: The CLIP it was trained from, whose tokenizer it shares.
BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@register("pickscore", argument="a text (default: the prompt) [@model]", example="pickscore:@clip")
class PickScore(CLIPText):
    """Minus PickScore, ``s cos(picture, text)`` with the model's learned scale s (about 100): scores are about 20.

    Args:
        text: The text; ``None`` for each picture's own prompt.
        model: Folder or hub id, or a transformers ``CLIPModel``; by default the published one.
        tokenizer: Of a model that is handed in.
        mean, std: Pixel statistics of a model that is handed in; by default OpenAI's.

    Raises:
        InputError: When it cannot be loaded, a text is over the token limit, or there is neither text nor prompt.
    """

    bounded = True

    def __init__(
        self,
        text: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        named = CHECKPOINT if model is None else model if isinstance(model, str) else None
        given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "mean": mean, "std": std}
        super().__init__(text, **(load_clip(named, BASE) if named else given), distance="cosine")
        self.spec = f"{self.name}:{text or ''}" + (f"@{model}" if isinstance(model, str) else "")

    @classmethod
    def from_text(cls, text: str) -> PickScore:
        wanted, model = split_model(text)
        return cls(wanted or None, model)

    def compare(self, pictures: Tensor, texts: Tensor) -> Tensor:
        return -self.model.logit_scale.exp().to(pictures.dtype) * (pictures * texts).sum(-1)
