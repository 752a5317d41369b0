"""The run that every method differentiates: one network, one noise, one loss, gradients on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import backdrift as bd

GUIDANCE = 7.5
WANTS = ("all", "x_T")


@dataclass(frozen=True)
class Size:
    """How large the network and its input are."""

    channels: tuple[int, ...]
    layers: int
    width: int  # of the text embedding
    tokens: int
    side: int

    def unet(self) -> nn.Module:
        """A UNet2DConditionModel with random weights; like SDXL's, it has no attention at the finest level."""
        from diffusers import UNet2DConditionModel

        between = len(self.channels) - 2
        unet: Any = UNet2DConditionModel(
            sample_size=self.side,
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * between, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * between, "UpBlock2D"),
            cross_attention_dim=self.width,
            attention_head_dim=8,
            norm_num_groups=min(32, self.channels[0]),
        )
        return unet.eval()


FULL = Size((64, 192, 320), layers=1, width=128, tokens=77, side=32)
SMALL = Size((8, 16, 16), layers=1, width=8, tokens=4, side=8)


class Counted(nn.Module):
    """The UNet as ``network(x, t, cond)``; counts its own calls, so no method is asked how many it made."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.calls += 1
        return self.unet(x, t, encoder_hidden_states=cond).sample


class Problem:
    """Noise (1, 4, side, side) and a text embedding in, ``mean((x0 - target)²)`` out.

    Args:
        size: of the network.
        wants: ``"all"``: gradients for x_T, cond and every weight; ``"x_T"``: for the noise alone, all
            else frozen.
        device: where.
    """

    def __init__(self, size: Size, wants: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size, self.wants = size, wants
        self.network = Counted(size.unet()).to(device)
        self.x_T = torch.randn(1, 4, size.side, size.side).to(device).requires_grad_()
        self.cond = torch.randn(1, size.tokens, size.width).to(device)
        self.uncond = torch.randn(1, size.tokens, size.width).to(device)
        self.target = torch.randn(1, 4, size.side, size.side).to(device)
        self.network.requires_grad_(wants == "all")
        self.cond.requires_grad_(wants == "all")
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.schedule = bd.VP.discrete(torch.cumprod(1 - betas, 0))

    @property
    def weights(self) -> list[nn.Parameter]:
        """The network's weights that require grad."""
        return [p for p in self.network.parameters() if p.requires_grad]

    @property
    def leaves(self) -> list[Tensor]:
        """All tensors a gradient is wanted for: x_T, then cond, then the weights."""
        return [self.x_T, self.cond, *self.weights] if self.wants == "all" else [self.x_T]

    def denoiser(self, network: Any = None) -> bd.Denoiser:
        """The network, or a wrapper of it, with its schedule and guidance."""
        return bd.Denoiser(
            network or self.network, self.schedule, guidance_scale=GUIDANCE, uncond=self.uncond
        )

    def times(self, steps: int) -> Tensor:
        """The nodes, falling: (steps + 1,) float64."""
        return bd.TimeGrid("uniform", steps=steps).nodes(self.schedule)

    def sample(self, steps: int, gradient: bd.gradients.GradientMethod, network: Any = None) -> Tensor:
        """The finished state: Euler on the exponential form, which is DDIM."""
        solution = bd.sample(
            self.denoiser(network),
            self.x_T,
            self.cond,
            solver=bd.Euler(),
            grid=self.times(steps),
            form="exponential",
            gradient=gradient,
        )
        return solution.x0

    def loss(self, x0: Tensor) -> Tensor:
        """The metric on the finished state."""
        return ((x0 - self.target) ** 2).mean()

    def clear(self) -> None:
        """Forget all gradients and counts."""
        for leaf in self.leaves:
            leaf.grad = None
        self.network.calls = 0

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients, flat: ``x_T``, and with ``"all"`` also ``cond`` and ``weights``."""
        assert self.x_T.grad is not None
        found = {"x_T": self.x_T.grad.flatten().clone()}
        if self.wants == "all":
            found["cond"] = self.cond.grad.flatten().clone()  # type: ignore[union-attr]
            found["weights"] = torch.cat([p.grad.flatten() for p in self.weights])  # type: ignore[union-attr]
        return found
