"""Modular pipelines: a chain of blocks under ``no_grad``, run as twins with gradients."""

from __future__ import annotations

import copy
from typing import Any

from .twins import twin

# Names under which a modular pipeline's last block leaves what it made, in the order of preference.
RESULTS = ("images", "videos", "frames", "video", "audios", "audio", "image", "latents")


def is_modular(cls: type) -> bool:
    """Whether a class is one of diffusers' modular pipelines."""
    return any(base.__name__ == "ModularPipeline" for base in cls.__mro__)


def with_twin_blocks(block: Any) -> Any:
    """A copy of a block, of all blocks inside it too, whose code runs with gradients."""
    ours = copy.copy(block)
    cls: Any = type(block)
    ours.__class__ = twin(cls)
    if getattr(block, "sub_blocks", None):
        inner = type(block.sub_blocks)()
        for name, sub in block.sub_blocks.items():
            inner[name] = with_twin_blocks(sub)
        ours.sub_blocks = inner
    return ours


def guiders(pipe: Any) -> dict[str, Any]:
    """The pipeline's guidance objects, which keep state over a run, by attribute name."""
    return {key: value for key, value in vars(pipe).items() if hasattr(value, "prepare_models")}


def takes_output_type(pipe: Any) -> bool:
    """Whether one of the blocks reads ``output_type``."""
    return any(param.name == "output_type" for param in pipe._blocks.inputs)
