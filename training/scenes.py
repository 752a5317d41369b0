"""The pictures that the built-in models learn from, and their captions.

A *scene* is one or two real handwritten digits (scikit-learn's ``load_digits``) in a named colour on a
named background: a flat colour, or a crop of a photograph that scikit-image or scikit-learn ships; a
named effect is sometimes laid over it. A fifth of the digits and a fifth of each photograph (its right
edge) are held out and never trained on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.08, 0.58, 0.22),
    "blue": (0.12, 0.26, 0.86),
    "yellow": (0.98, 0.86, 0.10),
    "orange": (0.98, 0.50, 0.06),
    "purple": (0.50, 0.14, 0.66),
    "white": (0.98, 0.98, 0.98),
    "black": (0.05, 0.05, 0.06),
}
FLAT: dict[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.96),
    "black": (0.06, 0.06, 0.07),
    "grey": (0.55, 0.55, 0.56),
    "red": (0.84, 0.16, 0.18),
    "green": (0.14, 0.60, 0.28),
    "blue": (0.18, 0.34, 0.86),
    "yellow": (0.98, 0.87, 0.22),
    "pink": (0.99, 0.72, 0.80),
}
# name -> (package, file, tint or None). The three textures are grey photographs, so they are given a colour;
# the stars are brightened to a night sky, since many of their crops could not be told from plain black.
PHOTOS: dict[str, tuple[str, str, tuple[float, float, float] | None]] = {
    "grass": ("skimage", "grass.png", (0.62, 1.0, 0.36)),
    "bricks": ("skimage", "brick.png", (1.0, 0.60, 0.46)),
    "gravel": ("skimage", "gravel.png", (0.92, 0.94, 1.0)),
    "fur": ("skimage", "chelsea.png", None),
    "petals": ("sklearn", "flower.jpg", None),
    "stars": ("skimage", "hubble_deep_field.jpg", (1.6, 1.8, 2.6)),
}
BACKGROUNDS = (*FLAT, *PHOTOS)
LUMA = (0.299, 0.587, 0.114)
EFFECTS = ("blurred", "in black and white", "dark")
# Pairs of digit colour and background in which the digit could not be read.
CLASHES = {(c, c) for c in COLOURS} | {
    ("green", "grass"),
    ("orange", "bricks"),
    ("red", "bricks"),
    ("black", "stars"),
    ("orange", "fur"),
    ("red", "petals"),
    ("orange", "petals"),
    ("orange", "red"),
    ("yellow", "white"),
    ("white", "yellow"),
    ("white", "pink"),
    ("purple", "blue"),
    ("blue", "black"),
    ("purple", "black"),
}


@dataclass(frozen=True)
class Scene:
    """What is in a picture. ``digits`` and ``colours`` have one or two entries; -1 means "not named"."""

    digits: tuple[int, ...]
    colours: tuple[int, ...]
    background: int
    effect: int = -1
    named: bool = True

    @property
    def caption(self) -> str:
        """Such as "a red seven on grass, blurred"; "a red digit on white" where the digit is not named."""
        parts = []
        for digit, colour in zip(self.digits, self.colours, strict=True):
            parts.append(f"a {list(COLOURS)[colour]} {DIGITS[digit] if self.named else 'digit'}")
        text = " and ".join(parts) + f" on {BACKGROUNDS[self.background]}"
        return text if self.effect < 0 else f"{text}, {EFFECTS[self.effect]}"


@functools.cache
def _luma(name: str) -> float:
    """Mean brightness of a digit colour or of a background."""
    colour = COLOURS.get(name) or FLAT.get(name)
    mean = torch.tensor(colour) if colour else photo(name).mean((1, 2))
    return float(mean @ torch.tensor(LUMA))


def readable(colour: str, background: str, effect: int = -1) -> bool:
    """Whether a digit in that colour can be told from that background, under that effect."""
    if (colour, background) in CLASHES:
        return False
    grey = effect >= 0 and EFFECTS[effect] == "in black and white"
    return not grey or abs(_luma(colour) - _luma(background)) > 0.2


@functools.cache
def _allowed(background: int, effect: int) -> tuple[int, ...]:
    return tuple(i for i, c in enumerate(COLOURS) if readable(c, BACKGROUNDS[background], effect))


def random_scene(
    rng: np.random.Generator, *, two: float = 0.15, effect: float = 0.3, unnamed: float = 0.1
) -> Scene:
    """Draw a scene; the arguments are the chances of two digits, of an effect, of an unnamed digit."""
    count = 2 if rng.random() < two else 1
    background = int(rng.integers(len(BACKGROUNDS)))
    laid = int(rng.integers(len(EFFECTS))) if rng.random() < effect else -1
    allowed = _allowed(background, laid)
    return Scene(
        tuple(int(rng.integers(10)) for _ in range(count)),
        tuple(allowed[int(rng.integers(len(allowed)))] for _ in range(count)),
        background,
        laid,
        bool(rng.random() >= unnamed),
    )


@functools.cache
def real_digits(held_out: bool = False) -> tuple[Tensor, Tensor]:
    """The real digits (n, 1, 8, 8), ink in [0, 1], and which digit each is (n,); every fifth one is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    order = np.random.default_rng(0).permutation(len(images))
    fifth = np.zeros(len(images), dtype=bool)
    fifth[order[: len(images) // 5]] = True
    chosen = torch.from_numpy(fifth == held_out)
    return images[chosen], torch.from_numpy(data.target)[chosen]


@functools.cache
def digit_masks(held_out: bool = False) -> list[Tensor]:
    """The real digits as soft masks: ten tensors (n, 96, 96) in [0, 1]."""
    images, digits = real_digits(held_out)
    masks = []
    for digit in range(10):
        padded = F.pad(images[digits == digit], (2, 2, 2, 2))
        masks.append(soft_mask(F.interpolate(padded, size=96, mode="bicubic", align_corners=False)[:, 0]))
    return masks


def soft_mask(ink: Tensor) -> Tensor:
    """Enlarged ink with its edges sharpened, in [0, 1]."""
    return ((ink - 0.25) / 0.35).clamp(0, 1)


@functools.cache
def photo(name: str, held_out: bool = False) -> Tensor:
    """A photograph (3, h, w) in [0, 1] at 345 columns: the left four fifths, or the right one held out."""
    from PIL import Image

    package, file, tint = PHOTOS[name]
    if package == "skimage":
        import skimage

        path = f"{skimage.__path__[0]}/data/{file}"
    else:
        import sklearn

        path = f"{sklearn.__path__[0]}/datasets/images/{file}"
    picture = Image.open(path).convert("RGB")
    picture = picture.resize((345, round(345 * picture.height / picture.width)), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.asarray(picture).copy()).float().permute(2, 0, 1) / 255
    if tint is not None:
        x = x * torch.tensor(tint)[:, None, None]
    # Half the contrast of the fine grain, so that a digit on it can be read.
    smooth = F.avg_pool2d(F.pad(x[None], (8, 8, 8, 8), mode="reflect"), 17, 1)[0]
    x = (smooth + 0.6 * (x - smooth)).clamp(0, 1)
    cut = x.shape[2] * 4 // 5
    return x[:, :, cut:] if held_out else x[:, :, :cut]


def _background(scene: Scene, rng: np.random.Generator, held_out: bool) -> Tensor:
    name = BACKGROUNDS[scene.background]
    if name in FLAT:
        jitter = torch.from_numpy(rng.uniform(-0.02, 0.02, 3)).float()
        return (torch.tensor(FLAT[name]) + jitter).clamp(0, 1)[:, None, None].expand(3, SIZE, SIZE)
    source = photo(name, held_out)
    top, left = (int(rng.integers(n - SIZE + 1)) for n in source.shape[1:])
    crop = source[:, top : top + SIZE, left : left + SIZE]
    return crop.flip(2) if rng.random() < 0.5 else crop


def _placements(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Centre x, centre y (in [-1, 1]), half-size (a fraction of the picture) and angle of each digit."""
    out = []
    for i in range(len(scene.digits)):
        two = len(scene.digits) == 2
        centre = (-0.46 + 0.92 * i) if two else 0.0
        half = rng.uniform(0.74, 0.82) if two else rng.uniform(1.12, 1.3)
        out.append(
            (centre + rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06), half, rng.uniform(-0.12, 0.12))
        )
    return out


def apply_effect(pictures: Tensor, effect: int) -> Tensor:
    """Lay a named effect over pictures (n, 3, h, w) in [0, 1]."""
    if effect < 0:
        return pictures
    name = EFFECTS[effect]
    if name == "in black and white":
        luma = (pictures * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        return luma.expand_as(pictures)
    if name == "dark":
        return pictures * 0.45
    steps = torch.arange(-6, 7).float()
    kernel = torch.exp(-(steps**2) / (2 * 2.2**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 13)
    padded = F.pad(pictures, (6, 6, 6, 6), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


@torch.autocast("cpu", enabled=False)
def render(
    scenes: list[Scene],
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    masks: list[Tensor] | None = None,
) -> Tensor:
    """Draw the scenes: (n, 3, 64, 64) in [0, 1].

    ``masks``, instead of the digits': a scene's ``digits`` are the indices of their list.
    """
    masks = digit_masks(held_out) if masks is None else masks
    pictures = torch.stack([_background(s, rng, held_out) for s in scenes])
    for slot in (0, 1):
        rows = [i for i, s in enumerate(scenes) if len(s.digits) > slot]
        if not rows:
            continue
        theta = torch.zeros(len(rows), 2, 3)
        shapes, paints = [], []
        for k, i in enumerate(rows):
            s = scenes[i]
            cx, cy, half, angle = _placements(s, rng)[slot]
            cos, sin = float(np.cos(angle)) / half, float(np.sin(angle)) / half
            theta[k] = torch.tensor([[cos, sin, -cos * cx - sin * cy], [-sin, cos, sin * cx - cos * cy]])
            pool = masks[s.digits[slot]]
            shapes.append(pool[int(rng.integers(len(pool)))])
            paints.append(torch.tensor(list(COLOURS.values())[s.colours[slot]]))
        grid = F.affine_grid(theta, [len(rows), 1, SIZE, SIZE], align_corners=False)
        mask = F.grid_sample(torch.stack(shapes)[:, None], grid, align_corners=False)
        pictures[rows] = pictures[rows] * (1 - mask) + torch.stack(paints)[:, :, None, None] * mask
    for effect in range(len(EFFECTS)):
        chosen = [i for i, s in enumerate(scenes) if s.effect == effect]
        if chosen:
            pictures[chosen] = apply_effect(pictures[chosen], effect)
    return pictures
