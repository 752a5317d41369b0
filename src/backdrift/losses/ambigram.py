"""A picture that reads one way upright and another way upside-down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Loss
from .class_target import Form, class_values
from .classifier import Classifier, as_classifier, load_classifier, split_model
from .registry import register


@register("ambigram", argument="upright/upside-down [@model]", example="ambigram:two/seven")
class Ambigram(Loss):
    """The upright picture shows one class, the same picture turned by 180 degrees another.

    The value is the sum of the two views' cross-entropies (or of another ``form``, see
    :class:`~.class_target.ClassTarget`). Turning is a permutation of the pixels, hence exact.

    Args:
        upright, turned: Classes, as :class:`~.class_target.ClassTarget` takes them.
        classifier: By default the built-in one.
    """

    def __init__(
        self,
        upright: str | int,
        turned: str | int,
        classifier: Classifier | nn.Module | None = None,
        form: Form = "cross_entropy",
    ) -> None:
        super().__init__()
        self.classifier = as_classifier(classifier)
        self.upright = self.classifier.find(upright)
        self.turned = self.classifier.find(turned)
        self.form: Form = form
        self.spec = f"ambigram:{upright}/{turned}"

    @classmethod
    def from_text(cls, text: str) -> Ambigram:
        pair, source = split_model(text)
        words = [word.strip() for word in pair.split("/")]
        if len(words) != 2 or not all(words):
            raise InputError(
                f"The loss 'ambigram' needs two classes, as in ambigram:two/seven; got {text!r}."
            )
        return cls(words[0], words[1], load_classifier(source))

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        turned = images.flip((-2, -1))
        first, second = self.classifier(images), self.classifier(turned)
        return class_values(first, self.upright, self.form) + class_values(second, self.turned, self.form)

    @torch.no_grad()
    def reads(self, images: Tensor) -> Tensor:
        """``(N, 2)`` booleans: does the picture read as wanted upright, and turned."""
        views = ((images, self.upright), (images.flip((-2, -1)), self.turned))
        columns = []
        for view, target in views:
            logits = self.classifier(view)
            right = [logits[head].argmax(1) == index for head, index in target.items()]
            columns.append(torch.stack(right).all(0))
        return torch.stack(columns, 1)
