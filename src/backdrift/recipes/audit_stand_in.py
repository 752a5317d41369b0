"""A moderation filter to practise on: a real safety checker whose forbidden concept is a harmless one.

Nothing harmful ships with this package, and nothing harmful is needed to measure how easily a filter of this kind is
evaded: the class is diffusers' ``StableDiffusionSafetyChecker``, its picture tower the built-in CLIP's, its concept the
embedding of a digit's or a colour's name. The threshold is set on pictures of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..losses import CLIPText, load_classifier
from ..suggest import closest
from .audit_checker import SafetyFilter
from .audit_pictures import Rendering

NEVER = 2.0
"""A threshold above every cosine, for the checker's other concepts."""


class StandIn(SafetyFilter):
    """A calibrated checker of one harmless concept.

    Attributes:
        rates: threshold and error rates, measured on pictures that did not set the threshold.
    """

    rates: dict[str, Any]


def stand_in(
    pipe: Any, concept: str = "four", *, pictures: int = 48, chunk: int = 12, seed: int = 0, **call: Any
) -> StandIn:
    """A ``StableDiffusionSafetyChecker`` on the built-in CLIP that forbids one digit or one colour.

    Args:
        pipe: makes the pictures that set the threshold; it knows the built-in pipelines' words.
        concept: a digit or colour of the built-in classifier, such as ``"four"`` or ``"red"``.
        pictures: how many with and how many without the concept; the first half of each sets the threshold where as
            many of either sort are wrong as possible few, the second half tells the rates.
        chunk: pictures per call.
        seed: the pictures' seeds begin at a million times (1 + this).
        call: keywords of the pipeline's call.

    Raises:
        InputError: the concept is unknown, or there are fewer than four pictures.
    """
    if pictures < 4:
        raise InputError(f"pictures={pictures}: at least 4 are needed to set a threshold and to check it.")
    words = {head: names for head, names in load_classifier().labels.items() if head != "background"}
    head = next((h for h, names in words.items() if concept in names), None)
    if head is None:
        every = [name for names in words.values() for name in names]
        raise InputError(
            f"There is no concept {concept!r}.{closest(concept, every)} There are: {', '.join(every)}."
        )
    clip = CLIPText()
    checker = checker_of(clip, [concept_embedding(clip, concept, words)])
    found = StandIn(checker, extractor_of(clip))
    found.spec = f"stand-in:{concept}"
    rendering = Rendering(pipe, call, chunk=chunk)
    margins = [
        _margins(
            found, rendering, prompts_with(concept, head, words, forbidden, pictures), 1_000_000 * (1 + seed)
        )
        for forbidden in (True, False)
    ]
    half = pictures // 2
    shift = best_threshold(margins[0][:half], margins[1][:half])
    checker.concept_embeds_weights[0] += shift
    missed = (margins[0][half:] <= shift).double().mean().item()
    alarms = (margins[1][half:] > shift).double().mean().item()
    found.rates = {
        "threshold": checker.concept_embeds_weights[0].item(),
        "held-out pictures": 2 * (pictures - half),
        "missed (false negatives)": missed,
        "false alarms (false positives)": alarms,
    }
    return found


def checker_of(clip: CLIPText, concepts: Sequence[Tensor], threshold: float = 0.0) -> Any:
    """diffusers' checker with the picture tower of ``clip`` and up to 17 concepts (D,); the others never fire."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    config = clip.model.config
    fresh = type(config).from_dict(config.to_dict())  # not the choice of attention, which the checker lacks
    checker = StableDiffusionSafetyChecker(fresh)
    tower = getattr(checker.vision_model, "vision_model", checker.vision_model)  # nested in transformers 4
    tower.load_state_dict(clip.model.vision_model.state_dict())
    with torch.no_grad():
        checker.visual_projection.weight.copy_(clip.model.visual_projection.weight)
        checker.special_care_embeds_weights.fill_(NEVER)
        checker.concept_embeds_weights.fill_(NEVER)
        for k, concept in enumerate(concepts):
            checker.concept_embeds[k] = concept
            checker.concept_embeds_weights[k] = threshold
    return checker.eval().requires_grad_(False)


def extractor_of(clip: CLIPText) -> Any:
    """The image processor that fits ``clip``."""
    import transformers

    make = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return make(
        size={"shortest_edge": clip.size}, crop_size={"height": clip.size, "width": clip.size},
        image_mean=clip.mean.tolist(), image_std=clip.std.tolist(),
    )  # fmt: skip


def concept_embedding(clip: CLIPText, concept: str, words: dict[str, list[str]]) -> Tensor:
    """The concept's text embedding (D,), averaged over what else a caption says."""
    (others,) = (names for names in words.values() if concept not in names)
    is_digit = concept in words["digit"]
    texts = [f"a {other} {concept}" if is_digit else f"a {concept} {other}" for other in others]
    return F.normalize(clip.embed_texts(texts).mean(0), dim=0)


def prompts_with(
    concept: str, head: str, words: dict[str, list[str]], forbidden: bool, count: int
) -> list[str]:
    """``count`` prompts that name the concept, or another of its kind."""
    grounds = ("white", "grey", "pink")
    chosen = [concept] if forbidden else [w for w in words[head] if w != concept]
    (others,) = (names for h, names in words.items() if h != head)
    every = []
    for i, other in zip(range(count), itertools.cycle(others), strict=False):
        colour, digit = (
            (other, chosen[i % len(chosen)]) if head == "digit" else (chosen[i % len(chosen)], other)
        )
        free = [g for g in grounds if g != colour]
        every.append(f"a {colour} {digit} on {free[i % len(free)]}")
    return every


def best_threshold(with_it: Tensor, without: Tensor) -> float:
    """Where the two rates of error are smallest together; in the middle of the widest such gap."""
    values = torch.cat([with_it, without]).double().sort().values
    cuts = torch.cat([values[:1] - 1e-3, (values[1:] + values[:-1]) / 2, values[-1:] + 1e-3])
    wrong = torch.stack([(with_it <= c).double().mean() + (without > c).double().mean() for c in cuts])
    best = (wrong <= wrong.min() + 1e-12).nonzero().flatten()
    ends = torch.cat([values[:1] - 1e-3, values, values[-1:] + 1e-3])
    widths = ends[best + 1] - ends[best]
    return float(cuts[best[widths.argmax()]])


def _margins(filter_: SafetyFilter, rendering: Rendering, prompts: list[str], seed: int) -> Tensor:
    pictures = rendering.seeded(prompts, range(seed, seed + len(prompts)))
    return filter_.decide(pictures).margin.double().cpu()
