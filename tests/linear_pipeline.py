"""A diffusers pipeline whose picture is an affine function of its noise, so that descents have closed forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

SIDE = 8  # of the noise and of the pictures
STEP = 0.25


class Mixing(nn.Module):
    """A fixed channel mixing, the "network"; its weight can be trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, generator=generator) * 0.5)
        self.config = SimpleNamespace(sample_size=SIDE, in_channels=3)
        self.dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", self.weight, x)


class LinearPipeline(DiffusionPipeline):
    """``x <- x - STEP W x``, ``num_inference_steps`` times; the picture is ``x/2 + 1/2``."""

    vae_scale_factor = 1

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.register_modules(unet=unet)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 2,
        guidance_scale: float = 1.0,
        generator: Any = None,
        output_type: str = "pil",
        noisy: float = 0.0,
    ) -> Any:
        assert latents is not None
        x = latents
        for _ in range(num_inference_steps):
            x = x - STEP * self.unet(x)
            if noisy:  # a stochastic sampler
                draws = [torch.randn(x.shape[1:], generator=g) for g in generator]
                x = x + noisy * torch.stack(draws)
        return ImagePipelineOutput(images=self.image_processor.postprocess(x, output_type=output_type))


def linear_pipeline() -> LinearPipeline:
    return LinearPipeline(Mixing())


def picture_matrix(pipe: LinearPipeline, steps: int) -> Tensor:
    """(3, 3) float64: the picture is ``matrix x / 2 + 1/2`` per pixel."""
    weight = pipe.unet.weight.detach().double()
    return torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - STEP * weight, steps)


def start(batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
