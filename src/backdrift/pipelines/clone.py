"""The pipeline that really runs: the user's once more, on shadow networks, with a scheduler of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from .draws import Noise, checking
from .forwards import own_forwards
from .modular import guiders, is_modular, with_twin_blocks
from .outputs import unclamped
from .refusals import image_processors, plain_class
from .shadow import copied_scheduler, networks, shadow
from .states import own_hooks
from .twins import twin


def clone_of(
    pipe: Any,
    trained: set[int],
    dress: Callable[[str, nn.Module], nn.Module],
    *,
    clamp: bool = False,
    noise: Noise | None = None,
) -> Any:
    """A copy of a pipeline that a run may change.

    Args:
        pipe: the user's pipeline; it is not changed.
        trained: ``id`` of the weights that get gradients.
        dress: what is made of each shadow network, by its name, before it takes its place.
        clamp: leave the clamp of image processors in.
        noise: waits for the draw whose place it takes; networks and schedulers see to it that it has found it.
    """
    clone = copy.copy(pipe)
    clone.__class__ = twin(plain_class(type(pipe)))
    # Straight into __dict__: the pipeline's __setattr__ would edit the configuration that both share.
    own = clone.__dict__
    for name, module in networks(pipe).items():
        ours = shadow(module, trained)
        own_forwards(module, ours)
        own_hooks(module, ours)
        own[name] = dress(name, ours)
        if noise is not None and name.startswith(("unet", "transformer")):
            own[name].forward = checking(own[name].forward, noise)
    for name, value in list(own.items()):
        if name.endswith("scheduler") and hasattr(value, "step"):
            own[name] = copied_scheduler(value)
            if noise is not None:
                own[name].step = checking(own[name].step, noise)
        elif isinstance(value, MethodType) and value.__self__ is pipe:
            # The user's own, which would run on the user's networks.
            own[name] = MethodType(value.__func__, clone)
    if is_modular(type(pipe)):
        own["_blocks"] = with_twin_blocks(pipe._blocks)
        own |= {name: copied_scheduler(value) for name, value in guiders(pipe).items()}
    if not clamp:
        own |= {name: unclamped(p) for name, p in image_processors(pipe).items()}
    if own.get("_all_hooks"):
        own["_all_hooks"] = []  # of the user's networks; the pipeline would put them on again at its end
    if own.get("watermark") is not None:
        own["watermark"] = None  # drawn in numpy, where gradients end
    return clone
