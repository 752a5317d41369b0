"""DDIM on a UNet pipeline, one step at a time: forward, backward (encoding to noise), and one-step estimates.

With ``x_t = alpha x_0 + sigma eps``: a step goes from t to t' by ``x' = alpha' (x - sigma eps)/alpha + sigma' eps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..descent.subject import encode_prompt
from ..errors import InputError, UnsupportedError


class DDIM:
    """The steps of one DDIM run of a pipeline for given prompts.

    Args:
        pipe: a pipeline with a UNet that predicts ε or v.
        prompts: one per sample; ``guidance_scale`` > 1 mixes with the empty prompt.

    Attributes:
        timesteps: (n,) the times of the network's calls, falling.
        alphas, sigmas: (n + 1,) float64, at these times and at the end.

    Raises:
        UnsupportedError: the pipeline has no UNet, or its network predicts something else.
    """

    def __init__(
        self, pipe: Any, prompts: Sequence[str], *, num_inference_steps: int, guidance_scale: float = 7.5
    ) -> None:
        from diffusers import DDIMScheduler

        if getattr(pipe, "unet", None) is None or not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise UnsupportedError(
                f"{type(pipe).__name__} is not a UNet pipeline with a variance-preserving schedule."
            )
        self.pipe, self.guidance_scale = pipe, guidance_scale
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UnsupportedError(
                f"DDIM here needs a network that predicts epsilon or v, not {self.prediction!r}."
            )
        scheduler.set_timesteps(num_inference_steps)
        self.timesteps = scheduler.timesteps
        signal = torch.cat(
            [scheduler.alphas_cumprod[self.timesteps], scheduler.final_alpha_cumprod.reshape(1)]
        ).double()
        self.alphas, self.sigmas = signal.sqrt(), (1 - signal).sqrt()
        with torch.no_grad():
            found = encode_prompt(pipe, list(prompts), negative="" if guidance_scale > 1 else None)
        if set(found) - {"prompt_embeds", "negative_prompt_embeds"}:
            raise UnsupportedError(f"{type(pipe).__name__} conditions on more than the prompt's embedding.")
        self.positive, self.negative = found["prompt_embeds"], found.get("negative_prompt_embeds")

    def __len__(self) -> int:
        return len(self.timesteps)

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """ε with guidance at step ``i``, and what guidance is made of, ε(c) - ε(∅) (zero without guidance)."""
        t = self.timesteps[i].to(x.device)
        if self.negative is None:
            found = self.pipe.unet(x, t, encoder_hidden_states=self.positive).sample
            plain, more = found, torch.zeros_like(found)
        else:
            both = torch.cat([self.negative, self.positive])
            plain, conditional = self.pipe.unet(
                torch.cat([x, x]), t, encoder_hidden_states=both
            ).sample.chunk(2)
            more = conditional - plain
        guided = plain + self.guidance_scale * more if self.negative is not None else plain
        if (
            self.prediction == "v_prediction"
        ):  # eps = alpha v + sigma x; linear, so the difference is alpha (v_c - v_0)
            a, s = float(self.alphas[i]), float(self.sigmas[i])
            return a * guided + s * x, a * more
        return guided, more

    def clean(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        """The one-step estimate of x_0."""
        return (x - float(self.sigmas[i]) * eps) / float(self.alphas[i])

    def step(self, x: Tensor, eps: Tensor, i: int) -> Tensor:
        """From time i to time i + 1."""
        return float(self.alphas[i + 1]) * self.clean(x, eps, i) + float(self.sigmas[i + 1]) * eps

    def unstep(self, x: Tensor, i: int, iterations: int) -> Tensor:
        """From time i + 1 back to time i: the fixed point of ``y = back(x, eps(y, t_i))`` from y = x."""
        ratio = self.alphas[i] / self.alphas[i + 1]
        scale, shift = float(ratio), float(self.sigmas[i] - ratio * self.sigmas[i + 1])
        y = x
        for _ in range(iterations):
            y = scale * x + shift * self.predict(y, i)[0]
        return y

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], not clamped."""
        config = self.pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        return self.pipe.vae.decode(latents / config.scaling_factor + shift, return_dict=False)[0] / 2 + 0.5

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents of pictures in [0, 1]: the mean of the encoder's distribution."""
        config = self.pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        weight = next(self.pipe.vae.parameters())
        distribution = self.pipe.vae.encode(pictures.to(weight) * 2 - 1).latent_dist
        return (distribution.mode() - shift) * config.scaling_factor


@torch.no_grad()
def encode_to_noise(
    pipe: Any,
    pictures: Tensor,
    prompts: Sequence[str],
    *,
    num_inference_steps: int = 31,
    guidance_scale: float = 7.5,
    iterations: int = 5,
) -> Tensor:
    """The noise from which DDIM makes ``pictures``, by DDIM inversion through the pipeline's own network.

    Each step's equation ``x_{i+1} = step(x_i, eps(x_i))`` is solved for x_i by fixed-point iteration
    (1 iteration: plain DDIM inversion; 5: exact to rounding where the network's slope is small). What is left of the
    error are these iterations, the autoencoder's loss, and the pipeline's scheduler where it is not DDIM.

    Args:
        pictures: (n, 3, H, W) in [0, 1].

    Returns:
        (n, …), to be given as ``latents=``.

    Raises:
        InputError: the pictures have another shape, or not one prompt each.
        UnsupportedError: the pipeline is not a UNet pipeline; give its noise instead.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) != len(prompts):
        raise InputError(
            f"Needs pictures (n, 3, H, W) and n prompts, got {tuple(pictures.shape)} and {len(prompts)}."
        )
    if iterations < 1:
        raise InputError(f"iterations={iterations} must be at least 1.")
    ddim = DDIM(pipe, prompts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    x = ddim.encode(pictures)
    for i in reversed(range(len(ddim))):
        x = ddim.unstep(x, i, iterations)
    return x
