"""Pairs of pictures, without and with an effect, and the noise they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..descent import Example
from ..descent.subject import check_prompts, picture_size, sampler_call
from ..errors import InputError
from ..losses import load_picture
from .ddim import encode_to_noise

Picture = Any
"""A tensor (3, H, W) in [0, 1], a PIL image, or the path of a picture file."""


@dataclass(frozen=True)
class Pair:
    """A prompt, the picture with the effect, and what the picture without it came from.

    Attributes:
        prompt: describes both pictures, without the effect.
        target: the picture with the effect.
        source: the picture without it; not needed where ``noise`` is known.
        noise: (1, …) the noise that ``source`` was made from; else ``source`` is encoded to noise.
    """

    prompt: str
    target: Picture
    source: Picture | None = None
    noise: Tensor | None = None


def effect_pairs(
    pipe: Any, prompts: Sequence[str], effect: str, *, seeds: Sequence[int], height: int | None = None,
    width: int | None = None, num_inference_steps: int = 31, guidance_scale: float = 7.5,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> list[Pair]:  # fmt: skip
    """Pairs made by the pipeline itself, as in the paper: the same noise under ``prompt`` and ``prompt, effect``.

    Raises:
        InputError: a prompt is too long, or the pipeline's safety checker blackened a picture.
    """
    from ..pipelines.load import noise as make_noise

    height, width = picture_size(pipe, height, width)
    check_prompts(pipe, [f"{p}, {effect}" for p in prompts])
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, pipeline_kwargs)
    pairs = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        noise = make_noise(pipe, height=height, width=width, seed=seed, batch_size=1)
        source, target = (_sample(pipe, p, noise, call) for p in (prompt, f"{prompt}, {effect}"))
        pairs.append(Pair(prompt, target, source, noise))
    return pairs


def to_tensor(picture: Picture) -> Tensor:
    """A picture as a float tensor (3, H, W) in [0, 1].

    Raises:
        InputError: it is no picture, or cannot be read.
    """
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3 or not picture.is_floating_point():
            raise InputError(
                f"A picture must be (3, H, W) in [0, 1], got {picture.dtype} {tuple(picture.shape)}."
            )
        return picture.detach()
    if isinstance(picture, str | Path):
        return load_picture(picture)
    if hasattr(picture, "convert"):
        import numpy

        return torch.from_numpy(numpy.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
    raise InputError(f"A picture must be a tensor, a PIL image or a path, got {type(picture).__name__}.")


class PairEncoder:
    """Makes examples of pairs; measures the error where the noise had to be found."""

    def __init__(self, pipe: Any, height: int, width: int, call: dict[str, Any], **how: Any) -> None:
        self.pipe, self.size, self.call = pipe, (height, width), call
        self.how = how  # keywords of encode_to_noise
        self.errors: list[float] = []

    def example(self, pair: Pair) -> Example:
        target = self._fit(pair.target, f"target of {pair.prompt!r}")
        if pair.noise is not None:
            return Example(pair.prompt, pair.noise.detach(), target)
        if pair.source is None:
            raise InputError(
                f"The pair of {pair.prompt!r} has neither noise nor a source picture; give one of them."
            )
        source = self._fit(pair.source, f"source of {pair.prompt!r}")
        noise = encode_to_noise(self.pipe, source[None], [pair.prompt], **self.how)
        again = _sample(self.pipe, pair.prompt, noise, self.call)
        self.errors.append((again - source.to(again)).square().mean().sqrt().item())
        return Example(pair.prompt, noise, target)

    def _fit(self, picture: Picture, what: str) -> Tensor:
        found = to_tensor(picture)
        if found.shape[1:] != self.size:
            raise InputError(
                f"The {what} is {found.shape[2]}x{found.shape[1]} pixels (width x height), the pipeline makes "
                f"{self.size[1]}x{self.size[0]}. Resize it, or set height= and width=."
            )
        return found.to(self.pipe._execution_device)

    def figures(self) -> dict[str, Any]:
        if not self.errors:
            return {}
        return {"error of encoding to noise (RMSE, mean)": sum(self.errors) / len(self.errors),
                "error of encoding to noise (RMSE, worst)": max(self.errors)}  # fmt: skip


@torch.no_grad()
def _sample(pipe: Any, prompt: str, noise: Tensor, call: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = pipe(prompt=prompt, latents=noise.to(pipe.dtype), generator=generator, output_type="pt", **call)
    if any(getattr(made, "nsfw_content_detected", None) or ()):
        raise InputError(
            f"The pipeline's safety checker flagged the picture of {prompt!r} and blackened it, so there is nothing to "
            "learn from. Use another seed or prompt."
        )
    return made.images[0].float()


def as_pair(given: Pair | tuple[Picture, Picture, str]) -> Pair:
    if isinstance(given, Pair):
        return given
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise InputError("A pair must be a Pair, or (picture, picture with the effect, prompt).")
    source, target, prompt = given
    return Pair(prompt, target, source)
