"""The arguments of a small call: as few steps and as few pixels as a pipeline will take."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from ..modular import is_modular
from ..offloaded import execution_device
from ..refusals import plain_class
from ..twins import twin, without_no_grad

_LATENTS = (8, 16, 32, 64)  # sides of small latents
_TOKENS = 8  # of embeddings that are made up
# Where the configurations of denoising networks have the width of prompt embeddings, and of pooled ones.
_WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "text_dim",
    "cross_attention_input_dim",
    "text_embed_dim",
    "cross_attention_dim",
)
_POOLED = ("pooled_projection_dim",)
#: A text that any tokenizer knows.
PROMPT = "one"


def accepted(pipe: Any) -> list[str]:
    """The names of the arguments that a call takes."""
    cls = plain_class(type(pipe))
    if is_modular(cls):
        return [p.name for p in pipe._blocks.inputs if p.name]
    return list(inspect.signature(getattr(twin(cls), "__call__")).parameters)[1:]  # noqa: B004, B009


def sizes(pipe: Any, height: int | None, width: int | None) -> list[dict[str, Any]]:
    """What to try for the size, smallest first: ``height``, ``width``, ``num_frames``."""
    takes = accepted(pipe)
    frames: list[dict[str, Any]] = [{"num_frames": n} for n in (2, 5, 9)] if "num_frames" in takes else [{}]
    if "height" not in takes or "width" not in takes:
        return frames
    if height is not None or width is not None:
        given = {"height": height or width, "width": width or height}
        return [given | some for some in frames]
    own = _own_side(pipe)
    sides = _LATENTS if own is None or own >= _LATENTS[0] else (own, *_LATENTS)
    pixels = [side * _factor(pipe) for side in sides]
    return [{"height": side, "width": side} | some for side in pixels for some in frames]


def denoiser(pipe: Any) -> Any:
    """The pipeline's denoising network, or None."""
    for name in ("unet", "transformer", "prior"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return getattr(pipe, name)
    return None


def small_arguments(pipe: Any, size: dict[str, Any], steps: int, given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a call of that size: the user's, and what has to be there besides."""
    takes = accepted(pipe)
    wanted: dict[str, Any] = {"num_inference_steps": steps, **size, "use_resolution_binning": False}
    wanted["clean_caption"] = False
    wanted["class_labels"] = [0]
    if _takes_pictures(pipe, takes):
        small = _LATENTS[0] * _factor(pipe)
        sides = size.get("height", small), size.get("width", small)
        wanted |= {name: _picture(*sides) for name in ("image", "control_image")}
        wanted["mask_image"] = (torch.arange(sides[1]) < sides[1] // 2).float().expand(1, 1, *sides)
    if any(name.endswith("prompt_embeds") for name in given):
        wanted |= _no_text(pipe, takes)
    elif "prompt" in takes:
        wanted |= {"prompt": PROMPT} if _encodes(pipe) else made_up_embeddings(pipe)
    return {**{k: v for k, v in wanted.items() if k in takes}, **given}


def made_up_embeddings(pipe: Any) -> dict[str, Any]:
    """Random embeddings for a pipeline without text encoders, as wide as its network wants them."""
    takes, network = accepted(pipe), denoiser(pipe)
    config = getattr(network, "config", {})
    width = next((config[k] for k in _WIDTHS if isinstance(config.get(k), int)), None)
    pooled = next((config[k] for k in _POOLED if isinstance(config.get(k), int)), None)
    if width is None:
        return {}
    draw = torch.Generator().manual_seed(0)
    like = {"dtype": network.dtype, "device": execution_device(pipe) or network.device}
    made: dict[str, Any] = {}
    for name in takes:
        if name in ("prompt_embeds", "negative_prompt_embeds"):
            made[name] = torch.randn(1, _TOKENS, width, generator=draw).to(**like)
        elif name.endswith("pooled_prompt_embeds") and pooled is not None:
            made[name] = torch.randn(1, pooled, generator=draw).to(**like)
        elif name.endswith("attention_mask") and "kwargs" not in name:
            made[name] = torch.ones(1, _TOKENS, dtype=torch.long, device=like["device"])
    # Guided by an embedded scale, unless asked for more: negative embeddings would go unused.
    if "true_cfg_scale" in takes:
        made = {k: v for k, v in made.items() if not k.startswith("negative_")}
    return made | _no_text(pipe, takes)


def unpacked_names(pipe: Any) -> list[str]:
    """The names that the pipeline's call gives to what ``encode_prompt`` returns, read from its source."""
    call = without_no_grad(plain_class(type(pipe)).__call__)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    except (OSError, TypeError, SyntaxError):  # no source
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            function, (target, *_) = node.value.func, node.targets
            if isinstance(function, ast.Attribute) and function.attr == "encode_prompt":
                names = [n.id if isinstance(n, ast.Name) else "" for n in getattr(target, "elts", [target])]
                if "prompt_embeds" in names:
                    return names
    return []


def as_arguments(pipe: Any, encoded: Any, takes: list[str]) -> dict[str, Any]:
    """What ``encode_prompt`` returned, as the call's own keywords; empty if they cannot be told."""
    values = encoded if isinstance(encoded, tuple | list) else (encoded,)
    names = unpacked_names(pipe)
    if len(names) != len(values):
        return {}
    found = {k: v for k, v in zip(names, values, strict=True) if isinstance(v, Tensor) and k in takes}
    return found | _no_text(pipe, takes) if "prompt_embeds" in found else {}


def _no_text(pipe: Any, takes: list[str]) -> dict[str, Any]:
    """Texts that are set by default would stand beside the embeddings."""
    return {name: None for name in ("prompt", "negative_prompt") if name in takes}


def _encodes(pipe: Any) -> bool:
    parts = vars(pipe)
    return any(k.startswith("text_encoder") and v is not None for k, v in parts.items()) and any(
        k.startswith("tokenizer") and v is not None for k, v in parts.items()
    )


def _takes_pictures(pipe: Any, takes: list[str]) -> bool:
    if {"image", "control_image"}.isdisjoint(takes):
        return False
    cls: Any = plain_class(type(pipe))
    if is_modular(cls):
        return False
    words = (
        "Img2Img",
        "Inpaint",
        "ControlNet",
        "Upscale",
        "InstructPix2Pix",
        "Depth",
        "ImageToVideo",
        "Image2Image",
    )
    return "strength" in takes or any(word in cls.__name__ for word in words)


def _factor(pipe: Any) -> int:
    """Pixels per latent."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    return next((int(getattr(pipe, name)) for name in names if getattr(pipe, name, None)), 8)


def _picture(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def _own_side(pipe: Any) -> int | None:
    """The side of latents that the pipeline is made for, if it says so."""
    config = getattr(denoiser(pipe), "config", {})
    side = getattr(pipe, "default_sample_size", None) or config.get("sample_size")
    side = min(side) if isinstance(side, list | tuple) else side
    return side if isinstance(side, int) else None
