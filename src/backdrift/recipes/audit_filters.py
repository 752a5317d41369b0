"""Moderation filters as an audit needs them: a margin with a gradient, and the filter's own decision beside it.

The margin is positive where a picture is flagged. It is differentiable and only searches; whether a picture passes is
always decided by the filter itself on finished 8-bit pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..descent.code import describe_code
from ..descent.subject import describe_tensors
from ..errors import InputError
from ..losses import Classifier, FunctionLoss, Loss
from ..losses.classifier import as_classifier

Form = Literal["margin", "cross_entropy"]


@dataclass(frozen=True)
class Verdict:
    """What a filter says of finished pictures.

    Attributes:
        margin: (n,) positive where flagged; in the filter's own units.
        aim: (n,) what an attack makes small: the margin, or with a target how far the picture is from it.
        flagged: (n,) booleans.
        done: (n,) booleans: what an attack is after: not flagged, and of the wanted class where one is wanted.
    """

    margin: Tensor
    aim: Tensor
    flagged: Tensor
    done: Tensor


class Filter(nn.Module):
    """Base of the filters.

    Attributes:
        spec: one line for the record.
    """

    spec = ""

    def forward(self, images: Tensor) -> Tensor:
        return self.loss(self.follow(images))

    def follow(self, images: Tensor) -> Tensor:
        """The pictures, when the filter's own networks are where they are."""
        if any(t.device != images.device for t in [*self.parameters(), *self.buffers()]):
            self.to(images.device)
        return images

    def margin(self, images: Tensor) -> Tensor:
        """(n,) of pictures (n, 3, H, W) meant for [0, 1]; positive where flagged, differentiable."""
        raise NotImplementedError

    def aim(self, images: Tensor) -> Tensor:
        """(n,) what an attack makes small; at most 0 where it has what it wants. Without a target: the margin."""
        return self.margin(images)

    def loss(self, images: Tensor) -> Tensor:
        """(n,) what is descended; by default the aim."""
        return self.aim(images)

    @torch.no_grad()
    def decide(self, pictures: Tensor) -> Verdict:
        """The filter's own decision on 8-bit pictures (n, 3, H, W)."""
        images = self.follow(pictures.float() / 255)
        margin, aim = self.margin(images), self.aim(images)
        return Verdict(margin, aim, margin > 0, (margin <= 0) & (aim <= 0))

    def describe(self) -> dict[str, Any]:
        """What two filters that decide differently differ in, as JSON."""
        return {"spec": self.spec, "weights": describe_tensors(self), "code": describe_code(self)}


class ClassFilter(Filter):
    """Flags pictures that a classifier reads as one of some classes.

    The margin is the best flagged logit less the best other one. With a ``target`` the attack wants that class
    (AdjointDPM's ImageNet attack), else any that is not flagged.

    Args:
        classifier: a :class:`~backdrift.losses.Classifier`, any module or callable from pictures in [0, 1] to logits
            (n, K), or None for the built-in one.
        flagged: a class or several of one head, by name or number.
        target: the class that the attack wants, if a certain one.
        form: what is descended: ``"margin"`` as above (of the target: the best other logit less the target's), or
            ``"cross_entropy"``: the logarithm of the flagged classes' probability, or minus the target's.

    Raises:
        InputError: a class is unknown, the classes belong to several heads, or the target is itself flagged.
    """

    def __init__(
        self,
        classifier: Any,
        flagged: str | int | Sequence[str | int],
        target: str | int | None = None,
        form: Form = "margin",
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise InputError(f"loss={form!r} must be 'margin' or 'cross_entropy'.")
        self.classifier = as_classifier(_module(classifier))
        names = [flagged] if isinstance(flagged, str | int) else list(flagged)
        if not names:
            raise InputError("flagged= names no class; give at least one that the filter forbids.")
        found = [self._one(name) for name in names]
        wanted = None if target is None else self._one(target)
        heads = {head for head, _ in found} | ({wanted[0]} if wanted else set())
        if len(heads) > 1:
            raise InputError(
                f"The classes {names} and target {target!r} belong to several heads: {sorted(heads)}."
            )
        self.head, self.flagged = heads.pop(), sorted({index for _, index in found})
        self.target = None if wanted is None else wanted[1]
        if self.target in self.flagged:
            raise InputError(f"target={target!r} is one of the flagged classes; name one that passes.")
        self.form: Form = form
        self.spec = f"class:{'|'.join(map(str, names))}" + ("" if target is None else f" -> {target}")

    def _one(self, name: str | int) -> tuple[str, int]:
        if not self.classifier.labels and isinstance(name, int):
            return "class", name
        found = self.classifier.find(name)
        if len(found) != 1:
            raise InputError(f"The class {name!r} names {len(found)} classes; name one at a time.")
        return next(iter(found.items()))

    def logits(self, images: Tensor) -> Tensor:
        """(n, K) of the head.

        Raises:
            InputError: a class is beyond them, or all are flagged.
        """
        logits = self.classifier(images)[self.head]
        highest = max(self.flagged + ([] if self.target is None else [self.target]))
        if highest >= logits.shape[1]:
            raise InputError(f"Class {highest} does not exist: the classifier has {logits.shape[1]} classes.")
        if len(self.flagged) == logits.shape[1]:
            raise InputError("Every class is flagged: no picture could pass this filter.")
        return logits

    def _split(self, logits: Tensor, ours: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        chosen[list(ours)] = True
        return logits[:, chosen], logits[:, ~chosen]

    def margin(self, images: Tensor) -> Tensor:
        ours, others = self._split(self.logits(images), self.flagged)
        return ours.amax(1) - others.amax(1)

    def aim(self, images: Tensor) -> Tensor:
        if self.target is None:
            return self.margin(images)
        target, others = self._split(self.logits(images), [self.target])
        return others.amax(1) - target.amax(1)

    def loss(self, images: Tensor) -> Tensor:
        if self.form == "margin":
            return self.aim(images)
        logits = self.logits(images)
        if self.target is not None:
            return logits.logsumexp(1) - logits[:, self.target]
        return logits[:, self.flagged].logsumexp(1) - logits.logsumexp(1)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"loss": self.form, "head": self.head}


class ScoreFilter(Filter):
    """Flags pictures whose score is above a threshold; the margin is ``score - threshold``.

    Args:
        score: pictures (n, 3, H, W) in [0, 1] -> (n,), differentiable.
        threshold: finite.

    Raises:
        InputError: ``score`` cannot be called, or the threshold is not finite.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], threshold: float) -> None:
        super().__init__()
        if not torch.tensor(float(threshold)).isfinite():
            raise InputError(f"threshold={threshold} must be a finite number.")
        self.score = score if isinstance(score, Loss) else FunctionLoss(score)
        self.threshold = float(threshold)
        self.spec = f"{self.score.spec} > {self.threshold:g}"

    def margin(self, images: Tensor) -> Tensor:
        return self.score(images) - self.threshold


class _Called(nn.Module):
    """A callable as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def _module(classifier: Any) -> Any:
    if classifier is None or isinstance(classifier, Classifier | nn.Module):
        return classifier
    if not callable(classifier):
        raise InputError(
            f"A classifier is a module or a callable from pictures to logits, not {type(classifier).__name__}."
        )
    return _Called(classifier)
