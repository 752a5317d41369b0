"""Gradients through a pipeline's own code by hand, where its call is not enough."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def drawing(pipe: Any, noise: Tensor) -> Any:
    """The hand-made way: the pipeline's module draws as ever, and then takes this noise."""
    module, patch = sys.modules[type(pipe).__module__], pytest.MonkeyPatch()
    draw = module.randn_tensor
    patch.setattr(module, "randn_tensor", lambda *args, **kwargs: draw(*args, **kwargs) * 0 + noise)
    try:
        yield
    finally:
        patch.undo()


@contextmanager
def blocks_with_gradients(pipe: Any) -> Any:
    """The hand-made way for modular pipelines: ``no_grad`` taken off all blocks, and out of the pipeline's call."""
    patch, blocks = pytest.MonkeyPatch(), [pipe._blocks]
    for block in blocks:
        blocks += (getattr(block, "sub_blocks", None) or {}).values()
        for cls in type(block).__mro__:
            call = vars(cls).get("__call__")
            if hasattr(call, "__wrapped__"):
                patch.setattr(cls, "__call__", call.__wrapped__)
    patch.setattr(torch, "no_grad", nullcontext)
    try:
        yield
    finally:
        patch.undo()
