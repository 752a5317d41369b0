"""Components of pipelines whose network is a transformer."""

from __future__ import annotations

from typing import Any

from . import parts
from .tiny import LATENT, WIDTH, families, pipelines


def stable_diffusion_3() -> dict[str, Any]:
    return pipelines.tiny_sd3().components | {
        "text_encoder_3": parts.t5(2 * WIDTH),
        "tokenizer_3": parts.tokenizer(),
    }


def flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    pipe = pipelines.tiny_flux()
    transformer = FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True)
    texts = {"text_encoder": pipelines.tiny_text_encoder(seed=1), "tokenizer": pipelines.tiny_tokenizer()}
    texts |= {"text_encoder_2": parts.t5(), "tokenizer_2": parts.tokenizer()}
    return pipe.components | {"transformer": transformer} | texts


def chroma() -> dict[str, Any]:
    from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": parts.flow_vae(),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer(),
        "transformer": transformer,
    }


def pixart() -> dict[str, Any]:
    return families.tiny_pixart().components | {"text_encoder": parts.t5(), "tokenizer": parts.tokenizer()}


def sana() -> dict[str, Any]:
    return families.tiny_sana().components | {
        "text_encoder": parts.gemma(),
        "tokenizer": parts.tokenizer(4096),
    }


def dit() -> dict[str, Any]:
    return families.tiny_dit().components


def hunyuan() -> dict[str, Any]:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel

    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=LATENT,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
    )
    return {
        "vae": parts.vae(levels=4),
        "text_encoder": parts.bert(),
        "tokenizer": parts.tokenizer(77),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.tokenizer(256),
        "transformer": transformer,
        "scheduler": DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.018,
            prediction_type="v_prediction",
            clip_sample=False,
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def lumina2() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=LATENT,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 64, 64),
        cap_feat_dim=WIDTH,
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "vae": parts.flow_vae(),
        "text_encoder": parts.gemma(),
        "tokenizer": parts.tokenizer(),
    }


def cogview4() -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=LATENT,
        sample_size=LATENT,
        rope_axes_dim=(64, 64),
    )
    return {
        "tokenizer": parts.tokenizer(1024, side="left"),
        "text_encoder": parts.glm(),
        "vae": parts.flow_vae(),
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
    }
