"""``load`` a pipeline, built-in or one's own, and draw the ``noise`` it starts from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..suggest import closest
from .assets import PIPELINES, folder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load(model: str | PathLike[str] = "sd", **kwargs: Any) -> DiffusionPipeline:
    """A diffusers pipeline, ready to be called.

    Args:
        model: ``"sd"`` (default), the built-in ``StableDiffusionPipeline``; ``"flow"``, its flow-matching
            sibling, a ``StableDiffusion3Pipeline``; a folder or a hub id, handed to
            ``DiffusionPipeline.from_pretrained``; or one ``.safetensors`` file, handed to
            ``StableDiffusionPipeline.from_single_file`` (name another class by ``pipeline_class=``).
        kwargs: handed on. Built-in weights are stored in half precision and are loaded as float32 unless
            ``torch_dtype`` says otherwise. Remote code is never run, and weights in pickle files are refused.

    Raises:
        InputError: if the model is neither built in nor found.
    """
    import diffusers

    name = str(model)
    if kwargs.get("trust_remote_code") or kwargs.get("custom_pipeline"):
        raise InputError("backdrift runs no remote code: load such a pipeline yourself and pass the object")
    if name in PIPELINES:
        kwargs.setdefault(_dtype_keyword(), kwargs.pop("torch_dtype", kwargs.pop("dtype", torch.float32)))
        with _no_loading_bars():
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                folder(name), **{**_absent(folder(name)), **kwargs}
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe
    if name.endswith(".safetensors"):
        if not Path(name).is_file():
            raise InputError(f"no file {name!r}")
        cls = kwargs.pop("pipeline_class", diffusers.StableDiffusionPipeline)
        return cls.from_single_file(name, **kwargs)
    if Path(name).suffix in (".ckpt", ".pt", ".bin", ".pth"):
        raise InputError(
            f"{name!r} is a pickle file, which can run code when it is opened; convert it to safetensors"
        )
    kwargs.setdefault("use_safetensors", True)
    try:
        return diffusers.DiffusionPipeline.from_pretrained(name, **{**_absent(Path(name)), **kwargs})
    except (OSError, ValueError) as problem:
        built_in = ", ".join(repr(n) for n in PIPELINES)
        raise InputError(
            f"cannot load {name!r}: it is not built in ({built_in}).{closest(name, PIPELINES)} As a folder or a hub id "
            f"it failed with: "
            f"{str(problem).strip().splitlines()[0]}"
        ) from problem


def _absent(path: Path) -> dict[str, None]:
    """Components that a saved pipeline was without (``[null, null]``): diffusers asks for some of them by name."""
    index = path / "model_index.json"
    if not index.is_file():
        return {}
    return {k: None for k, v in json.loads(index.read_text()).items() if v == [None, None]}


def _dtype_keyword() -> str:
    """Newer releases of diffusers call ``torch_dtype`` ``dtype`` and warn about the old name."""
    import diffusers.utils.deprecation_utils as deprecation

    return "dtype" if hasattr(deprecation, "_resolve_dtype") else "torch_dtype"


@contextlib.contextmanager
def _no_loading_bars() -> Iterator[None]:
    """The built-in weights load in a moment: bars for them, and notices about parts they lack, would only be noise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    both = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in both:
        module.disable_progress_bar()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        for module in both:
            module.enable_progress_bar()


def latent_shape(pipe: Any, *, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
    """Shape of one latent (without the batch) that ``pipe(latents=…)`` takes for a picture of that size in pixels.

    Raises:
        InputError: if the pipeline has no picture-shaped latents, or the size does not fit it.
    """
    network = _denoiser(pipe)
    if network is None or not hasattr(network.config, "in_channels"):
        raise InputError(
            f"{type(pipe).__name__} has no denoising network with in_channels; pass latents of your own"
        )
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    default = getattr(pipe, "default_sample_size", None) or network.config.get("sample_size", None)
    packed = hasattr(pipe, "_pack_latents")
    step = factor * (2 if packed else 1)
    sides = []
    for side, given, fallback in (
        ("height", height, default if not isinstance(default, (list, tuple)) else default[0]),
        ("width", width, default if not isinstance(default, (list, tuple)) else default[-1]),
    ):
        pixels = given if given is not None else (fallback or 0) * factor
        if pixels <= 0 or pixels % step:
            raise InputError(
                f"{side}={pixels} does not fit {type(pipe).__name__}: use a positive multiple of {step} pixels"
            )
        sides.append(pixels // factor)
    if packed:
        return (sides[0] // 2) * (sides[1] // 2), network.config.in_channels
    channels = (
        pipe.vae.config.latent_channels
        if getattr(pipe, "vae", None) is not None
        else network.config.in_channels
    )
    return channels, sides[0], sides[1]


def noise(
    pipe: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise for ``pipe(latents=…)``, the same on every device for the same seed.

    Args:
        pipe: a diffusers pipeline with ``latents=``.
        height, width: size of the picture in pixels; by default the pipeline's own.
        seed: the noise is drawn on the CPU from a generator with this seed, sample by sample: sample i of a
            batch does not depend on the batch's size.
        batch_size: how many samples, at least 1.
        dtype, device: by default those of the denoising network's calls.

    Returns:
        (batch_size, channels, height/f, width/f), or packed (batch_size, tokens, channels) for Flux.

    Raises:
        InputError: if the size does not fit the pipeline or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: at least 1 is needed")
    network = _denoiser(pipe)
    shape = latent_shape(pipe, height=height, width=width)
    draw = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randn(shape, generator=draw) for _ in range(batch_size)])
    device = device or pipe._execution_device
    return x.to(device=device, dtype=dtype or getattr(network, "dtype", torch.float32))


def _denoiser(pipe: Any) -> Any:
    """The denoising network, or None. Not by ``or``: the wrapper that torch.compile makes has no truth value."""
    found = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    return next((network for network in found if network is not None), None)
