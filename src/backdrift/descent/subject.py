"""What a run is about: the pipeline, the size of its pictures, its prompts, and how they are written down."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL.Image import Image
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..pipelines.homes import homes_of
from .switches import switched_on


@dataclass(frozen=True)
class Example:
    """One picture to make: the prompt, the noise it starts from, and a target if there is one.

    Attributes:
        prompt: the prompt.
        noise: (1, …), standard normal, in the layout of the pipeline's ``latents=``.
        target: (3, H, W) in [0, 1], or ``None``.
        draw: which draw of the sampler's own noise it has, if the sampler draws any; default its index.
    """

    prompt: str
    noise: Tensor
    target: Tensor | None = None
    draw: int | None = None


def picture_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default the denoising network's own.

    Raises:
        InputError: a side is not a positive multiple of what the pipeline can make.
    """
    _, network = denoiser(pipe)
    scale = int(getattr(pipe, "vae_scale_factor", 8))
    own: Any = getattr(network.config, "sample_size", None) or getattr(pipe, "default_sample_size", 64)
    default = (own, own) if isinstance(own, int) else tuple(own)
    patch = getattr(network.config, "patch_size", 1) or 1
    # Stable Diffusion asks for multiples of 8 whatever its decoder's factor.
    unit = (
        scale * (2 if hasattr(pipe, "_pack_latents") else int(patch))
        if hasattr(pipe, "transformer")
        else max(scale, 8)
    )
    sides = [default[0] * scale if height is None else height, default[1] * scale if width is None else width]
    for name, side in zip(("height", "width"), sides, strict=True):
        if not isinstance(side, int) or side < unit or side % unit:
            raise InputError(
                f"{name}={side!r} must be a positive multiple of {unit} pixels for this pipeline."
            )
    return sides[0], sides[1]


