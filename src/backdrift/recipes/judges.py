"""Judges of guided pictures: scores by networks, layers or measurements that the guidance did not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses import Classifier, CLIPImage, CLIPText, GramStyle, Loss
from ..losses.clip import load_clip


@dataclass(frozen=True)
class Judge:
    """One score of finished pictures.

    Attributes:
        name: heading of its column.
        score: pictures (N, 3, H, W), clamped to [0, 1], and their N prompts -> (N,).
        lower: whether a lower score is better.
    """

    name: str
    score: Callable[[Tensor, Sequence[str]], Tensor]
    lower: bool = False


def open_clip(source: str | None) -> CLIPText:
    """A CLIP with both halves, by folder or hub id; the built-in one for None.

    Raises:
        InputError: it cannot be loaded.
    """
    return CLIPText(distance="cosine", **({} if source is None else load_clip(source)))


def clip_score(clip: CLIPText, name: str = "CLIP score") -> Judge:
    """100 times the cosine between the embeddings of a picture and of its prompt, as papers print it."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * (clip.embed_images(images) * clip.embed_texts(prompts).to(images)).sum(1)

    return Judge(name, score)


def style_of(reference: Tensor, model: Any, block: int, name: str) -> Judge:
    """The Gram loss on another block or network, as a part of the reference's own Gram matrix.

    0 is the same style; 1 is what a picture without any features has.
    """
    measure = GramStyle(reference, model, block)
    scale = measure.known.flatten(1).norm()
    return Judge(name, lambda images, prompts: measure(images) / scale, lower=True)


def image_likeness(reference: Tensor, model: Any = None, name: str = "CLIP-I") -> Judge:
    """The cosine between the CLIP embeddings of a picture and of the reference."""
    measure = CLIPImage(reference, model, "cosine")
    return Judge(name, lambda images, prompts: 1 - measure(images))


def measured(name: str, function: Callable[[Tensor], Tensor], lower: bool = False) -> Judge:
    """A measurement of pictures, such as those of :mod:`backdrift.losses.measurements`."""
    return Judge(name, lambda images, prompts: function(images), lower)


def by_loss(name: str, loss: Loss) -> Judge:
    """A loss that is not guided with."""
    return Judge(name, lambda images, prompts: loss(images, prompts), lower=True)


def read_as(classifier: Classifier, wanted: dict[str, int], name: str) -> Judge:
    """1 where the classifier reads every wanted class, else 0: the mean is the part of the pictures that are right."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        logits = classifier(images)
        return (
            torch.stack([logits[head].argmax(1) == index for head, index in wanted.items()]).all(0).to(images)
        )

    return Judge(name, score)


def zero_shot(clip: CLIPText, texts: Sequence[str], wanted: int, name: str) -> Judge:
    """The probability that CLIP gives one text among several, with its own temperature."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        likeness = clip.embed_images(images) @ clip.embed_texts(texts).to(images).T
        return (clip.model.logit_scale.exp().to(images) * likeness).softmax(1)[:, wanted]

    return Judge(name, score)
