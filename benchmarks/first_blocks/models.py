"""Small models with random weights, built from each family's own configuration classes, and small pictures.

``small(FluxPipeline, torch_dtype=torch.bfloat16)`` stands in a block where a page has
``FluxPipeline.from_pretrained("…", torch_dtype=torch.bfloat16)``. Weights are rounded to bfloat16 once, so that a block
is the same model in every precision.
"""

from __future__ import annotations

import contextlib
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(
    0, str(Path(__file__).parents[2] / "tests")
)  # the tiny parts live beside the tests that use them

import tiny_families as families
import tiny_pipelines as tiny
from tiny_pipelines import LATENT, PICTURE, WIDTH

device = "cuda" if torch.cuda.is_available() else "cpu"
_TWIN: torch.dtype | None = None  # in which precision to build instead of the one asked for
_BUILDERS: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def built_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block, everything is built in this precision, whatever is asked for."""
    global _TWIN
    before, _TWIN = _TWIN, dtype
    try:
        yield
    finally:
        _TWIN = before


def small(cls: Any, *, torch_dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
    """A pipeline or network of this class: small, seeded, in eval mode.

    Args:
        cls: a class of diffusers.
        torch_dtype: as in ``from_pretrained``.
        parts: components in place of the ones that it would have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _BUILDERS[cls.__name__]()
        made = cls(**{**made, **parts}) if isinstance(made, dict) else made
        modules = [made] if isinstance(made, nn.Module) else _modules(made)
        for module in modules:
            _finish(module.eval())
    if not isinstance(made, nn.Module):
        made.set_progress_bar_config(disable=True)
    return made.to(_TWIN or torch_dtype)


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _finish(module: nn.Module) -> None:
    """Weights in place of those that are zero before training, which would hide every gradient; all rounded."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            if parameter.ndim > 1 and not parameter.any():
                parameter.data.normal_(std=0.1, generator=generator)
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)


def picture(side: int = PICTURE, seed: int = 0) -> Any:
    """A PIL picture in place of a downloaded one: smooth colours."""
    import PIL.Image

    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=side, mode="bilinear")[0]
    return PIL.Image.fromarray((255 * fine).byte().permute(1, 2, 0).numpy())


def mask(side: int = PICTURE) -> Any:
    """A PIL mask: the lower half is to be painted."""
    import PIL.Image

    half = torch.zeros(side, side, dtype=torch.uint8)
    half[side // 2 :] = 255
    return PIL.Image.fromarray(half.numpy())


def lora_weights(pipe: Any) -> dict[str, Tensor]:
    """What a LoRA file for this pipeline's UNet holds."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet = type(pipe.unet).from_config(pipe.unet.config)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(5)
    weights = get_peft_model_state_dict(unet)
    return {
        f"unet.{k}": (0.3 * torch.randn(v.shape, generator=generator)).bfloat16().float()
        for k, v in weights.items()
    }


def ip_adapter_weights(pipe: Any, tokens: int = 4) -> dict[str, Any]:
    """What an IP-Adapter's file for this pipeline's UNet holds."""
    generator, layers, key = torch.Generator().manual_seed(9), {}, 1

    def draw(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).bfloat16().float()

    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{key}.{part}.weight"] = draw(hidden, WIDTH)
            key += 2
    projection = {
        "proj.weight": draw(tokens * WIDTH, 8),
        "proj.bias": torch.zeros(tokens * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": layers}


# ---------------------------------------------------------------------------- parts


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


_VOCABULARY = 128


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=_VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def umt5() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(vocab_size=_VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=_VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=4096,
        )
    )


def glm() -> Any:
    from transformers import GlmConfig, GlmModel

    return GlmModel(
        GlmConfig(
            vocab_size=_VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
        )
    )


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )


def vision(projection: int = 8, size: int = 224, patch: int = 56) -> Any:
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


def parts_of(pipe: Any) -> dict[str, Any]:
    """The components of a ready pipeline, to build another of the same parts."""
    return dict(pipe.components)


# ---------------------------------------------------------------------------- pipelines


