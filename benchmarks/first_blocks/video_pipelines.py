"""Components of pipelines that make videos or sound."""

from __future__ import annotations

from typing import Any

from . import parts
from .tiny import LATENT, WIDTH, families, pipelines


def motion_adapter() -> Any:
    from diffusers import MotionAdapter

    return MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=16,
    )


def animatediff() -> dict[str, Any]:
    return families.tiny_animatediff().components | {"unet": pipelines.tiny_unet(seed=2)}


def wan() -> dict[str, Any]:
    return families.tiny_wan().components | {
        "text_encoder": parts.t5(family="UMT5"),
        "tokenizer": parts.tokenizer(),
    }


def cogvideox() -> dict[str, Any]:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=LATENT,
        sample_height=LATENT,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=226,
    )
    blocks = 4
    decoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * blocks,
        up_block_types=("CogVideoXUpBlock3D",) * blocks,
        block_out_channels=(8,) * blocks,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=64,
        sample_width=64,
    )
    return {
        "tokenizer": parts.tokenizer(),
        "text_encoder": parts.t5(),
        "vae": decoder,
        "transformer": transformer,
        "scheduler": CogVideoXDDIMScheduler(),
    }


def stable_video() -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        UNetSpatioTemporalConditionModel,
    )

    unet = UNetSpatioTemporalConditionModel(
        sample_size=LATENT,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        num_frames=2,
    )
    decoder = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), block_out_channels=(32, 32)
    )
    return {
        "vae": decoder,
        "image_encoder": parts.vision(projection=WIDTH),
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        "feature_extractor": parts.features(224),
    }


def stable_audio() -> dict[str, Any]:
    return families.tiny_stable_audio().components | {
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer(64),
    }
