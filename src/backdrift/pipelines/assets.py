"""The assets that ship inside the package: two pipelines, the networks beside them, and their cards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..denoiser import Denoiser
from ..errors import InputError
from ..schedules import VP
from .classifier import SceneClassifier
from .digits import DigitsNetwork

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PIPELINES = {"sd": "StableDiffusionPipeline, ε-prediction", "flow": "StableDiffusion3Pipeline, flow matching"}


def folder(name: str) -> Path:
    """The folder of a shipped asset: "sd", "flow", "clip", "classifier", "digits", "preference" or "kinds".

    Raises:
        InputError: if there is no such asset, or the installation lacks its files.
    """
    path = ASSETS / name
    if not path.is_dir():
        there = sorted(p.name for p in ASSETS.iterdir() if p.is_dir()) if ASSETS.is_dir() else []
        raise InputError(f"no built-in asset {name!r}; this installation has: {', '.join(there) or 'none'}")
    return path


def built_in(pipe: Any) -> str | None:
    """Which of :data:`PIPELINES` a pipeline was loaded as; None for another."""
    source = getattr(pipe, "config", {}).get("_name_or_path")
    return next((name for name in PIPELINES if source and Path(source) == ASSETS / name), None)


def load_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """The shipped CLIP (pictures of 64×64, mean and deviation 0.5) and its tokenizer, in float32, frozen."""
    from transformers import CLIPModel, CLIPTokenizer

    path = folder("clip")
    with _without_bars():
        clip = CLIPModel.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    return clip, CLIPTokenizer.from_pretrained(path)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' progress bars switched off: for what is loaded in a blink, in the middle of other output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_classifier() -> SceneClassifier:
    """The shipped classifier of digit, colour and background, in float32, frozen."""
    from safetensors.torch import load_file

    path = folder("classifier")
    net = SceneClassifier(**json.loads((path / "config.json").read_text()))
    net.load_state_dict({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
    return net.eval().requires_grad_(False)


def load_digits_denoiser() -> Denoiser:
    """The shipped pixel model of 8×8 digits on its schedule, in float32, frozen.

    States are (B, 1, 8, 8), -1 on paper and 1 in full ink; ``cond`` is (B, 10) weights of the digits, or None for
    any digit; times in [0.001, 1] are what it was trained on.
    """
    from safetensors.torch import load_file

    path = folder("digits")
    network = DigitsNetwork(**json.loads((path / "config.json").read_text()))
    network.load_state_dict({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
    schedule = VP.linear(network.beta0, network.beta1)
    return Denoiser(network.eval().requires_grad_(False), schedule, "v_prediction")


def card(name: str) -> str:
    """The card of a shipped asset: data, licence, parameters, training time, measured quality, command."""
    return (folder(name) / "README.md").read_text()