def builds(*names: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        _BUILDERS.update(dict.fromkeys(names, build))
        return build

    return register


@builds("StableDiffusionPipeline")
def stable_diffusion() -> dict[str, Any]:
    parts = parts_of(tiny.tiny_sd(safety_checker=True))
    return parts | {"image_encoder": None}


@builds("StableDiffusionImg2ImgPipeline", "StableDiffusionPAGPipeline")
def stable_diffusion_without_checker() -> dict[str, Any]:
    parts = stable_diffusion()
    return parts | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@builds("StableDiffusionInpaintPipeline")
def inpaint() -> dict[str, Any]:
    return stable_diffusion() | {"unet": tiny.tiny_unet(seed=2, in_channels=9)}


@builds("StableDiffusionInstructPix2PixPipeline")
def instruct() -> dict[str, Any]:
    return stable_diffusion_without_checker() | {"unet": tiny.tiny_unet(seed=2, in_channels=8)}


@builds("LatentConsistencyModelPipeline")
def latent_consistency() -> dict[str, Any]:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    unet = tiny.tiny_unet(seed=2, time_cond_proj_dim=8)
    return stable_diffusion() | {"unet": unet, "scheduler": scheduler}


@builds("ControlNetModel")
def controlnet() -> Any:
    return tiny.tiny_controlnet().controlnet


@builds("StableDiffusionControlNetPipeline")
def controlled() -> dict[str, Any]:
    return stable_diffusion()


@builds("T2IAdapter")
def t2i_adapter() -> Any:
    from diffusers import T2IAdapter

    return T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")


@builds("StableDiffusionAdapterPipeline")
def adapted() -> dict[str, Any]:
    parts = stable_diffusion()
    parts.pop("image_encoder")
    types = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return parts | {"unet": tiny.tiny_unet(seed=2, **types)}


@builds("StableDiffusionXLPipeline")
def stable_diffusion_xl() -> dict[str, Any]:
    parts = parts_of(tiny.tiny_sdxl())
    return parts | {"vae": tiny.tiny_vae(force_upcast=True), "add_watermarker": False}


@builds("StableDiffusionXLImg2ImgPipeline")
def refiner() -> dict[str, Any]:
    """The refiner has one text encoder, the second, and takes scores in place of sizes."""
    parts = stable_diffusion_xl() | {"text_encoder": None, "tokenizer": None}
    unet = tiny.tiny_unet(
        seed=2,
        cross_attention_dim=WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=5 * 4 + WIDTH,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return parts | {"unet": unet, "requires_aesthetics_score": True}


@builds("StableDiffusion3Pipeline")
def stable_diffusion_3() -> dict[str, Any]:
    return parts_of(tiny.tiny_sd3()) | {"text_encoder_3": _wide_t5(), "tokenizer_3": tokenizer()}


def _wide_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=_VOCABULARY, d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


@builds("FluxPipeline")
def flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    pipe = tiny.tiny_flux()
    transformer = FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True)
    texts = {"text_encoder": tiny.tiny_text_encoder(seed=1), "tokenizer": tiny.tiny_tokenizer()}
    texts |= {"text_encoder_2": t5(), "tokenizer_2": tokenizer()}
    return parts_of(pipe) | {"transformer": transformer} | texts


@builds("ChromaPipeline")
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
        "vae": flow_vae(),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
        "transformer": transformer,
    }


@builds("PixArtSigmaPipeline")
def pixart() -> dict[str, Any]:
    return parts_of(families.tiny_pixart()) | {"text_encoder": t5(), "tokenizer": tokenizer()}


@builds("SanaPipeline")
def sana() -> dict[str, Any]:
    return parts_of(families.tiny_sana()) | {"text_encoder": gemma(), "tokenizer": tokenizer(4096)}


@builds("DiTPipeline")
def dit() -> dict[str, Any]:
    return parts_of(families.tiny_dit())


@builds("DDPMPipeline")
def ddpm() -> dict[str, Any]:
    return parts_of(families.tiny_pixels())


@builds("HunyuanDiTPipeline")
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
        "vae": vae(levels=4),
        "text_encoder": bert(),
        "tokenizer": tokenizer(77),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(256),
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


@builds("Lumina2Pipeline")
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
        "vae": flow_vae(),
        "text_encoder": gemma(),
        "tokenizer": tokenizer(),
    }


@builds("CogView4Pipeline")
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
        "tokenizer": tokenizer(1024, side="left"),
        "text_encoder": glm(),
        "vae": flow_vae(),
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
    }


@builds("MotionAdapter")
def motion_adapter() -> Any:
    from diffusers import MotionAdapter

    return MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=16,
    )


@builds("AnimateDiffPipeline")
def animatediff() -> dict[str, Any]:
    parts = parts_of(families.tiny_animatediff())
    return parts | {"unet": tiny.tiny_unet(seed=2)}


@builds("WanPipeline")
def wan() -> dict[str, Any]:
    return parts_of(families.tiny_wan()) | {"text_encoder": umt5(), "tokenizer": tokenizer()}


@builds("CogVideoXPipeline")
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
        "tokenizer": tokenizer(),
        "text_encoder": t5(),
        "vae": decoder,
        "transformer": transformer,
        "scheduler": CogVideoXDDIMScheduler(),
    }


@builds("StableVideoDiffusionPipeline")
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
        "image_encoder": vision(projection=WIDTH),
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
        "feature_extractor": features(224),
    }


@builds("StableAudioPipeline")
def stable_audio() -> dict[str, Any]:
    return parts_of(families.tiny_stable_audio()) | {"text_encoder": t5(), "tokenizer": tokenizer(TEXTS)}


TEXTS = 64  # tokens of a prompt for sound


@builds("CLIPVisionModelWithProjection")
def image_encoder() -> Any:
    return vision(size=PICTURE, patch=8)
