"""The ε-predicting UNet of the built-in ``StableDiffusionPipeline``."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from .latents import pool
from .loop import Round, device, in_rounds

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def build() -> UNet2DConditionModel:
    """An untrained UNet: 8×8 without attention, 4×4 with self- and cross-attention."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def train_unet(batch: int = 64) -> UNet2DConditionModel:
    """Squared error on the noise at a uniform time of the thousand; in a last round, on the velocity.

    Near pure noise the error on the noise says next to nothing about the picture: a mean colour that is wrong by 0.3
    costs 4e-4. The error on the velocity is the same error over alpha².
    """
    unet, where, data = build(), device(), pool()
    noise_schedule = DDPMScheduler(**SCHEDULE)
    over_alpha = 1 / noise_schedule.alphas_cumprod.to(where)

    def loss(rng: np.random.Generator, generator: torch.Generator, velocity: bool = False) -> Tensor:
        x0, rows = data.draw(rng, batch)
        noise = torch.randn(x0.shape, generator=generator).to(where)
        # One time from each of `batch` equal slices: the same distribution, a steadier gradient.
        t = torch.from_numpy((np.arange(batch) + rng.random(batch)) * 1000 / batch).long().to(where)
        noisy = noise_schedule.add_noise(x0, noise, t)
        out = unet(noisy, t, data.last[rows].to(where)).sample.float()
        error = (out - noise).square().mean((1, 2, 3))
        return (error * over_alpha[t] if velocity else error).mean()

    rounds = (
        Round(6000, 1e-3),
        Round(7000, 6e-4, stop=4750),
        Round(4000, 5e-4, loss=partial(loss, velocity=True)),
    )
    in_rounds("unet", unet, loss, rounds, ema=0.999, save_every=250)
    return unet
