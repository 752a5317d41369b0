"""The random draws that a pipeline's own code makes during a call, and the tensor that stands in for one of them.

Some pipelines draw their noise themselves and take none (DDPM, DiT, image to image). Their code, as run by
:mod:`.twins`, draws through :func:`randn_tensor` here, which hands out the run's noise in place of the pipeline's
own first draw of that shape. Draws of schedulers and autoencoders are theirs, and are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

_NOISE: ContextVar[Noise | None] = ContextVar("backdrift_noise", default=None)


class Noise:
    """A tensor that waits for the draw whose place it takes.

    Attributes:
        tensor: the noise handed in.
        drawn: shapes of the draws that the pipeline made so far.
        used: whether one of them was replaced.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.drawn: list[tuple[int, ...]] = []
        self.used = False

    def replace(self, draw: Tensor) -> Tensor:
        """The noise, in place of the first draw of its shape; else the draw itself."""
        self.drawn.append(tuple(draw.shape))
        if self.used or draw.shape != self.tensor.shape:
            return draw
        self.used = True
        return self.tensor.to(draw)

    def check(self) -> None:
        """Raise if no draw has been replaced by now.

        Raises:
            InputError: naming the shapes that were drawn.
        """
        if self.used:
            return
        seen = ", ".join(str(shape) for shape in dict.fromkeys(self.drawn))
        raise InputError(
            f"noise has the shape {tuple(self.tensor.shape)}, but this call drew "
            + (
                f"noise of the shape {seen}"
                if seen
                else "none (with latents= given, a pipeline draws no noise)"
            )
            + ": hand in noise of the shape that the call draws, and no latents="
        )


@contextmanager
def drawing(noise: Noise | None) -> Iterator[None]:
    """Inside the block (in this thread) ``noise`` takes the place of a draw."""
    token = _NOISE.set(noise)
    try:
        yield
    finally:
        _NOISE.reset(token)


def checking(function: Callable[..., Any], noise: Noise) -> Callable[..., Any]:
    """The same function, which sees to it that the noise has found its place before it runs."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        noise.check()
        return function(*args, **kwargs)

    return checked


def replacing(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A drawing function whose result the run's noise may replace.

    The draw is made all the same: so whatever is drawn after it is what the pipeline would have drawn.
    """

    def drawn(*args: Any, **kwargs: Any) -> Tensor:
        own, noise = draw(*args, **kwargs), _NOISE.get()
        return own if noise is None else noise.replace(own)

    return drawn


def full(size: Any, fill_value: Any, **kwargs: Any) -> Tensor:
    """``torch.full`` through which gradients reach a fill value that requires grad (an embedded guidance scale)."""
    if not (isinstance(fill_value, Tensor) and fill_value.requires_grad):
        return torch.full(size, fill_value, **kwargs)
    placed = {key: kwargs[key] for key in ("device", "dtype") if kwargs.get(key) is not None}
    return fill_value.to(**placed).expand(size) if placed else fill_value.expand(size)


def tensor(data: Any, **kwargs: Any) -> Tensor:
    """``torch.tensor`` through which gradients reach data that is itself a tensor that requires grad."""
    if not (isinstance(data, Tensor) and data.requires_grad):
        return torch.tensor(data, **kwargs)
    placed = {key: kwargs[key] for key in ("device", "dtype") if kwargs.get(key) is not None}
    return data.to(**placed) if placed else data.clone()
