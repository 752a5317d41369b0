"""The ε-predicting UNet of the built-in ``StableDiffusionPipeline``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from .latents import pool
from .loop import device, in_rounds

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


ROUNDS = ((6000, 1e-3), (7000, 6e-4))  # steps and learning rate of each


def train_unet(rounds: Sequence[tuple[int, float]] = ROUNDS, batch: int = 64) -> UNet2DConditionModel:
    """Squared error on the noise at a uniform time of the thousand."""
    unet, where, data = build(), device(), pool()
    noise_schedule = DDPMScheduler(**SCHEDULE)

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        x0, rows = data.draw(rng, batch)
        noise = torch.randn(x0.shape, generator=generator).to(where)
        # One time from each of `batch` equal slices: the same distribution, a steadier gradient.
        t = torch.from_numpy((np.arange(batch) + rng.random(batch)) * 1000 / batch).long().to(where)
        noisy = noise_schedule.add_noise(x0, noise, t)
        out = unet(noisy, t, data.last[rows].to(where)).sample.float()
        return F.mse_loss(out, noise)

    in_rounds("unet", unet, loss, rounds, ema=0.999, save_every=250)
    return unet
