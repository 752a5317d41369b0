"""HPSv2, Human Preference Score v2 (Wu et al., 2023): a CLIP ViT-H/14 trained on people's rankings of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .checkpoints import find_weights, read_weights
from .classifier import split_model
from .clip import CLIPText, load_clip, load_tokenizer
from .open_clip import from_open_clip
from .pickscore import BASE
from .registry import register
from .resize import resize

#: The published weights, in open_clip's layout.
CHECKPOINTS = {
    "v2.0": "xswu/HPSv2/HPS_v2_compressed.pt",
    "v2.1": "xswu/HPSv2/HPS_v2.1_compressed.pt",
}
FILES = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt", "open_clip_pytorch_model.bin")
#: Width of an attention head in ViT-H/14's vision tower: 1280 over 16 heads.
VISION_HEAD = 80


@register("hpsv2", argument="a text (default: the prompt) [@v2.0, v2.1 or a model]", example="hpsv2:@clip")
class HPSv2(CLIPText):
    """Minus HPSv2, the cosine between picture and text in the trained CLIP's space: scores are about 0.3.

    As in the published code, pictures are shrunk by their longer side and laid on black, not cropped.

    Args:
        text: The text; ``None`` for each picture's own prompt.
        model: ``"v2.1"`` (default) or ``"v2.0"``, the published weights; a file or hub file of a ViT-H/14 in
            open_clip's layout; a folder or hub id in transformers' layout; or a ``CLIPModel``.
        tokenizer: Of a model that is handed in, and in place of ViT-H/14's.
        mean, std: Pixel statistics of a model that is handed in; by default OpenAI's.

    Raises:
        InputError: When it cannot be loaded, a text is over the token limit, or there is neither text nor prompt.
    """

    bounded = True

    def __init__(
        self,
        text: str | None = None,
        model: Any = "v2.1",
        tokenizer: Any = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "mean": mean, "std": std}
        if isinstance(model, str):
            given = _load(model, tokenizer)
        super().__init__(text, **given, distance="cosine")
        self.spec = f"{self.name}:{text or ''}" + (f"@{model}" if isinstance(model, str) else "")

    @classmethod
    def from_text(cls, text: str) -> HPSv2:
        wanted, model = split_model(text)
        return cls(wanted or None, model or "v2.1")

    def pixels(self, images: Tensor) -> Tensor:
        return (letterbox(images, self.size) - self.mean.to(images)[:, None, None]) / self.std.to(images)[
            :, None, None
        ]

    def compare(self, pictures: Tensor, texts: Tensor) -> Tensor:
        return -(pictures * texts).sum(-1)


def letterbox(images: Tensor, size: int) -> Tensor:
    """Pictures resized so that the longer side is ``size``, in the middle of a black square of that side."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size - rows) // 2, (size - columns) // 2
    return nn.functional.pad(
        resize(images, (rows, columns)), (left, size - columns - left, top, size - rows - top)
    )


def _load(source: str, tokenizer: Any) -> dict[str, Any]:
    folder = Path(source).expanduser()
    weights = folder.suffix in (".pt", ".pth", ".bin", ".safetensors")
    hub_id = source.count("/") == 1 and not folder.exists() and not weights
    if (folder / "config.json").is_file() or hub_id:
        loaded = load_clip(source, BASE)
        return loaded if tokenizer is None else {**loaded, "tokenizer": tokenizer}
    path = find_weights(CHECKPOINTS.get(source, source), FILES, "HPSv2")
    model = from_open_clip(read_weights(path), vision_head=VISION_HEAD)
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(str(path.parent), BASE)
        except (OSError, ValueError, TypeError) as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"HPSv2 needs the tokenizer of {BASE}, which cannot be loaded ({line}); put its vocab.json and "
                f"merges.txt beside {path.name}."
            ) from error
    return {"model": model, "tokenizer": tokenizer}
