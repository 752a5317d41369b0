"""The AutoencoderKL that both built-in pipelines share: 64×64 RGB to 8×8×4 and back."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .loop import device, train
from .scenes import random_scene, render


def build() -> AutoencoderKL:
    """An untrained autoencoder with factor 8 and 4 latent channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def train_vae(steps: int = 3500, batch: int = 16, **kwargs: float) -> AutoencoderKL:
    """Squared error, edges and a light KL; the scaling factor is set so that latents have unit deviation."""
    vae, where = build(), device()

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        scenes = [random_scene(rng, two=0.25, effect=0.3) for _ in range(batch)]
        x = render(scenes, rng).to(where) * 2 - 1
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(where)
        y = vae.decode(posterior.mean.float() + posterior.std.float() * noise).sample.float()
        sharp = sum(F.l1_loss(a, b) for a, b in zip(_edges(y), _edges(x), strict=True))
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 0.25 * sharp + 2e-4 * kl

    train("vae", vae, loss, steps=steps, lr=2e-3, ema=0.995, **kwargs)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        x = render([random_scene(rng) for _ in range(512)], rng).to(where) * 2 - 1
        deviation = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)]).std()
    vae.register_to_config(scaling_factor=round(1 / deviation.item(), 4))
    return vae


def psnr(vae: AutoencoderKL, *, flat: bool, count: int = 256) -> float:
    """Mean reconstruction PSNR in dB on held-out digits (and held-out photograph crops), without effects."""
    from .scenes import BACKGROUNDS, FLAT

    rng, scenes = np.random.default_rng(7), []
    while len(scenes) < count:
        scene = random_scene(rng, effect=0.0)
        if (BACKGROUNDS[scene.background] in FLAT) == flat:
            scenes.append(scene)
    x = render(scenes, rng, held_out=True).to(device()) * 2 - 1
    with torch.no_grad():
        y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(64)]).clamp(
            -1, 1
        )
    error = ((x - y) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())
