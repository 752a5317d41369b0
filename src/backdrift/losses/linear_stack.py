"""Linear layers one after the other, as in the heads of LAION's aesthetic predictors and of ImageReward."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

from ..errors import InputError

_LAYER = re.compile(r"(?:.*\.)?(?:layers|predictor|mlp)(?:\.(\d+))?\.(weight|bias)$|(weight|bias)$")


def linear_stack(state: Mapping[str, Tensor], what: str) -> nn.Sequential:
    """The head by its weights: ``weight`` and ``bias`` alone, ``predictor.*``, or ``layers.N.*`` in the order of N.

    Dropout between the layers is left out, as in evaluation. There is nothing else between them.

    Args:
        state: Tensors by name; others (of a CLIP in the same file) are passed over.
        what: It is, for the message.

    Raises:
        InputError: When there are no such layers, or they do not fit each other and end in one value.
    """
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if found := _LAYER.match(name):
            parts.setdefault(int(found[1] or 0), {})[found[2] or found[3]] = tensor
    layers = [parts[n] for n in sorted(parts)]
    sound = bool(layers) and all(
        set(layer) == {"weight", "bias"} and layer["weight"].ndim == 2 for layer in layers
    )
    if sound:
        sizes = [layer["weight"].shape for layer in layers]
        sound = sizes[-1][0] == 1 and all(a[0] == b[1] for a, b in pairwise(sizes))
    if not sound:
        raise InputError(
            f"These are not the weights of {what}: linear layers that end in one value are needed, called weight "
            f"and bias, predictor.*, or layers.N.*; found {', '.join(list(state)[:6]) or 'none'}."
        )
    made = []
    for layer in layers:
        linear = nn.Linear(layer["weight"].shape[1], layer["weight"].shape[0], device="meta")
        linear.weight = nn.Parameter(layer["weight"].float(), requires_grad=False)
        linear.bias = nn.Parameter(layer["bias"].float(), requires_grad=False)
        made.append(linear)
    return nn.Sequential(*made).eval()
