"""More tiny pipelines with seeded random weights: pixels, transformers, video, sound, and one modular pipeline.

As in ``tiny_pipelines``, every part is the real class, built from its own configuration. Those whose text encoder
is a large language model come without one: call them with the embeddings of :func:`embeddings`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_pipelines import (
    LATENT,
    TOKENS,
    WIDTH,
    tiny_ddim,
    tiny_sdxl,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)


def finished(pipe: Any) -> Any:
    """The pipeline, quiet, in eval mode, with weights in place of those that are zero before training."""
    generator = torch.Generator().manual_seed(0)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()
            for parameter in module.parameters():  # a zero last layer would hide every gradient
                if parameter.ndim > 1 and not parameter.any():
                    parameter.data.normal_(std=0.1, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pixels(name: str = "DDPMPipeline") -> Any:
    """An unconditional pipeline in pixels: DDPMPipeline or DDIMPipeline; 8x8 pictures."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=LATENT,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    scheduler = getattr(diffusers, name.replace("Pipeline", "Scheduler"))(clip_sample=False)
    return finished(getattr(diffusers, name)(unet=unet, scheduler=scheduler))


def tiny_dit() -> Any:
    """A DiTPipeline: class labels, no prompt, no ``latents=``."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=LATENT,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    return finished(DiTPipeline(transformer=transformer, vae=tiny_vae(), scheduler=scheduler))


def tiny_pixart() -> Any:
    """A PixArtSigmaPipeline without its T5."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=LATENT,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    return finished(
        PixArtSigmaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=tiny_vae(),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(),
        )
    )


def tiny_sana() -> Any:
    """A SanaPipeline without its Gemma: linear attention, AutoencoderDC."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return finished(
        SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    )


def tiny_animatediff() -> Any:
    """An AnimateDiffPipeline: a UNet of pictures with a motion adapter."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=4,
    )
    return finished(
        AnimateDiffPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(seed=1),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(seed=2),
            motion_adapter=adapter,
            scheduler=tiny_ddim(),
        )
    )


def tiny_wan() -> Any:
    """A WanPipeline without its T5: flow matching in space and time."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=1,
        scale_factor_spatial=2,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return finished(
        WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    )


def tiny_cogvideox() -> Any:
    """A CogVideoXPipeline without its T5: text and video as the tokens of one transformer."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=LATENT,
        sample_height=LATENT,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, snr_shift_scale=1.0
    )
    return finished(
        CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
        )
    )


def tiny_stable_audio() -> Any:
    """A StableAudioPipeline without its T5: two channels of 64 samples."""
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=4,
        time_proj_dim=4,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = StableAudioProjectionModel(
        text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
    )
    return finished(
        StableAudioPipeline(
            tokenizer=None,
            text_encoder=None,
            projection_model=projection,
            vae=vae,
            transformer=transformer,
            scheduler=EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction"),
        )
    )


def tiny_modular() -> Any:
    """Stable Diffusion XL as a modular pipeline, from the parts of ``tiny_sdxl``."""
    from diffusers import ClassifierFreeGuidance, EulerDiscreteScheduler, StableDiffusionXLAutoBlocks

    names = ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = tiny_sdxl().components
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(
        **{name: parts[name] for name in names},
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        guider=ClassifierFreeGuidance(guidance_scale=5.0),
        force_zeros_for_empty_prompt=True,
    )
    return finished(pipe)
