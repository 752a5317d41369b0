"""Measure the built-in pipelines as the cards report it: 500 random captions, 20 steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import backdrift as bd
from backdrift.pipelines.assets import load_classifier

from .classifier import GREY, halves
from .scenes import Scene, random_scene, render

SETTINGS: dict[str, dict[str, Any]] = {
    "sd": {"num_inference_steps": 20, "guidance_scale": 3.0},
    "flow": {"num_inference_steps": 20, "guidance_scale": 3.0},
}


@torch.no_grad()
def generate(pipe: Any, name: str, scenes: list[Scene], seed: int = 0, batch: int = 50) -> Tensor:
    """Pictures (n, 3, 64, 64) in [0, 1] for the captions of the scenes."""
    out = []
    for i in range(0, len(scenes), batch):
        captions = [s.caption for s in scenes[i : i + batch]]
        generator = torch.Generator().manual_seed(seed + i)
        images = pipe(captions, output_type="np", generator=generator, **SETTINGS[name]).images
        out.append(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2))
    return torch.cat(out)


@torch.no_grad()
def score(pictures: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Fractions of pictures whose digits, digit colours and background are the named ones.

    A two-digit picture counts as right only where both digits are; "all digits" is over both kinds.
    Colours are not asked of
    black-and-white pictures, backgrounds neither; digits only where the caption names them.
    """
    net = load_classifier()
    single = {k: v.argmax(1) for k, v in net(pictures).items()}
    sides = [{k: v.argmax(1) for k, v in net(x).items()} for x in halves(pictures)]
    hits: dict[str, list[bool]] = {"digit": [], "two digits": [], "colour": [], "background": []}
    for i, s in enumerate(scenes):
        views = sides if len(s.digits) == 2 else [single]
        if s.named:
            right = all(int(v["digit"][i]) == d for v, d in zip(views, s.digits, strict=True))
            hits["two digits" if len(s.digits) == 2 else "digit"].append(right)
        if s.effect != GREY:
            hits["colour"].append(
                all(int(v["colour"][i]) == c for v, c in zip(views, s.colours, strict=True))
            )
            hits["background"].append(all(int(v["background"][i]) == s.background for v in views[:1]))
    hits["all digits"] = hits["digit"] + hits["two digits"]
    return {k: float(np.mean(v)) for k, v in hits.items() if v}


def grid(pictures: Tensor, columns: int = 8, zoom: int = 3) -> Image.Image:
    """Pictures side by side, enlarged."""
    n, _, h, w = pictures.shape
    rows = n // columns
    x = (
        pictures[: rows * columns]
        .reshape(rows, columns, 3, h, w)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * h, columns * w, 3)
    )
    picture = Image.fromarray((x.clamp(0, 1) * 255).round().byte().numpy())
    return picture.resize((columns * w * zoom, rows * h * zoom), Image.Resampling.BICUBIC)


def measure(name: str, count: int = 500, folder: Path | None = None) -> dict[str, float]:
    """The quality figures of a built-in pipeline, and what the classifier says of real pictures of the same captions.

    With a folder, a grid of 64 pictures and the figures as JSON are written there.
    """
    rng = np.random.default_rng(99)
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = generate(bd.load(name), name, scenes)
    figures = score(pictures, scenes)
    alone = [i for i, s in enumerate(scenes) if len(s.digits) == 1 and s.effect < 0]
    plain = score(pictures[alone], [scenes[i] for i in alone])
    figures |= {f"one digit, no effect: {k}": v for k, v in plain.items()}
    figures |= {f"real pictures: {k}": v for k, v in score(render(scenes, rng), scenes).items()}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        grid(pictures[:64]).save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text(
            json.dumps({"captions": count, **SETTINGS[name], **figures}, indent=2) + "\n"
        )
    return figures
