"""What ships, put where the training leaves its results: to train one part on without the others."""

from __future__ import annotations

import json

import torch
from torch import nn

import backdrift as bd
from backdrift.losses import Preference
from backdrift.losses.digit_kinds import load_kinds
from backdrift.pipelines.assets import folder, load_classifier, load_clip, load_digits_denoiser

from .clip import VOCABULARY, save_vocabulary
from .loop import WORK, save_atomically


def _put(name: str, module: nn.Module, **more: object) -> None:
    path = WORK / f"{name}-done.pt"
    if path.exists():
        print(f"{name}: trained here, left alone")
        return
    state = {k: v.detach().float().cpu() for k, v in module.state_dict().items()}
    save_atomically({"module": state, **more}, path)
    print(f"{name}: taken from the package")


def _put_vocabulary() -> None:
    if VOCABULARY.exists():
        print("vocabulary: made here, left alone")
        return
    model = json.loads((folder("clip") / "tokenizer.json").read_text())["model"]
    save_vocabulary(VOCABULARY, model["vocab"], model["merges"])


def restore() -> None:
    """Write the shipped weights as finished parts; the autoencoder and the denoisers as results of a first round.

    A part that was trained here is left alone.
    """
    _put_vocabulary()
    sd, flow = bd.load(dtype=torch.float32), bd.load("flow", dtype=torch.float32)
    clip, _ = load_clip()
    _put("vae", sd.vae, scaling_factor=sd.vae.config.scaling_factor)
    _put("text", clip)
    _put("clip", clip)
    _put("classifier", load_classifier())
    digits = load_digits_denoiser().network
    assert isinstance(digits, nn.Module)
    _put("digits", digits)
    _put("preference", Preference().network)
    _put("kinds", load_kinds().network)
    for name, network in (("vae", sd.vae), ("unet", sd.unet), ("flow", flow.transformer)):
        path = WORK / f"{name}-round0.pt"
        if not path.exists():
            save_atomically({k: v.half().cpu() for k, v in network.state_dict().items()}, path)
