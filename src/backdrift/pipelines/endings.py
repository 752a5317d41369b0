"""Pipelines that finish their pictures themselves: ``.clamp(0, 1)`` and ``.numpy()`` in their own code.

Most pipelines leave that to an image processor, which can be exchanged. For the others, what their own functions
do to a tensor is watched: the clamp is left out unless it is asked for, and a tensor that is about
to become an array is kept, to be given back in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .outputs import first_tensor
from .refusals import reached
from .twins import names

_CLAMPS = {Tensor.clamp, Tensor.clip, torch.clamp, torch.clip}


class Ending(TorchFunctionMode):
    """Watches the code of one pipeline class during a call.

    Args:
        codes: the code objects that are watched.
        clamp: leave the clamp in.
        output_type: what to ask the pipeline for.

    Attributes:
        kept: the tensor that became an array last, if one did.
    """

    def __init__(self, codes: frozenset[CodeType], clamp: bool, output_type: str) -> None:
        super().__init__()
        self._codes, self._clamp, self.output_type = codes, clamp, output_type
        self.kept: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.numpy or func in _CLAMPS:
            tensor: Any = args[0] if args else kwargs.get("input")
            if sys._getframe(1).f_code in self._codes:
                if func is Tensor.numpy:
                    self.kept = tensor
                    return tensor.detach().numpy()
                if not self._clamp and _to_unit(args[1:], kwargs):
                    return tensor
        return func(*args, **kwargs)

    def asleep(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, inside of which nothing is watched, and nothing is slowed down."""

        @wraps(function)
        def asleep(*args: Any, **kwargs: Any) -> Any:
            if torch.overrides._get_current_function_mode() is not self:
                return function(*args, **kwargs)
            self.__exit__(None, None, None)
            try:
                return function(*args, **kwargs)
            finally:
                self.__enter__()

        return asleep

    def in_place_of_arrays(self, out: Any) -> Any:
        """The pipeline's output with the tensor where it has the array made of it."""
        pictures = self.kept
        if pictures is None or first_tensor(out) is not None:
            return out
        if pictures.ndim == 4 and pictures.shape[-1] in (1, 3, 4) and pictures.shape[1] not in (1, 3, 4):
            pictures = pictures.permute(0, 3, 1, 2)  # arrays of pictures have their channels last
        if isinstance(out, tuple) and not hasattr(out, "to_tuple"):
            return (pictures, *out[1:])
        name = next(iter(out))
        out[name] = pictures
        setattr(out, name, pictures)
        return out


def ending_of(cls: type, clamp: bool) -> Ending | None:
    """What watches a pipeline class's own ending; None for a class that leaves it to an image processor."""
    codes = [code for _, code in reached(cls)]
    mentions = [set(names(code)) for code in codes]
    if not any("numpy" in mentioned for mentioned in mentions):
        return None
    # Asked for tensors, some of those that make PIL pictures give them in [-1, 1].
    arrays = any({"numpy", "numpy_to_pil"} <= mentioned for mentioned in mentions)
    return Ending(frozenset(codes), clamp, "np" if arrays else "pt")


def _to_unit(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    bounds = dict(zip(("min", "max"), args, strict=False)) | dict(kwargs)
    return bounds.get("min") == 0 and bounds.get("max") == 1
