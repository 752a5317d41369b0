"""The AutoencoderKL that both built-in pipelines share: 64×64 RGB to 8×8×4 and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from .loop import WORK, Round, device, in_rounds
from .scenes import BACKGROUNDS, COLOURS, FLAT, Scene, random_scene, readable, render

# Digit colours that can be read on stars.
READABLE = [i for i, c in enumerate(COLOURS) if readable(c, "stars")]


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


def _scenes(rng: np.random.Generator, count: int, stars: float) -> list[Scene]:
    scenes = [random_scene(rng, two=0.25, effect=0.3) for _ in range(count)]
    night = BACKGROUNDS.index("stars")
    return [
        replace(s, background=night, colours=(int(rng.choice(READABLE)),) * len(s.colours))
        if rng.random() < stars
        else s
        for s in scenes
    ]


def train_vae(batch: int = 16) -> AutoencoderKL:
    """Squared error, edges and a light KL; the scaling factor is set so that latents have unit deviation.

    In a second round the decoder is trained alone, on more night skies: their specks are what it does worst.
    """
    vae, where = build(), device()

    def error(y: Tensor, x: Tensor) -> Tensor:
        sharp = sum(F.l1_loss(a, b) for a, b in zip(_edges(y), _edges(x), strict=True))
        return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 0.25 * sharp

    def drawn(posterior: DiagonalGaussianDistribution, generator: torch.Generator) -> Tensor:
        noise = torch.randn(posterior.mean.shape, generator=generator).to(where)
        return posterior.mean.float() + posterior.std.float() * noise

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        x = render(_scenes(rng, batch, stars=0), rng).to(where) * 2 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(drawn(posterior, generator)).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return error(y, x) + 2e-4 * kl

    def decoder_loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        x = render(_scenes(rng, batch, stars=0.2), rng).to(where) * 2 - 1
        with torch.no_grad():
            z = drawn(vae.encode(x).latent_dist, generator)
        return error(vae.decode(z).sample.float(), x)

    rounds = (Round(3500, 2e-3), Round(800, 1e-3, loss=decoder_loss))
    in_rounds("vae", vae, loss, rounds, ema=0.995)
    vae.register_to_config(scaling_factor=_scaling(vae))
    return vae


def _scaling(vae: AutoencoderKL) -> float:
    """One over the latents' deviation; that of a restored autoencoder stays, since the denoisers know it."""
    if (WORK / "vae-done.pt").exists():
        return float(torch.load(WORK / "vae-done.pt", weights_only=True)["scaling_factor"])
    rng = np.random.default_rng(1)
    with torch.no_grad():
        x = render([random_scene(rng) for _ in range(512)], rng).to(device()) * 2 - 1
        deviation = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)]).std()
    return round(1 / deviation.item(), 4)


def psnr(vae: AutoencoderKL, *, flat: bool, count: int = 256) -> float:
    """Mean reconstruction PSNR in dB on held-out digits (and held-out photograph crops), without effects."""
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
