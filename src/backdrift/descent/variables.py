"""What can be optimised: the base, the noise and the prompt embedding (weights are in ``weights.py``).

A :class:`Variable` owns leaf tensors, says how the pipeline is called with them, and leaves the pipeline
as it found it. Other things to optimise (slots of an embedding, a control image) are subclasses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..accelerators import doubled
from ..run import Run
from .subject import Example, encode_prompt


class Variable:
    """Base of the things to optimise; this base optimises nothing and calls the pipeline with what is given.

    Attributes:
        name: for records.
        parameters: leaf tensors by name, float32 masters where the pipeline is in half precision.
        train: what ``differentiable`` gets as ``train=``.
        independent: whether every example has its own rows, so that samples neither share a gradient nor a best.
        lr: the learning rate when none is given.
        optimizer_kwargs: further arguments of the default optimizer.
    """

    name = "nothing"
    train: Any = None
    independent = False
    lr = 0.01
    optimizer_kwargs: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}

    @contextmanager
    def on(self, pipe: Any, examples: Sequence[Example]) -> Iterator[None]:
        """Set :attr:`parameters` up; on leaving, give the pipeline back as it was."""
        yield

    def call(self, pipe: Any, examples: Sequence[Example], batch: Sequence[int]) -> dict[str, Any]:
        """Keywords of the pipeline's call for the examples whose indices are ``batch``."""
        noise = torch.cat([examples[i].noise for i in batch])
        return {"prompt": [examples[i].prompt for i in batch], "latents": noise.to(pipe.dtype)}

    def prior(self, batch: Sequence[int]) -> Tensor | None:
        """A penalty per example of ``batch``, which ``noise_prior`` weights, or ``None`` if there is none."""
        return None

    def clip(self, gradients: dict[str, Tensor], limit: float) -> dict[str, Tensor]:
        """Gradients scaled so that their norm is at most ``limit`` (jointly over all parameters)."""
        norm = total_norm(gradients)
        return {k: g * (limit / norm) for k, g in gradients.items()} if norm > limit else gradients

    def project(self) -> None:
        """Bring the parameters back to where they may be; called after each update."""

    def export(self, pipe: Any, run: Run) -> None:
        """Save what else the user can take away (called with the best values in :attr:`parameters`)."""

    def settings(self) -> dict[str, Any]:
        """What the record says about it (JSON)."""
        return {"over": self.name}


class Noise(Variable):
    """The initial noise, one row per example.

    The prior is ReNO's (Eyring et al. 2024): the norm r of d standard normal numbers has the density
    ``p(r) ~ r^(d-1) exp(-r^2/2)``, and the penalty is ``-log p(r)`` less its minimum, which is at
    ``r = sqrt(d-1)``: ``r^2/2 - (d-1) log r + const >= 0``. Without weight decay, which would pull r to 0.
    """

    name = "noise"
    independent = True
    lr = 0.05
    optimizer_kwargs = {"weight_decay": 0.0}  # noqa: RUF012

    @contextmanager
    def on(self, pipe: Any, examples: Sequence[Example]) -> Iterator[None]:
        start = torch.cat([e.noise for e in examples])
        self.parameters = {"noise": master(start)}
        yield

    def call(self, pipe: Any, examples: Sequence[Example], batch: Sequence[int]) -> dict[str, Any]:
        rows = self.parameters["noise"][list(batch)].to(pipe.dtype)
        return {"prompt": [examples[i].prompt for i in batch], "latents": rows}

    def prior(self, batch: Sequence[int]) -> Tensor | None:
        return gaussian_prior(self.parameters["noise"][list(batch)])

    def clip(self, gradients: dict[str, Tensor], limit: float) -> dict[str, Tensor]:
        """Each sample by itself, so that the samples of a batch do not disturb each other."""
        g = gradients["noise"]
        norms = g.flatten(1).norm(dim=1).clamp_min(torch.finfo(g.dtype).tiny)
        scale = (limit / norms).clamp_max(1)
        return {"noise": g * scale.view(-1, *[1] * (g.ndim - 1))}


class PromptEmbeds(Variable):
    """The output of the text encoder, one (tokens, width) block per distinct prompt; pooled parts stay."""

    name = "prompt_embeds"
    lr = 0.1

    @contextmanager
    def on(self, pipe: Any, examples: Sequence[Example]) -> Iterator[None]:
        prompts = list(dict.fromkeys(e.prompt for e in examples))
        self.row = [prompts.index(e.prompt) for e in examples]
        self.independent = len(prompts) == len(examples)
        with torch.no_grad():
            self.fixed = encode_prompt(pipe, prompts)
        self.parameters = {"prompt_embeds": master(self.fixed.pop("prompt_embeds"))}
        yield

    def call(self, pipe: Any, examples: Sequence[Example], batch: Sequence[int]) -> dict[str, Any]:
        rows = [self.row[i] for i in batch]
        fixed = {k: v[rows] for k, v in self.fixed.items()}
        call = super().call(pipe, examples, batch)
        del call["prompt"]
        return call | fixed | {"prompt_embeds": self.parameters["prompt_embeds"][rows].to(pipe.dtype)}


def gaussian_prior(noise: Tensor) -> Tensor:
    """The penalty of :class:`Noise` for each row of ``noise`` (N, …): shape (N,), 0 at its best."""
    d = noise[0].numel()
    excess = noise.flatten(1).square().sum(1) / (d - 1) - 1  # r^2/(d-1) - 1: no large numbers to cancel
    return (d - 1) / 2 * (excess - excess.log1p())


def total_norm(gradients: dict[str, Tensor]) -> float:
    """The joint 2-norm, in float64 so that it does not overflow."""
    return math.sqrt(sum(doubled(g).square().sum().item() for g in gradients.values()))


def master(value: Tensor) -> Tensor:
    """A leaf copy that requires grad, in float32 at least."""
    wide = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
    return wide.requires_grad_()
