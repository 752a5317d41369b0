"""The denoisers' training set: scenes rendered and encoded once, captions embedded once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel

from .clip import build as build_clip
from .clip import build_tokenizer, token_ids
from .loop import WORK, device, save_atomically
from .scenes import random_scene, render
from .vae import build as build_vae


def trained_vae() -> AutoencoderKL:
    """The autoencoder as ``python -m training vae`` left it."""
    state = torch.load(WORK / "vae-done.pt", weights_only=True)
    vae = build_vae()
    vae.load_state_dict(state["module"])
    vae.register_to_config(scaling_factor=state["scaling_factor"])
    return vae.eval().requires_grad_(False).to(device())


def trained_clip(part: str = "clip") -> CLIPModel:
    """The CLIP with both halves trained, or with ``part="text"`` as the first stage left it."""
    clip = build_clip(build_tokenizer())
    clip.load_state_dict(torch.load(WORK / f"{part}-done.pt", weights_only=True)["module"])
    return clip.eval().requires_grad_(False).to(device())


@dataclass
class Pool:
    """Latents (n, 4, 8, 8) at unit deviation; per scene the row of its caption; what the text half makes of it.

    ``last`` and ``penultimate`` are hidden states (captions, 24, 128), ``pooled`` projections (captions, 128).
    Row 0 is the empty caption.
    """

    latents: Tensor
    rows: Tensor
    last: Tensor
    penultimate: Tensor
    pooled: Tensor

    def draw(self, rng: np.random.Generator, batch: int, empty: float = 0.12) -> tuple[Tensor, Tensor]:
        """Latents and caption rows of a random batch; a caption is emptied with the given chance."""
        pick = torch.from_numpy(rng.integers(len(self.latents), size=batch))
        rows = self.rows[pick].clone()
        rows[torch.from_numpy(rng.random(batch) < empty)] = 0
        return self.latents[pick].float().to(device()), rows


@torch.no_grad()
def embed(clip: CLIPModel, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Last and penultimate hidden states of the text half, and its projected pooled output."""
    parts = []
    tokenizer = build_tokenizer()
    for i in range(0, len(captions), 256):
        ids = token_ids(tokenizer, captions[i : i + 256]).to(device())
        out = clip.text_model(ids, output_hidden_states=True)
        parts.append((out.last_hidden_state, out.hidden_states[-2], clip.text_projection(out.pooler_output)))
    last, penultimate, pooled = (torch.cat(p).to(torch.bfloat16).cpu() for p in zip(*parts, strict=True))
    return last, penultimate, pooled


def pool(count: int = 48_000) -> Pool:
    """The training set, made once and kept beside the checkpoints.

    Two digits and effects are drawn more often than the captions that the quality is measured on have them:
    they are what is hardest to learn.
    """
    path = WORK / "pool.pt"
    if not path.exists():
        vae, chunks, captions = trained_vae(), [], []
        for i in range(0, count, 100):
            rng = np.random.default_rng((21, i))
            scenes = [random_scene(rng, two=0.35, effect=0.4) for _ in range(100)]
            x = render(scenes, rng).to(device()) * 2 - 1
            with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
                z = vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor
            chunks.append(z.half().cpu())
            captions += [s.caption for s in scenes]
            if i % 5000 == 0:
                print(f"pool {i}/{count}", flush=True)
        unique = ["", *dict.fromkeys(captions)]
        index = {c: k for k, c in enumerate(unique)}
        last, penultimate, pooled = embed(trained_clip("text"), unique)
        rows = torch.tensor([index[c] for c in captions])
        state = {"latents": torch.cat(chunks), "rows": rows, "last": last}
        save_atomically({**state, "penultimate": penultimate, "pooled": pooled}, path)
    return Pool(**torch.load(path, weights_only=True))