def check_prompts(pipe: Any, prompts: Sequence[str]) -> None:
    """Refuse prompts that the pipeline would cut off in silence.

    Raises:
        InputError: a prompt is no string, or has more tokens than the pipeline's text encoder reads.
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"A prompt must be a string, got {type(prompt).__name__}.")
    if getattr(pipe, "tokenizer_3", None) is not None:  # T5 reads what the short encoders cut off
        return
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return
    for prompt in prompts:
        count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > tokenizer.model_max_length:
            raise InputError(
                f"The prompt {prompt!r} has {count} tokens with its start and end marks; this pipeline reads "
                f"{tokenizer.model_max_length}. Shorten it."
            )


def make_examples(
    pipe: Any, prompts: Sequence[str], height: int, width: int, seed: int, noise: Tensor | None = None
) -> list[Example]:
    """One example per prompt, with seeded noise or the rows of ``noise``.

    Raises:
        InputError: ``noise`` has not one row per prompt.
    """
    if not prompts:
        raise InputError("There is no prompt; give at least one (it may be empty: '').")
    check_prompts(pipe, prompts)
    if noise is None:
        from ..pipelines.load import noise as make_noise

        noise = make_noise(pipe, height=height, width=width, seed=seed, batch_size=len(prompts))
    if len(noise) != len(prompts):
        raise InputError(f"noise= has {len(noise)} rows for {len(prompts)} pictures; it needs one for each.")
    return [Example(prompt, noise[i : i + 1].detach()) for i, prompt in enumerate(prompts)]


def sampler_call(
    pipe: Any,
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float | None,
    more: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The keywords of the pipeline's call that stay the same throughout.

    Raises:
        InputError: a keyword is unknown to the pipeline, or is set elsewhere.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    call: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
    if num_inference_steps < 1:
        raise InputError(f"num_inference_steps={num_inference_steps} must be at least 1.")
    if guidance_scale is not None:
        call["guidance_scale"] = float(guidance_scale)
    taken = {"prompt", "latents", "generator", "output_type", "return_dict", "num_images_per_prompt"}
    for name, value in (more or {}).items():
        if name in taken or name in call:
            raise InputError(f"pipeline_kwargs must not contain {name!r}: it is set by the optimisation.")
        if name not in known:
            raise InputError(
                f"{type(pipe).__name__} takes no {name!r}; it takes: {', '.join(list(known)[1:])}."
            )
        call[name] = value
    return call


def denoiser(pipe: Any) -> tuple[str, Any]:
    """The name and the module of the pipeline's denoising network.

    Raises:
        UnsupportedError: it has neither a UNet nor a transformer.
    """
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name, getattr(pipe, name)
    raise UnsupportedError(f"{type(pipe).__name__} has neither `unet` nor `transformer`.")


def encode_prompt(pipe: Any, prompts: list[str], negative: str | None = None) -> dict[str, Tensor]:
    """The text encoders' output for each prompt, by the keyword under which the pipeline's call takes it.

    Raises:
        UnsupportedError: the pipeline's ``encode_prompt`` gives something unknown.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise UnsupportedError(
            f"{type(pipe).__name__} has no `encode_prompt`; optimise its noise or weights."
        )
    known = inspect.signature(pipe.encode_prompt).parameters
    given: dict[str, Any] = {
        "prompt": prompts,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": negative is not None,
        "negative_prompt": None if negative is None else [negative] * len(prompts),
    }
    needed = {k: None for k, p in known.items() if p.default is inspect.Parameter.empty and k not in given}
    result = pipe.encode_prompt(**{k: v for k, v in given.items() if k in known}, **needed)
    names = {
        2: ("prompt_embeds", "negative_prompt_embeds"),
        3: ("prompt_embeds", "pooled_prompt_embeds", None),  # Flux: the third are text positions
        4: (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
    }
    if not isinstance(result, tuple) or len(result) not in names:
        raise UnsupportedError(
            f"{type(pipe).__name__}.encode_prompt returns {type(result).__name__}, not 2–4 tensors."
        )
    return {k: v for k, v in zip(names[len(result)], result, strict=True) if k and isinstance(v, Tensor)}


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """Class, scheduler, dtype, what is switched on in the networks, and a fingerprint of the weights, as JSON."""
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            homes = homes_of(module)  # of weights that sequential offloading keeps elsewhere
            for key, held in sorted(module.state_dict(keep_vars=True).items()):
                value = homes.get(id(held), held)
                digest.update(f"{name}.{key}{tuple(value.shape)}{value.dtype}".encode())
                digest.update(_sampled(value))
    scheduler = getattr(pipe, "scheduler", None)
    config = {k: v for k, v in dict(getattr(scheduler, "config", {})).items() if not k.startswith("_")}
    return {
        "class": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": json.loads(json.dumps(config, default=str)),
        "weights": digest.hexdigest()[:16],
        **switched_on(pipe),
    }


def describe_tensors(module: torch.nn.Module) -> str | None:
    """A fingerprint of the weights and buffers of a loss (its target among them); ``None`` without any."""
    digest, found = hashlib.sha256(), False
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(_sampled(value))
        found = True
    return digest.hexdigest()[:16] if found else None


def describe_value(value: Any) -> Any:
    """A JSON value that tells apart what gives different results; tensors, arrays and pictures by their contents."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {list(value.shape)} {str(value.dtype)[6:]} {hashlib.sha256(data).hexdigest()[:16]}"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, numpy.generic):
        return describe_value(value.item())
    if isinstance(value, numpy.ndarray):
        digest = hashlib.sha256(numpy.ascontiguousarray(value).tobytes()).hexdigest()
        return f"array {list(value.shape)} {value.dtype} {digest[:16]}"
    if isinstance(value, Image):
        return f"picture {value.mode} {list(value.size)} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if isinstance(value, bytes | torch.dtype | torch.device | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): describe_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe_value(v) for v in value]
    return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _sampled(value: Tensor, count: int = 256) -> bytes:
    """Up to ``count`` evenly spread entries: enough to tell two checkpoints apart, cheap for billions of weights."""
    flat = value.detach().reshape(-1)
    part = flat[:: max(1, flat.numel() // count)]
    return part.cpu().contiguous().view(torch.uint8).numpy().tobytes()
