"""The preference model: a small network that learns from pairs of pictures which one is preferred.

The rule, in words: *of two pictures with the same caption, that one is preferred which is better lit, more colourful,
richer in contrast and crisper*. Each of the four is worth up to one point (:func:`points`), measured on the picture
as it would be saved; their sum is the picture's merit (:func:`merit`). A pair's choice is then drawn as people's are,
by Bradley and Terry: a tenth of a point more is preferred in 73 % of pairs.

Neither the digit nor a colour's name nor the background counts, so it is not what CLIP or the classifier score.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backdrift.losses import ClassTarget, CLIPText, Preference, measurements
from backdrift.losses.preference import PreferenceNetwork

from .loop import device, train
from .scenes import SIZE, Scene, random_scene, render

LOOKS = 4
"""Pictures of each caption; any two of them are a pair."""
TEMPERATURE = 0.1
"""Points of merit that make one log-odd."""
LIGHT, COLOUR, CONTRAST, CRISP = (0.55, 0.25), 0.2, 0.15, (0.12, 0.7)
"""Of the rule: best brightness, its width; chroma and contrast worth 63 %; best crispness, its width as a logarithm."""


def points(pictures: Tensor) -> dict[str, Tensor]:
    """The rule's four properties of pictures (n, 3, H, W), each (n,) in [0, 1]; more is better.

    - light: a Gaussian in the mean luma, neither dark nor glaring;
    - colour: 1 - exp(-c / 0.2) of the mean chroma c (max - min over a pixel's channels);
    - contrast: 1 - exp(-s / 0.15) of the luma's standard deviation s;
    - crispness: a Gaussian in the logarithm of the fine detail's share: the energy that a blur of 1 pixel takes from
      the luma, by what one of 3 pixels takes. 0.12 is best, a drawing as it is; blur lowers the share, grain raises it.
    """
    saved = pictures.clamp(0, 1)
    chroma, spread = measurements.mean_chroma(saved), measurements.contrast(saved)
    fine, all_detail = (measurements.high_frequency_energy(saved, sigma) for sigma in (1.0, 3.0))
    share = (fine + 1e-7) / (all_detail + 1e-5)  # finite, and worth nothing, for a flat picture
    return {
        "light": _bump(measurements.mean_brightness(saved), *LIGHT),
        "colour": 1 - (-chroma / COLOUR).exp(),
        "contrast": 1 - (-spread / CONTRAST).exp(),
        "crispness": _bump(share.log(), math.log(CRISP[0]), CRISP[1]),
    }


def _bump(x: Tensor, centre: float, width: float) -> Tensor:
    return (-((x - centre) / width).square() / 2).exp()


def merit(pictures: Tensor) -> Tensor:
    """The rule: the sum of the four :func:`points`, (n,) in [0, 4]."""
    return torch.stack(list(points(pictures).values())).sum(0)


@dataclass(frozen=True)
class Look:
    """How a picture is finished: factors of light, of colour and of contrast; blur and grain in pixels and levels."""

    light: float = 1.0
    colour: float = 1.0
    contrast: float = 1.0
    blur: float = 0.0
    grain: float = 0.0


def random_look(rng: np.random.Generator) -> Look:
    """Each property is left as it is in half of the pictures."""
    drawn = {
        "light": np.exp(rng.uniform(-1.1, 0.35)),
        "colour": rng.uniform(0.0, 1.5),
        "contrast": rng.uniform(0.3, 1.4),
        "blur": rng.uniform(0.4, 2.5),
        "grain": rng.uniform(0.01, 0.1),
    }
    changed = rng.random(len(drawn)) < 0.5
    return Look(**{k: float(v) for (k, v), c in zip(drawn.items(), changed, strict=True) if c})


def finish(pictures: Tensor, looks: list[Look], rng: np.random.Generator) -> Tensor:
    """Pictures (n, 3, 64, 64), each with its look; not clamped, as pictures under guidance are not."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(look, name) for look in looks])[:, None, None, None]

    weights = torch.tensor(measurements.LUMA)[:, None, None]
    grey = (pictures * weights).sum(1, keepdim=True)
    x = grey + column("colour") * (pictures - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (mean + column("contrast") * (x - mean)) * column("light")
    apart = torch.arange(SIZE)[:, None] - torch.arange(SIZE)
    kernel = (-apart.square() / (2 * column("blur").clamp_min(0.05).square())).exp()
    kernel = kernel / kernel.sum(-1, keepdim=True)
    noise = torch.from_numpy(rng.standard_normal(x.shape)).float()
    return kernel @ x @ kernel.mT + column("grain") * noise


def drawn(captions: int, rng: np.random.Generator, *, held_out: bool) -> tuple[list[Scene], Tensor]:
    """``captions`` scenes, and ``LOOKS`` pictures of each one after the other, in different handwriting and looks."""
    scenes = [random_scene(rng) for _ in range(captions)]
    each = [scene for scene in scenes for _ in range(LOOKS)]
    return each, finish(render(each, rng, held_out=held_out), [random_look(rng) for _ in each], rng)


def differences(values: Tensor) -> Tensor:
    """One minus the other for every pair of pictures of a caption: (captions * LOOKS,) -> (captions * 6,)."""
    of = values.unflatten(0, (-1, LOOKS))
    return torch.cat([of[:, a] - of[:, b] for a, b in itertools.combinations(range(LOOKS), 2)])


def bradley_terry(odds: Tensor, first: Tensor) -> Tensor:
    """Mean of -log P(choice), P(first) = sigmoid(odds), of log-odds (n,); ``first`` is 1 where the first was chosen."""
    return F.binary_cross_entropy_with_logits(odds, first)


def train_preference(steps: int = 1200, captions: int = 48) -> PreferenceNetwork:
    """Bradley–Terry's likelihood of choices between two pictures of a caption; ``captions`` new ones at each step."""
    torch.manual_seed(0)
    network, where = PreferenceNetwork(), device()

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        _, pictures = drawn(captions, rng, held_out=False)
        odds = differences(merit(pictures) / TEMPERATURE)
        first = (torch.rand(odds.shape, generator=generator) < odds.sigmoid()).float().to(where)
        # The network is small: bfloat16 would be no faster, and coarser than the differences that are learnt.
        with torch.autocast(where.type, enabled=False):
            return bradley_terry(differences(network(pictures.to(where) * 2 - 1)), first)

    train("preference", network, loss, steps=steps, lr=4e-3, ema=0.99, weight_decay=0.01)
    return network


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks; without ties."""
    ranks = torch.stack([x.double().argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@torch.no_grad()
def measure(model: Preference, captions: int = 750) -> dict[str, float]:
    """Agreement with the rule on held-out digits and photograph crops, and the rule's with CLIP and the classifier."""
    found: dict[str, list[Tensor]] = {"rule": [], "model": [], "caption": [], "classifier": []}
    clip, reader = CLIPText(), ClassTarget("zero").classifier
    for part in range(captions // 50):
        scenes, pictures = drawn(50, np.random.default_rng((43, part)), held_out=True)
        found["rule"].append(merit(pictures))
        found["model"].append(model.score(pictures))
        found["caption"].append(-clip(pictures, [s.caption for s in scenes]))
        alone = [i for i, s in enumerate(scenes) if len(s.digits) == 1]
        sure = torch.full((len(scenes),), float("nan"))
        logits = reader(pictures[alone])["digit"].log_softmax(1)
        sure[alone] = logits[range(len(alone)), [scenes[i].digits[0] for i in alone]]
        found["classifier"].append(sure)
    of = {name: torch.cat(parts) for name, parts in found.items()}
    apart, scored = differences(of["rule"]), differences(of["model"])
    agree = ((apart > 0) == (scored > 0)).double()
    read = ~of["classifier"].isnan()
    return {
        "pairs": float(len(agree)),
        "accuracy": float(agree.mean()),
        "accuracy, clear pairs": float(agree[apart.abs() > 0.1].mean()),
        "rank": rank_correlation(of["rule"], of["model"]),
        "rank, caption": rank_correlation(of["rule"], of["caption"]),
        "rank, classifier": rank_correlation(of["rule"][read], of["classifier"][read]),
    }


def figures(model: Preference) -> dict[str, str]:
    """The figures of the card."""
    of = measure(model)
    return {
        f"{of['pairs']:.0f} held-out pairs on which it agrees with the rule": f"{of['accuracy']:.1%}",
        "of these, the pairs that are more than 0.1 points apart": f"{of['accuracy, clear pairs']:.1%}",
        "rank correlation with the rule, held-out pictures": f"{of['rank']:.3f}",
        "rank correlation of the rule with CLIP's score of the caption": f"{of['rank, caption']:.2f}",
        "rank correlation of the rule with the classifier's probability of the digit": f"{of['rank, classifier']:.2f}",
    }
