"""What is sampled: the pipeline, its steps, the prompts and noises of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import backdrift as bd

STEPS = 30


@dataclass(frozen=True)
class Case:
    """One cell's pictures: a reference, a prompt, and a noise for each picture.

    Attributes:
        reference: the name of a reference picture; of a block of noises where nothing is referred to.
        prompt: of all pictures.
        seed: of the noises.
    """

    reference: str
    prompt: str
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """For the results file."""
        return {"reference": self.reference, "prompt": self.prompt, "seed": self.seed}


@dataclass(frozen=True)
class Setting:
    """A pipeline and how it is called.

    Args:
        steps: of its own scheduler, DPM-Solver++(2M), as in the published code.
        guidance_scale: that of the built-in model's card.
        batch: pictures of a cell, sampled together.
        model: for :func:`backdrift.load`.
    """

    steps: int = STEPS
    guidance_scale: float = 3.0
    batch: int = 5
    model: str = "sd"

    @cached_property
    def pipe(self) -> Any:
        pipe = bd.load(self.model)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        return pipe

    @property
    def facts(self) -> dict[str, Any]:
        """All that figures depend on, beside the machine and the code."""
        return {
            "steps": self.steps,
            "guidance scale": self.guidance_scale,
            "batch": self.batch,
            "model": self.model,
            "scheduler": type(self.pipe.scheduler).__name__,
        }

    def noise(self, case: Case) -> Tensor:
        """(batch, …), sample by sample from the case's seed."""
        return bd.noise(self.pipe, seed=case.seed, batch_size=self.batch)

    def guide(self, case: Case, guidance: bd.guidance.Guidance) -> bd.guidance.Guided:
        """The case's pictures, guided."""
        return bd.guide(
            self.pipe,
            [case.prompt] * self.batch,
            guidance,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            latents=self.noise(case),
            seed=case.seed,
        )


def clamped(images: Tensor) -> Tensor:
    """Finished pictures as they are saved, in [0, 1] with 8 bits."""
    return (images.detach().float().clamp(0, 1) * 255).round() / 255


def per_reference(
    references: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Case, ...]:
    """Every reference with every prompt; a prompt has the same noises under all references."""
    return tuple(Case(r, p, s) for r in references for p, s in zip(prompts, seeds, strict=True))


def picture(tensor: Tensor) -> Tensor:
    """uint8 (…, 3, H, W) of pictures in [0, 1]."""
    return (clamped(tensor) * 255).to(torch.uint8)
