"""Put the trained parts together as diffusers folders, in half precision, inside the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTextModelWithProjection

from backdrift.losses.digit_kinds import KindNetwork
from backdrift.losses.preference import PreferenceNetwork
from backdrift.pipelines.assets import ASSETS
from backdrift.pipelines.classifier import SceneClassifier

from . import digits, flow, unet
from .clip import VOCABULARY, build_tokenizer
from .latents import trained_clip, trained_vae
from .loop import WORK
from .scenes import BACKGROUNDS, COLOURS, DIGITS


def _trained(name: str, module: nn.Module) -> nn.Module:
    module.load_state_dict(torch.load(WORK / f"{name}-done.pt", weights_only=True)["module"])
    return module.eval()


def text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The text half of the trained CLIP, alone and with its projection."""
    clip = trained_clip().cpu()
    plain = CLIPTextModel(clip.config.text_config)
    inner = plain.text_model if hasattr(plain, "text_model") else plain
    inner.load_state_dict(clip.text_model.state_dict())
    projected = CLIPTextModelWithProjection(clip.config.text_config)
    projected.text_model.load_state_dict(clip.text_model.state_dict())
    projected.text_projection.load_state_dict(clip.text_projection.state_dict())
    return plain.eval(), projected.eval()


def _fresh(name: str) -> Path:
    path = ASSETS / name
    card = path / "README.md"
    text = card.read_text() if card.exists() else None
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    if text:
        card.write_text(text)
    return path


def _save(pipe: diffusers.DiffusionPipeline, name: str) -> None:
    path = _fresh(name)
    pipe.to(dtype=torch.float16).save_pretrained(path, safe_serialization=True)
    index = json.loads((path / "model_index.json").read_text())
    for part in pipe._get_signature_keys(type(pipe))[0]:
        index.setdefault(
            part, [None, None]
        )  # a component that is None is not written, yet asked for on loading
    (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for folder in path.glob("tokenizer*"):
        _copy_vocabulary(folder)
    for folder in path.glob("text_encoder*"):
        _prefix_keys(folder / "model.safetensors")


def _copy_vocabulary(folder: Path) -> None:
    """Older releases of transformers read these two files instead of tokenizer.json."""
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(VOCABULARY / file, folder / file)


def _prefix_keys(path: Path) -> None:
    """Name a text encoder's weights as published checkpoints do, which every release of transformers reads."""
    state = load_file(path)
    outside = ("text_model.", "text_projection.")
    named = {k if k.startswith(outside) else f"text_model.{k}": v for k, v in state.items()}
    save_file(named, path, metadata={"format": "pt"})


def export_sd() -> None:
    """The ε-predicting ``StableDiffusionPipeline``."""
    plain, _ = text_encoders()
    pipe = diffusers.StableDiffusionPipeline(
        vae=trained_vae().cpu(),
        text_encoder=plain,
        tokenizer=build_tokenizer(),
        unet=_trained("unet", unet.build()),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            **unet.SCHEDULE, timestep_spacing="trailing", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save(pipe, "sd")


def export_flow() -> None:
    """The flow-matching ``StableDiffusion3Pipeline``; both of its CLIP encoders are the same one."""
    _, projected = text_encoders()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=_trained("flow", flow.build()),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_flow_vae(),
        text_encoder=projected,
        tokenizer=build_tokenizer(),
        text_encoder_2=projected,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    _save(pipe, "flow")


def _flow_vae() -> diffusers.AutoencoderKL:
    vae = trained_vae().cpu()
    vae.register_to_config(shift_factor=0.0)  # StableDiffusion3Pipeline subtracts one
    return vae


def export_clip() -> None:
    """Both halves of CLIP with the tokenizer and the picture processor."""
    path = _fresh("clip")
    trained_clip().cpu().half().save_pretrained(path, safe_serialization=True)
    build_tokenizer().save_pretrained(path)
    _copy_vocabulary(path)
    half = [0.5, 0.5, 0.5]
    side = {"height": 64, "width": 64}
    processor = CLIPImageProcessor(size=side, crop_size=side, image_mean=half, image_std=half)
    processor.save_pretrained(path)


def export_classifier() -> None:
    """The classifier of digit, colour and background."""
    net = _trained("classifier", SceneClassifier(DIGITS, list(COLOURS), BACKGROUNDS))
    path = _fresh("classifier")
    save_file({k: v.half().contiguous() for k, v in net.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(net.config(), indent=2) + "\n")  # type: ignore[operator]


def export_digits() -> None:
    """The pixel model of 8×8 digits."""
    network = _trained("digits", digits.build())
    path = _fresh("digits")
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(network.config(), indent=2) + "\n")  # type: ignore[operator]


def export_preference() -> None:
    """The preference model."""
    network = _trained("preference", PreferenceNetwork())
    path = _fresh("preference")
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, path / "model.safetensors")


def export_kinds() -> None:
    """The classifier of kinds."""
    network = _trained("kinds", KindNetwork())
    path = _fresh("kinds")
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, path / "model.safetensors")


def export() -> None:
    """Export whatever has been trained."""
    for name, write in (
        ("clip", export_clip),
        ("classifier", export_classifier),
        ("unet", export_sd),
        ("flow", export_flow),
        ("digits", export_digits),
        ("preference", export_preference),
        ("kinds", export_kinds),
    ):
        if (WORK / f"{name}-done.pt").exists():
            write()
            print(f"exported {name}")
    for path in ASSETS.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors are written for their owner alone
    size = sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) / 2**20
    print(f"assets: {size:.1f} MiB")
