"""Small text encoders, tokenizers, image encoders and autoencoders with random weights."""

from __future__ import annotations

import string
from typing import Any

from .tiny import PICTURE, WIDTH

_VOCABULARY = 128


def tokenizer(length: int = 512, side: str = "right") -> Any:
    """Characters as tokens, in the shape of a SentencePiece tokenizer (T5, Gemma, GLM)."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((c, -3.0) for c in letters if c != "▁"),
    ]
    made = Tokenizer(Unigram(pieces, unk_id=2))
    made.pre_tokenizer = Metaspace()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side=side,
    )


def t5(width: int = WIDTH, family: str = "T5") -> Any:
    """A T5 encoder, or a UMT5 one."""
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return _built(f"{family}EncoderModel", f"{family}Config", **sizes)


def gemma() -> Any:
    """Gemma 2."""
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    return _built("Gemma2Model", "Gemma2Config", **_LAYERS, **heads, max_position_embeddings=4096)


def glm() -> Any:
    """GLM."""
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    return _built("GlmModel", "GlmConfig", **_LAYERS, **heads, pad_token_id=0)


def bert() -> Any:
    """BERT."""
    return _built("BertModel", "BertConfig", **_LAYERS, max_position_embeddings=128)


_LAYERS = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _built(model: str, config: str, **sizes: Any) -> Any:
    import transformers

    settings = getattr(transformers, config)(vocab_size=_VOCABULARY, **sizes)
    return getattr(transformers, model)(settings)


def vision(projection: int = 8, size: int = 224, patch: int = 56) -> Any:
    """A CLIP vision network with its projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=size,
            patch_size=patch,
            projection_dim=projection,
        )
    )


def features(size: int) -> Any:
    """The image processor in front of a CLIP vision network."""
    from transformers import CLIPImageProcessorPil

    sides = {"height": size, "width": size}
    return CLIPImageProcessorPil(size=sides, crop_size=sides)


def vae(levels: int = 2, channels: int = 4, **settings: Any) -> Any:
    """An AutoencoderKL that halves the picture ``levels - 1`` times."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=PICTURE,
        **settings,
    )


def flow_vae(channels: int = 4) -> Any:
    """As SD3 and Flux have it."""
    return vae(channels=channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
