"""Stable Diffusion and its kin: components of pipelines whose network is a UNet."""

from __future__ import annotations

from typing import Any

from .tiny import WIDTH, families, pipelines


def stable_diffusion() -> dict[str, Any]:
    return pipelines.tiny_sd(safety_checker=True).components | {"image_encoder": None}


def stable_diffusion_without_checker() -> dict[str, Any]:
    parts = stable_diffusion()
    return parts | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def inpaint() -> dict[str, Any]:
    return stable_diffusion() | {"unet": pipelines.tiny_unet(seed=2, in_channels=9)}


def instruct() -> dict[str, Any]:
    return stable_diffusion_without_checker() | {"unet": pipelines.tiny_unet(seed=2, in_channels=8)}


def latent_consistency() -> dict[str, Any]:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    unet = pipelines.tiny_unet(seed=2, time_cond_proj_dim=8)
    return stable_diffusion() | {"unet": unet, "scheduler": scheduler}


def adapted() -> dict[str, Any]:
    parts = stable_diffusion()
    parts.pop("image_encoder")
    types = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return parts | {"unet": pipelines.tiny_unet(seed=2, **types)}


def stable_diffusion_xl() -> dict[str, Any]:
    return pipelines.tiny_sdxl().components | {
        "vae": pipelines.tiny_vae(force_upcast=True),
        "add_watermarker": False,
    }


def refiner() -> dict[str, Any]:
    """The refiner has one text encoder, the second, and takes scores in place of sizes."""
    unet = pipelines.tiny_sdxl_unet(
        cross_attention_dim=WIDTH, projection_class_embeddings_input_dim=5 * 4 + WIDTH
    )
    absent = {"text_encoder": None, "tokenizer": None}
    return stable_diffusion_xl() | absent | {"unet": unet, "requires_aesthetics_score": True}


def ddpm() -> dict[str, Any]:
    return families.tiny_pixels().components


def controlnet() -> Any:
    """A ControlNetModel."""
    return pipelines.tiny_controlnet().controlnet


def t2i_adapter() -> Any:
    """A T2IAdapter."""
    from diffusers import T2IAdapter

    return T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
