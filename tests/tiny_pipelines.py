"""Tiny pipelines with seeded random weights: every part is the real class, built from its own config.

All have 8x8 latents (``LATENT``) and a few tens of thousands of parameters, so that a whole run with
gradients takes a fraction of a second on one CPU core. They make noise, not pictures: they test arithmetic,
not quality.
"""

from __future__ import annotations

import inspect
import json
import string
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

LATENT = 8  # latents are 8x8; the decoder doubles, so pictures are 16x16
PICTURE = 16
WIDTH = 16  # of the text embeddings
TOKENS = 8  # length of a prompt

_Build = TypeVar("_Build", bound=Callable[..., Any])


def _seeded(build: _Build) -> _Build:
    """Run a builder under its own seed and leave the global random state as it was."""

    @wraps(build)
    def seeded(*args: Any, seed: int = 0, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(*args, **kwargs)

    return seeded  # type: ignore[return-value]


def tiny_tokenizer() -> Any:
    """A CLIP tokenizer whose vocabulary is the ASCII letters and digits, inside and at the end of a word."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + ",."
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if "vocab" in inspect.signature(CLIPTokenizer).parameters:
        return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 reads the two from files
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocab))
        files[1].write_text("#version: 0.2\n")
        return CLIPTokenizer(*map(str, files), model_max_length=TOKENS)


def _text_config(projection: int = WIDTH) -> Any:
    from transformers import CLIPTextConfig

    tokenizer = tiny_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@_seeded
def tiny_text_encoder() -> Any:
    """A CLIP text encoder of two layers."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_text_config()).eval()


@_seeded
def tiny_text_encoder_with_projection(projection: int = WIDTH) -> Any:
    """The same with the pooled, projected output that SDXL and SD3 read."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_text_config(projection)).eval()


@_seeded
def tiny_vae(latent_channels: int = 4, **kwargs: Any) -> Any:
    """An AutoencoderKL that halves the picture once."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=PICTURE,
        **kwargs,
    ).eval()


@_seeded
def tiny_unet(**kwargs: Any) -> Any:
    """A cross-attention UNet of two levels, about 50 000 parameters."""
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "sample_size": LATENT,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **kwargs}).eval()


def tiny_sdxl_unet(**kwargs: Any) -> Any:
    """A UNet that reads the pooled embedding and the sizes beside the prompt, as SDXL's does."""
    config = {
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
        "transformer_layers_per_block": (1, 1),
        "use_linear_projection": True,
    }
    return tiny_unet(seed=2, **{**config, **kwargs})


def _beta_config() -> dict[str, Any]:
    # The names and values of Stable Diffusion's own scheduler config.
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }


def tiny_ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**_beta_config(), clip_sample=False, set_alpha_to_one=False)


def tiny_safety_checker() -> Any:
    """The stock safety checker on a tiny CLIP vision tower."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": PICTURE, "patch_size": 8, "projection_dim": 8}
    text = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).eval()


@_seeded
def _sd_parts(**unet: Any) -> dict[str, Any]:
    return {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(seed=1),
        "tokenizer": tiny_tokenizer(),
        "unet": tiny_unet(seed=2, **unet),
        "scheduler": tiny_ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd(*, safety_checker: bool = False, seed: int = 0, **unet: Any) -> Any:
    """A StableDiffusionPipeline (DDIM); ``unet`` overrides entries of the UNet's config."""
    from diffusers import StableDiffusionPipeline

    parts = _sd_parts(seed=seed, **unet)
    if safety_checker:
        from transformers import CLIPImageProcessorPil

        parts["safety_checker"] = tiny_safety_checker()
        size = {"height": PICTURE, "width": PICTURE}
        parts["feature_extractor"] = CLIPImageProcessorPil(size=size, crop_size=size)
    return _quiet(StableDiffusionPipeline(**parts))


def tiny_sd_img2img() -> Any:
    """A StableDiffusionImg2ImgPipeline from the same parts as :func:`tiny_sd`."""
    from diffusers import StableDiffusionImg2ImgPipeline

    return _quiet(StableDiffusionImg2ImgPipeline(**_sd_parts()))


def tiny_controlnet() -> Any:
    """A StableDiffusionControlNetPipeline from the same parts and a control network of the same widths."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    parts = _sd_parts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16)).eval()
        for parameter in control.parameters():  # its zero convolutions would hide the control image
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return _quiet(StableDiffusionControlNetPipeline(**parts, controlnet=control))


def tiny_sdxl() -> Any:
    """A StableDiffusionXLPipeline: two text encoders, pooled embedding and size conditioning."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return _quiet(
        StableDiffusionXLPipeline(
            vae=tiny_vae(force_upcast=False),
            text_encoder=tiny_text_encoder(seed=1),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=tiny_text_encoder_with_projection(seed=3),
            tokenizer_2=tiny_tokenizer(),
            unet=tiny_sdxl_unet(),
            scheduler=EulerDiscreteScheduler(**_beta_config()),
            add_watermarker=False,
        )
    )


@_seeded
def tiny_sd3() -> Any:
    """A StableDiffusion3Pipeline: MMDiT of two blocks, two text encoders, no T5 (its slots are zeros)."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=LATENT,
    ).eval()
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
            text_encoder=tiny_text_encoder_with_projection(seed=1),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=tiny_text_encoder_with_projection(seed=3),
            tokenizer_2=tiny_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


@_seeded
def tiny_flux() -> Any:
    """A FluxPipeline without text encoders: call it with the embeddings of :func:`embeds_for`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,  # 4 latent channels, packed 2x2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return _quiet(
        FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
        )
    )


def embeds_for(pipe: Any, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompt embeddings, with negative and pooled ones where the pipeline reads them, as call keywords."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    name = type(pipe).__name__
    if name.startswith("Flux"):
        return {"prompt_embeds": random(1, TOKENS, WIDTH), "pooled_prompt_embeds": random(1, WIDTH)}
    if name.startswith("StableDiffusion3"):
        tokens, width, pooled = 2 * TOKENS, 2 * WIDTH, 2 * WIDTH
    elif name.startswith("StableDiffusionXL"):
        tokens, width, pooled = TOKENS, 2 * WIDTH, WIDTH
    else:
        tokens, width, pooled = TOKENS, WIDTH, 0
    out = {"prompt_embeds": random(1, tokens, width), "negative_prompt_embeds": random(1, tokens, width)}
    if pooled:
        out |= {"pooled_prompt_embeds": random(1, pooled), "negative_pooled_prompt_embeds": random(1, pooled)}
    return out


def noise_for(pipe: Any, *, seed: int = 0) -> torch.Tensor:
    """Initial noise in the layout that the pipeline's ``latents=`` expects (Flux packs it 2x2)."""
    generator = torch.Generator().manual_seed(seed)
    if type(pipe).__name__.startswith("Flux"):
        return torch.randn(1, (LATENT // 2) ** 2, 16, generator=generator)
    return torch.randn(1, 4, LATENT, LATENT, generator=generator)
