"""The flow-matching MMDiT of the built-in ``StableDiffusion3Pipeline``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .latents import Pool, pool
from .loop import Round, device, in_rounds

ZEROS = 256  # without a T5 encoder the pipeline hands over this many zero tokens (its max_sequence_length)


def build() -> SD3Transformer2DModel:
    """An untrained MMDiT: 16 picture tokens of width 128, five joint blocks."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=128,
        pooled_projection_dim=256,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


class LastTokenCounts(TorchFunctionMode):
    """Attention in which the last key stands for ``count`` equal ones.

    The zero tokens that stand in for T5 are equal to each other in every layer, so one of them with
    ``log(count)`` added to its attention logits gives the same result as all of them, at a fraction of the cost.
    """

    def __init__(self, count: int = ZEROS) -> None:
        super().__init__()
        self.bias = math.log(count)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            mask = torch.zeros(1, 1, 1, key.shape[2], dtype=query.dtype, device=query.device)
            mask[..., -1] = self.bias
            kwargs["attn_mask"] = mask.expand(1, 1, query.shape[2], key.shape[2])
        return func(*args, **kwargs)


def context(data: Pool, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of a caption with two equal CLIP encoders, its zero tokens drawn together."""
    tokens = data.penultimate[rows].to(device())
    tokens = torch.cat(
        [torch.cat([tokens, tokens], 2), tokens.new_zeros(len(rows), 1, 2 * tokens.shape[2])], 1
    )
    pooled = data.pooled[rows].to(device())
    return tokens, torch.cat([pooled, pooled], 1)


ROUNDS = (Round(3600, 1e-3), Round(8000, 7e-4))


def train_flow(rounds: Sequence[Round] = ROUNDS, batch: int = 64) -> SD3Transformer2DModel:
    """Squared error on the velocity ε − x0 at logit-normal times, as Stable Diffusion 3 was trained."""
    transformer, where, data = build(), device(), pool()

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        x0, rows = data.draw(rng, batch)
        noise = torch.randn(x0.shape, generator=generator).to(where)
        t = torch.from_numpy(1 / (1 + np.exp(-rng.normal(0, 1, batch)))).float().to(where)
        noisy = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * noise
        tokens, pooled = context(data, rows)
        with LastTokenCounts():
            out = transformer(noisy, tokens, pooled, t * 1000).sample.float()
        return F.mse_loss(out, noise - x0)

    in_rounds("flow", transformer, loss, rounds, ema=0.999, save_every=250)
    return transformer
