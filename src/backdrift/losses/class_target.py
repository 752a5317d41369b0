"""What a classifier sees: cross-entropy, logit or margin of a wanted class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..suggest import closest
from .base import Loss
from .classifier import Classifier, as_classifier, load_classifier, split_model
from .options import split_option, unread_option
from .registry import register

Form = Literal["cross_entropy", "logit", "margin"]
FORMS: tuple[Form, ...] = get_args(Form)


@register(
    "class",
    argument="a class, or a phrase of several [@model] [(logit) or (margin)]",
    example="class:red seven",
)
class ClassTarget(Loss):
    """The pictures show the wanted class.

    Args:
        target: A label, its number, or a phrase of labels of several heads ("a red seven on grass").
        classifier: A :class:`Classifier`, or a module to make one of; by default the built-in one.
        form: ``"cross_entropy"``, ``-log p(target)``; ``"logit"``, minus the target's logit; ``"margin"``,
            the best other logit minus the target's (negative when the class is right). Summed over heads.

    Raises:
        InputError: When the classifier does not know the target, or ``form`` is unknown.
    """

    bounded = True

    def __init__(
        self,
        target: str | int,
        classifier: Classifier | nn.Module | None = None,
        form: Form = "cross_entropy",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise InputError(f"form must be 'cross_entropy', 'logit' or 'margin', got {form!r}.")
        self.classifier = as_classifier(classifier)
        self.target = self.classifier.find(target)
        self.form: Form = form
        self.spec = f"class:{target}" + ("" if form == "cross_entropy" else f" ({form})")

    @classmethod
    def from_text(cls, text: str) -> ClassTarget:
        given, form = split_option(text, FORMS)
        target, source = split_model(given)
        if not target:
            raise InputError("The loss 'class' needs a class: for instance class:seven.")
        classifier = load_classifier(source)
        word = unread_option(given)
        if word is not None and target.lower() not in _names(classifier):  # a phrase would pass over it
            raise InputError(
                f"The loss 'class' has no option {word!r}.{closest(word, FORMS)} Write for instance "
                f"class:seven (logit); there are: {', '.join(FORMS)}."
            )
        return cls(target, classifier, cast(Form, form or "cross_entropy"))

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        return class_values(self.classifier(images), self.target, self.form)


def _names(classifier: Classifier) -> set[str]:
    return {name.lower() for names in classifier.labels.values() for name in names}


def class_values(logits: Mapping[str, Tensor], target: Mapping[str, int], form: Form) -> Tensor:
    """One value per sample, ``(N,)``: the sum over the target's heads of the ``form`` of their logits."""
    total = torch.zeros(())
    for head, index in target.items():
        if index >= logits[head].shape[1]:
            raise InputError(
                f"Class {index} does not exist: the classifier has {logits[head].shape[1]} classes."
            )
        of_target = logits[head][:, index]
        if form == "cross_entropy":
            value = logits[head].logsumexp(1) - of_target
        elif form == "logit":
            value = -of_target
        else:
            others = torch.arange(logits[head].shape[1], device=of_target.device) != index
            value = logits[head][:, others].amax(1) - of_target
        total = total.to(value) + value
    return total
