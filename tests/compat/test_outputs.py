"""What comes back: safety checkers, PIL pictures, arrays, watermarks, tokens."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from traps import Trap

import backdrift as bd
from backdrift.errors import UnsupportedError
from tiny_families import tiny_dit, tiny_pixels, tiny_stable_audio, tiny_wan
from tiny_pipelines import PICTURE, TOKENS, WIDTH, embeds_for, noise_for, tiny_sd, tiny_sdxl

TRAP = Trap(
    'The safety checker, `output_type="pil"` (the default), watermarking, tokenised outputs',
    "`.numpy()` on a tensor that requires grad.",
)
SIZE = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 2}


def noise_gradient(result: Tensor, noise: Tensor) -> Tensor:
    slope = torch.linspace(-1, 1, result.numel()).reshape(result.shape)
    return torch.autograd.grad((result * slope).sum(), noise)[0]


@TRAP.handled(
    "the safety checker runs on a copy: flags in the output and in `run.flagged`, the pictures as they are"
)
def test_flagged_pictures_keep_their_gradient() -> None:
    pipe = tiny_sd(safety_checker=True)
    pipe.safety_checker.concept_embeds_weights.fill_(-2.0)  # below any cosine: it flags everything
    noise = noise_for(pipe).requires_grad_()
    run = bd.differentiable(pipe, "min", clamp=True)
    out = run(**embeds_for(pipe), latents=noise, **SIZE)
    assert out.nsfw_content_detected == run.flagged == [True]
    bare = tiny_sd()
    expected = (
        type(bare)
        .__call__.__wrapped__(bare, **embeds_for(bare), latents=noise, output_type="pt", **SIZE)
        .images
    )
    assert torch.equal(out.images, expected)
    assert torch.equal(noise_gradient(out.images, noise), noise_gradient(expected, noise))


@TRAP.handled("any `output_type`, and none: the tensor comes back, and `run.pil` has PIL copies beside it")
@pytest.mark.parametrize("asked", [{}, {"output_type": "pil"}, {"output_type": "np"}])
def test_default_outputs_are_tensors(asked: dict[str, Any]) -> None:
    pipe = tiny_sd()
    noise = noise_for(pipe).requires_grad_()
    run = bd.differentiable(pipe, "min", clamp=True)
    images = run(**embeds_for(pipe), latents=noise, **SIZE, **asked).images
    expected = (
        type(pipe)
        .__call__.__wrapped__(pipe, **embeds_for(pipe), latents=noise, output_type="pt", **SIZE)
        .images
    )
    assert torch.equal(noise_gradient(images, noise), noise_gradient(expected, noise))
    (copy,) = run.pil
    assert isinstance(copy, PIL.Image.Image)
    pixels = images.detach()[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(copy) / 255 - pixels).max() <= 0.5 / 255 + 1e-6


@TRAP.handled(
    "pipelines that clamp and make arrays in their own code (DDPM, DiT, sound): tensors, unclamped unless asked"
)
@pytest.mark.parametrize("build", [tiny_pixels, tiny_dit])
def test_pictures_that_a_pipeline_finishes_itself(build: Any) -> None:
    pipe = build()
    extra = {"class_labels": [1]} if build is tiny_dit else {}
    channels = 4 if build is tiny_dit else 3
    noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():  # saturate some pixels
        pipe.vae.decoder.conv_out.weight.mul_(8) if build is tiny_dit else pipe.unet.conv_out.weight.mul_(3)
    results = []
    for clamp in (False, True):
        run = bd.differentiable(pipe, "min", clamp=clamp, noise=noise)
        images = run(num_inference_steps=2, generator=torch.Generator().manual_seed(1), **extra).images
        results.append(images)
        assert len(run.pil) == 1
    free, cut = results
    assert free.min() < 0
    assert free.max() > 1
    assert torch.equal(free.clamp(0, 1), cut)
    inside = (free > 0) & (free < 1)
    (clamped,) = torch.autograd.grad(cut.sum(), noise)
    (masked,) = torch.autograd.grad((free * inside).sum(), noise)
    assert torch.equal(clamped, masked)
    plain = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="np", **extra)
    assert isinstance(plain.images, np.ndarray)


@TRAP.handled("sound as the pipeline makes it; video as (N, frames, 3, H, W)")
def test_arrays_of_sound_and_video() -> None:
    embeds = {
        k: torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(i))
        for i, k in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }
    masks = {
        k: torch.ones(1, TOKENS, dtype=torch.long) for k in ("attention_mask", "negative_attention_mask")
    }
    sound, video = tiny_stable_audio(), tiny_wan()
    waves = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = {**embeds, **masks, "latents": waves, "audio_end_in_s": 4.0, "num_inference_steps": 2}
    expected = type(sound).__call__.__wrapped__(sound, output_type="pt", **given).audios
    true = noise_gradient(expected, waves)
    for asked in ("np", "pt"):
        found = bd.differentiable(sound, "min")(output_type=asked, **given).audios
        assert torch.equal(found, expected)
        assert torch.equal(noise_gradient(found, waves), true)
    films = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    run = bd.differentiable(video, "min")
    frames = run(**embeds, latents=films, num_frames=2, **SIZE).frames
    assert frames.shape[2:] == (3, PICTURE, PICTURE)
    assert [len(film) for film in run.pil] == [frames.shape[1]]


@TRAP.handled("a watermark, which is drawn in numpy, is left out")
def test_a_watermark_is_left_out() -> None:
    class Watermark:
        def apply_watermark(self, images: Tensor) -> Tensor:
            return torch.from_numpy(images.numpy() * 0)

    pipe = tiny_sdxl()
    noise = noise_for(pipe).requires_grad_()
    expected = (
        type(pipe)
        .__call__.__wrapped__(pipe, **embeds_for(pipe), latents=noise, output_type="pt", **SIZE)
        .images
    )
    pipe.watermark = Watermark()
    images = bd.differentiable(pipe, "min", clamp=True)(**embeds_for(pipe), latents=noise, **SIZE).images
    assert torch.equal(noise_gradient(images, noise), noise_gradient(expected, noise))
    assert isinstance(pipe.watermark, Watermark)


@TRAP.refused("tokenised outputs: schedulers that sample tokens, and decoders that round to a codebook")
def test_codebooks_are_refused() -> None:
    unet = tiny_pixels().unet
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler())
    from diffusers.pipelines.deprecated.latent_diffusion_uncond import LDMPipeline

    codebook = diffusers.VQModel(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        num_vq_embeddings=4,
    )
    with pytest.raises(UnsupportedError, match=r"rounds its latents to a codebook"):
        bd.differentiable(LDMPipeline(vqvae=codebook, unet=unet, scheduler=pipe.scheduler))
    pipe.scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=8)
    with pytest.raises(UnsupportedError, match="discrete tokens"):
        bd.differentiable(pipe)
