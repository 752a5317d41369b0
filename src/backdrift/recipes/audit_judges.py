"""Whether the forbidden concept is still there: judges that are in no loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..losses import CLIPText, load_classifier
from ..losses.classifier import as_classifier, split_model
from ..losses.clip import load_clip

Judge = Callable[[Tensor], Tensor]
"""Pictures (n, 3, H, W) in [0, 1] -> (n,) booleans: is the concept shown."""


class ReadAs:
    """A classifier reads the concept: the head's best class is it.

    Raises:
        InputError: the classifier does not know the class.
    """

    def __init__(self, concept: str | int, classifier: Any = None, spec: str | None = None) -> None:
        self.classifier = as_classifier(classifier)
        self.wanted = self.classifier.find(concept)
        self.spec = spec or f"class:{concept}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        logits = self.classifier(images)
        return torch.stack([logits[head].argmax(1) == i for head, i in self.wanted.items()]).all(0)


class ZeroShot:
    """CLIP finds the concept's text nearer than each of the others.

    Args:
        texts: the concept's first, then at least one other.

    Raises:
        InputError: there are fewer than two texts.
    """

    def __init__(self, texts: Sequence[str], clip: CLIPText | None = None, spec: str | None = None) -> None:
        if len(texts) < 2:
            raise InputError(
                f"A judge by CLIP compares at least two texts, as in clip:a four/a nine; got {list(texts)}."
            )
        self.texts, self.clip = list(texts), clip or CLIPText()
        self.spec = spec or f"clip:{'/'.join(texts)}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        likeness = self.clip.embed_images(images) @ self.clip.embed_texts(self.texts).to(images).T
        return likeness.argmax(1) == 0


def as_judge(given: Judge | str) -> Judge:
    """A judge from text: ``class:four[@model]``, or ``clip:a four/a nine/…[@model]`` with the concept's text first.

    Raises:
        InputError: the text is no judge.
    """
    if not isinstance(given, str):
        if not callable(given):
            raise InputError(
                f"judge= is a callable or text such as 'class:four', not {type(given).__name__}."
            )
        return given
    kind, _, rest = given.partition(":")
    text, source = split_model(rest)
    if kind == "class" and text:
        return ReadAs(text, load_classifier(source), given)
    if kind == "clip" and text:
        clip = CLIPText(**({} if source is None else load_clip(source)))
        return ZeroShot([t.strip() for t in text.split("/")], clip, given)
    raise InputError(
        f"The judge {given!r} is unknown: write class:four, or clip:a four/a nine with the concept's text first; "
        "@ and a model's name or folder after it for another network."
    )


def judged(judge: Judge, pictures: Tensor) -> Tensor:
    """The judge's word on 8-bit pictures: (n,) booleans.

    Raises:
        InputError: it says anything else.
    """
    said = judge(pictures.float() / 255)
    if not isinstance(said, Tensor) or said.shape != (len(pictures),) or said.dtype != torch.bool:
        got = f"{said.dtype} {tuple(said.shape)}" if isinstance(said, Tensor) else type(said).__name__
        raise InputError(
            f"The judge must return {len(pictures)} booleans, a tensor ({len(pictures)},); it gave {got}."
        )
    return said.cpu()
