"""What vocabulary expansion asks of a classifier, and who sees it in a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..losses import Classifier, ClassTarget, Cutouts, Loss, load_classifier, resolve
from ..losses.digit_kinds import load_kinds

#: Classifiers by name.
NAMED: dict[str, Callable[[], Classifier]] = {"kinds": load_kinds, "digits": load_classifier}

Given = Classifier | nn.Module | Callable[[Tensor], Any] | str


class _Called(nn.Module):
    """A plain callable as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        return self.function(images)


def classifier_of(given: Given, **preparation: Any) -> Classifier:
    """Any classifier as a :class:`~backdrift.losses.Classifier`.

    Args:
        given: one; a module or callable that returns ``(N, K)`` logits; ``"kinds"`` or ``"digits"`` (built in); or a
            folder or hub id of an image classifier of transformers, which brings its own preparation.
        preparation: ``labels``, ``size``, ``mean`` and ``std`` for a module or callable.

    Raises:
        InputError: it is none of these, cannot be loaded, or is prepared already and ``preparation`` is given too.
    """
    said = {name: value for name, value in preparation.items() if value is not None}
    if isinstance(given, nn.Module) and not isinstance(given, Classifier):
        return Classifier(given, **said)
    if not isinstance(given, Classifier | str):
        if not callable(given):
            raise InputError(
                f"classifier={given!r} must be a Classifier, a module or callable that returns (N, K) logits, "
                f"{', '.join(map(repr, NAMED))}, or a folder or hub id of transformers."
            )
        return Classifier(_Called(given), **said)
    if said:
        raise InputError(
            f"{', '.join(f'{name}=' for name in said)} tell how a module's pictures are prepared; this classifier "
            "brings its own preparation. Leave them out."
        )
    if isinstance(given, Classifier):
        return given
    return NAMED[given]() if given in NAMED else load_classifier(given)


def pull_of(
    target: ClassTarget, *, scale: float, cutouts: int, cut_power: float, cut_least: float, keep: Any
) -> Loss:
    """The loss: ``scale`` × the mean of the class's over random crops, plus what keeps the prompt's content.

    Raises:
        InputError: a number cannot be used.
    """
    if not (isinstance(scale, int | float) and scale > 0):
        raise InputError(f"scale={scale!r} must be positive.")
    if isinstance(cutouts, bool) or not isinstance(cutouts, int) or cutouts < 0:
        raise InputError(f"cutouts={cutouts!r} must be a whole number: 0 for the picture as it is, or more.")
    seen: Loss = Cutouts(target, cutouts, cut_power, cut_least) if cutouts else target
    return resolve([(scale, seen)] + ([] if keep is None else [(1.0, resolve(keep))]))


@torch.no_grad()
def sees(target: ClassTarget, images: Tensor) -> Tensor:
    """Whether the target's classifier puts it first in each picture (n, 3, H, W): (n,) booleans."""
    logits = target.classifier(images.float().clamp(0, 1))
    return torch.stack([logits[head].argmax(1) == index for head, index in target.target.items()]).all(0)


def judges_of(given: Mapping[str, Any] | Sequence[str] | None) -> dict[str, ClassTarget]:
    """Who else is asked, by name: losses of a class, or their text such as ``"class:seven"``.

    Raises:
        InputError: one is no loss of a class.
    """
    named = dict(given) if isinstance(given, Mapping) else {text: text for text in given or ()}
    found = {}
    for name, each in named.items():
        judge = resolve(each)
        if not isinstance(judge, ClassTarget):
            raise InputError(
                f"The judge {name!r} must be a loss of a class, such as 'class:seven' or a losses.ClassTarget; it is "
                f"{type(judge).__name__}."
            )
        found[name] = judge
    return found


def counted(who: Mapping[str, ClassTarget], images: Tensor, when: str) -> dict[str, str]:
    """Rows of a run's table: how many of the pictures each of them sees its class in."""
    seen = {name: int(sees(judge, images).sum()) for name, judge in who.items()}
    return {f"{when}: seen by {name}": f"{count} of {len(images)}" for name, count in seen.items()}
