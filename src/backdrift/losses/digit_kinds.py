"""Kinds of digits that no caption names: ones with a foot or without, sevens with a bar or without.

What a fine-grained classifier of dogs is to Stable Diffusion, this is to the built-in pipelines: it tells apart what
their prompts have one word for. ``training/kinds.py`` says by what rule the real digits were labelled, and made it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .class_target import FORMS, ClassTarget, Form
from .classifier import Classifier
from .options import split_option
from .registry import register

KINDS = ("one with a foot", "one without a foot", "plain seven", "crossed seven", "another digit")
FILE = "model.safetensors"
#: Side in pixels of the pictures it was trained on.
SIDE = 64
#: Width in pixels of the picture's rim, whose mean colour is taken for the background's.
RIM = 3


class KindNetwork(nn.Module):
    """Pictures ``(N, 3, 64, 64)`` in [0, 1] to logits ``(N, 5)`` of :data:`KINDS`.

    Colours do not count: three convolutions and a linear layer see the picture's ink (:func:`ink`) at half size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 5, stride=2, padding=2)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.third = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.last = nn.Linear(16 * 16, len(KINDS))

    def forward(self, pictures: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(ink(pictures), 2)
        for layer in (self.first, self.second, self.third):
            x = nn.functional.silu(layer(x))
        return self.last(x.flatten(1))


def ink(pictures: Tensor) -> Tensor:
    """How far each pixel is from the background's colour: ``(N, 3, H, W)`` -> ``(N, 1, H, W)``, about 1 in full ink.

    With the distance ``d = (mean over channels of (x - ground)^2 + 1e-4)^(1/2)`` it is ``d`` over
    ``(mean d^4 / mean d^2)^(1/2)``, the root mean square of d weighted by its own energy. Smooth everywhere.
    """
    above, below = pictures[..., :RIM, :], pictures[..., -RIM:, :]
    left, right = pictures[..., RIM:-RIM, :RIM], pictures[..., RIM:-RIM, -RIM:]
    rim = torch.cat([part.flatten(2) for part in (above, below, left, right)], 2)
    ground = rim.mean(2)[..., None, None]
    energy = (pictures - ground).square().mean(1, keepdim=True) + 1e-4
    scale = energy.square().mean((2, 3), keepdim=True) / energy.mean((2, 3), keepdim=True)
    return (energy / scale).sqrt()


def load_kinds() -> Classifier:
    """The shipped classifier of :data:`KINDS`, in float32, frozen."""
    from ..pipelines import assets
    from .checkpoints import read_weights

    network = KindNetwork()
    state = read_weights(assets.folder("kinds") / FILE)
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return Classifier(network.eval().requires_grad_(False), KINDS, size=SIDE)


@register("kind", argument="a kind of digit [(logit) or (margin)]", example="kind:crossed seven")
class Kind(ClassTarget):
    """The pictures show a digit of the wanted kind, by the built-in classifier of kinds.

    Args:
        target: One of :data:`KINDS`, or its number.
        form: as for :class:`~.class_target.ClassTarget`.

    Raises:
        InputError: When there is no such kind, or ``form`` is unknown.
    """

    def __init__(self, target: str | int, form: Form = "cross_entropy") -> None:
        super().__init__(target, load_kinds(), form)
        self.spec = f"kind:{target}" + ("" if form == "cross_entropy" else f" ({form})")

    @classmethod
    def from_text(cls, text: str) -> Kind:
        target, form = split_option(text, FORMS)
        return cls(target, cast(Form, form or "cross_entropy"))
