"""ImageReward (Xu et al., 2023): how people would rate a picture for its prompt, by BLIP and linear layers.

The picture's tokens (ViT-L/16) are attended to by BLIP's text encoder; the head reads the text's first token; the
score is standardised with the published mean and deviation over the training pictures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Loss
from .checkpoints import find_weights, read_weights
from .classifier import split_model
from .clip import OPENAI_MEAN, OPENAI_STD
from .linear_stack import linear_stack
from .registry import register
from .resize import prepare

CHECKPOINT = "THUDM/ImageReward/ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
#: Tokens of a prompt that the model was trained on; the rest of a longer one is not seen, as in the published code.
TOKENS = 35
#: Of the raw score over the training pictures.
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
#: Width of an attention head in both halves.
HEAD = 64

_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


class RewardNetwork(nn.Module):
    """The picture encoder, the text encoder and the head of an ImageReward checkpoint, in float32, frozen.

    Args:
        state: Tensors by the checkpoint's names: ``blip.visual_encoder.*``, ``blip.text_encoder.*``, ``mlp.layers.*``.

    Raises:
        InputError: When names or shapes are not those.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        try:
            vision, text = _part(state, "blip.visual_encoder."), _part(state, "blip.text_encoder.")
            for old, new in _VISION:
                vision = {re.sub(old, new, name): tensor for name, tensor in vision.items()}
            text.pop("embeddings.position_ids", None)
            patches, words = (
                vision["embeddings.patch_embedding.weight"],
                text["embeddings.word_embeddings.weight"],
            )
            side = round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patches.shape[-1]
            seen = BlipVisionConfig(
                hidden_size=patches.shape[0],
                num_attention_heads=patches.shape[0] // HEAD,
                image_size=side,
                patch_size=patches.shape[-1],
                intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_depth(vision, "encoder.layers."),
                layer_norm_eps=1e-6,
            )
            read = BlipTextConfig(
                hidden_size=words.shape[1],
                num_attention_heads=words.shape[1] // HEAD,
                vocab_size=words.shape[0],
                encoder_hidden_size=patches.shape[0],
                intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_depth(text, "encoder.layer."),
                max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
            )
            self.vision = BlipVisionModel(seen)
            self.text = BlipTextModel(read, add_pooling_layer=False)
            self.vision.load_state_dict(vision)
            self.text.load_state_dict(text)
        except (KeyError, RuntimeError, ValueError) as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(
                "These weights are not those of ImageReward (blip.visual_encoder.*, blip.text_encoder.*, "
                f"mlp.layers.*): {line}"
            ) from error
        self.head = linear_stack(_part(state, "mlp."), "ImageReward's head")
        self.size = side
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Standardised scores ``(N,)`` of normalised pictures and the token ids ``(N, L)`` of their prompts."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0])[:, 0] - SCORE_MEAN) / SCORE_STD


@register(
    "imagereward", argument="a text (default: the prompt) [@weights]", example="imagereward:@ImageReward.pt"
)
class ImageReward(Loss):
    """Minus ImageReward's standardised score (mostly between -2 and 2).

    Args:
        text: The text; ``None`` for each picture's own prompt. Tokens after the 35th are not seen.
        model: A file of the published layout, a folder with it or a hub id, by default ``THUDM/ImageReward``; or a
            :class:`RewardNetwork`. The ``vocab.txt`` beside the file is used, else bert-base-uncased's.
        tokenizer: Of a network that is handed in.

    Raises:
        InputError: When it cannot be loaded, or there is neither text nor prompt.
    """

    bounded = True

    def __init__(self, text: str | None = None, model: Any = None, tokenizer: Any = None) -> None:
        super().__init__()
        source = model
        if model is None or isinstance(model, str | Path):
            path = find_weights(model or CHECKPOINT, ("ImageReward.pt",), "ImageReward")
            model = RewardNetwork(read_weights(path))
            tokenizer = tokenizer or _load_tokenizer(path.parent)
        elif tokenizer is None:
            raise InputError("Give an ImageReward network together with its tokenizer.")
        self.text = text
        self.network = model
        self.tokenizer = tokenizer
        self.register_buffer("mean", torch.tensor(OPENAI_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_STD), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.spec = f"imagereward:{text or ''}" + (f"@{source}" if isinstance(source, str) else "")

    @classmethod
    def from_text(cls, text: str) -> ImageReward:
        wanted, model = split_model(text)
        return cls(wanted or None, model)

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        if self.text is None and prompts is None:
            raise InputError(
                "The loss 'imagereward' has neither a text nor a prompt: write for instance imagereward:a blue two."
            )
        texts = [self.text] * len(images) if self.text is not None else list(prompts or ())
        read = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(images.device)
        pixels = prepare(images, self.network.size, self.mean, self.std)
        dtype = next(self.network.parameters()).dtype
        # Where only shapes are counted nothing can be masked: transformers looks into the mask.
        mask = None if images.device.type == "meta" else read["attention_mask"]
        return -self.network(pixels.to(dtype), read["input_ids"], mask).to(images.dtype)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _load_tokenizer(folder: Path) -> Any:
    from transformers import BertTokenizer

    source = str(folder) if (folder / "vocab.txt").is_file() else TOKENIZER
    try:
        return BertTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"ImageReward needs the tokenizer {source}, which cannot be loaded ({line}); put its vocab.txt beside "
            "the weights."
        ) from error
