"""Whether the weights that ``train`` names can be trained as the pipeline is set up; found before it samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedError
from .quantised import is_quantised


def check_trainable(pipe: Any, trained: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights whose gradients could not be right, or could not be used.

    Args:
        pipe: the user's pipeline.
        trained: the weights that ``train`` names, by dotted name.

    Raises:
        UnsupportedError: naming the first such weight and what to change.
    """
    for name, weight in trained.items():
        if weight.device.type == "meta":
            raise UnsupportedError(
                f"{name} is on the meta device, and nothing says where its weights are: load them first, and add "
                "adapters before pipe.enable_sequential_cpu_offload()"
            )
        if is_quantised(weight):
            raise UnsupportedError(
                f"{name} is quantised ({type(weight.data).__name__}, {weight.dtype}), and has no gradient: train "
                "an adapter beside it (train='lora')"
            )
    vae = getattr(pipe, "vae", None)
    if (
        any(name.startswith("vae.") for name in trained)
        and getattr(vae, "dtype", None) == torch.float16
        and getattr(getattr(vae, "config", None), "force_upcast", False)
    ):
        raise UnsupportedError(
            "the pipeline turns its float16 decoder into float32 for each call, so its weights cannot be trained: "
            "pipe.vae.to(torch.float32) before the call"
        )
