"""What a loss is: pictures in, one value per sample out.

A loss gets ``images`` of shape ``(N, 3, H, W)`` whose values are meant to lie in [0, 1] but may overshoot
(the differentiated path is not clamped, and neither does a loss clamp: a clamped pixel would pull no
gradient), and optionally the ``N`` prompts the pictures were made from. It returns ``N`` values, smaller
is better. Sample ``i``'s value depends on picture ``i`` alone, so that the sum over the batch gives every
sample its own gradient.

Arithmetic is float32 at least: half-precision pictures are widened, float64 ones stay float64. Gradients
come back in the pictures' own dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..accelerators import has_float64
from ..errors import InputError

_LOOKS: ContextVar[bool] = ContextVar("looks", default=True)


@contextmanager
def of_any_range() -> Iterator[None]:
    """A block in which losses do not look whether pictures lie in [0, 1]: those that are decoded from noise, or known
    to be on that scale, may be anywhere."""
    token = _LOOKS.set(False)
    try:
        yield
    finally:
        _LOOKS.reset(token)


class Loss(nn.Module):
    """Base of the losses: subclasses define :meth:`values`, and usually :meth:`from_text`.

    Calling it checks what goes in and what comes out, moves the loss's own networks to the pictures'
    device and widens half precision; :meth:`values` can rely on all of that.
    """

    #: How the command line spells it, ``name`` in ``name:argument``; set by :func:`~.registry.register`.
    name: ClassVar[str] = ""
    #: What the text after the colon means, for the list of losses.
    argument: ClassVar[str] = ""
    #: A complete spec string that works on the built-in assets, or on the small files that the tests put beside
    #: them; the tests run every one.
    example: ClassVar[str] = ""

    #: Whether pictures far from [0, 1] are refused: set by losses whose network knows only such pictures.
    bounded: ClassVar[bool] = False
    _looked: bool = False

    spec: str = ""
    """The loss as text, written into records; equal specs mean equal losses."""

    @classmethod
    def from_text(cls, text: str) -> Loss:
        """Make the loss from what follows the colon in a spec string (empty when there is no colon)."""
        if text:
            raise InputError(f"The loss {cls.name!r} takes no argument, got {text!r}. Write {cls.name!r}.")
        return cls()

    def values(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        """One value per sample, shape ``(N,)``, of float32 or float64 pictures ``(N, 3, H, W)``."""
        raise NotImplementedError

    def forward(self, images: Tensor, prompts: Sequence[str] | str | None = None) -> Tensor:
        """One value per sample, shape ``(N,)``.

        Args:
            images: ``(N, 3, H, W)``, floating point, meant to lie in [0, 1].
            prompts: The prompt of each picture, or one prompt for all of them.

        Raises:
            InputError: When the pictures are not such a tensor, when there are neither one nor ``N``
                prompts, when the loss does not return one value per sample, or when the first pictures of a
                ``bounded`` loss are far from [0, 1].
        """
        check_images(images)
        if self.bounded and not self._looked and _LOOKS.get():
            check_range(images, self.spec or type(self).__name__)
            self._looked = True
        wide = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        self._follow(images.device)
        result = self.values(wide, _one_each(prompts, len(images)))
        return check_values(result, len(images), self.spec or type(self).__name__)

    def _follow(self, device: torch.device) -> None:
        if any(p.device != device for p in [*self.parameters(), *self.buffers()]):
            if not has_float64(device):
                self._apply(lambda t: t.float() if t.dtype == torch.float64 else t)
            self.to(device)


class FunctionLoss(Loss):
    """Any callable as a loss: ``f(images)`` or ``f(images, prompts)`` -> one value per sample.

    The prompts are handed over when ``f`` has a parameter called ``prompts`` or a second required
    positional one. The pictures arrive in their own dtype.

    Raises:
        InputError: When ``f`` cannot be called.
    """

    def __init__(self, function: Callable[..., Tensor], spec: str | None = None) -> None:
        super().__init__()
        if not callable(function):
            raise InputError(f"A loss must be a spec string or a callable, got {type(function).__name__}.")
        self.function = function  # an nn.Module registers itself, so it follows the pictures' device
        self._how = _prompt_argument(function)
        named = getattr(function, "__qualname__", type(function).__name__)
        self.spec = spec or f"{getattr(function, '__module__', '')}.{named}".lstrip(".")

    def forward(self, images: Tensor, prompts: Sequence[str] | str | None = None) -> Tensor:
        check_images(images)
        self._follow(images.device)
        result = self.ask(images, _one_each(prompts, len(images)))
        return check_values(result, len(images), self.spec)

    def ask(self, images: Tensor, prompts: Any) -> Tensor:
        """What the function returns, unchecked."""
        if self._how == "keyword":
            return self.function(images, prompts=prompts)
        if self._how == "positional":
            return self.function(images, prompts)
        return self.function(images)


def check_images(images: Tensor) -> None:
    """Raise :class:`InputError` unless ``images`` is a floating-point tensor ``(N, 3, H, W)``."""
    if not isinstance(images, Tensor):
        raise InputError(f"A loss takes a tensor of pictures, got {type(images).__name__}.")
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise InputError(f"A loss takes pictures of shape (N, 3, H, W), got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise InputError(f"A loss takes floating-point pictures in [0, 1], got {images.dtype}.")


def check_range(images: Tensor, name: str) -> None:
    """Refuse pictures that are plainly on another scale than [0, 1]: [-1, 1], or 0 to 255.

    Unclamped pictures may overshoot, so it takes more than a tenth of the values below -0.5 or above 1.5.

    Raises:
        InputError: When they are.
    """
    if images.device.type == "meta":
        return
    seen = images.detach()
    if float(((seen < -0.5) | (seen > 1.5)).float().mean()) > 0.1:
        raise InputError(
            f"The loss {name!r} takes pictures in [0, 1], got values from {float(seen.min()):.3g} to "
            f"{float(seen.max()):.3g}. Scale them first: (x + 1) / 2 for [-1, 1], x / 255 for 0 to 255."
        )


def check_values(values: Any, batch: int, name: str) -> Tensor:
    """``values`` as a tensor ``(batch,)``; a single value of a batch of one may be a scalar.

    Raises:
        InputError: When it is anything else: a mean over the batch would mix the samples' gradients.
    """
    if isinstance(values, Tensor) and values.is_floating_point():
        if values.shape == (batch,):
            return values
        if batch == 1 and values.numel() == 1:
            return values.reshape(1)
        got = f"a tensor of shape {tuple(values.shape)}"
    elif isinstance(values, Tensor):
        got = f"a tensor of {values.dtype}"
    else:
        got = f"{type(values).__name__}"
    raise InputError(
        f"The loss {name!r} returned {got} for {batch} picture(s); it must return a floating-point tensor "
        f"of shape ({batch},), one value per sample (for instance `.flatten(1).mean(1)`)."
    )


def _one_each(prompts: Sequence[str] | str | None, batch: int) -> list[str] | None:
    if prompts is None:
        return None
    each = [prompts] * batch if isinstance(prompts, str) else list(prompts)
    if len(each) == 1:
        each = each * batch
    if len(each) != batch:
        raise InputError(f"Got {len(each)} prompts for {batch} pictures; give one prompt or one for each.")
    return each


def _prompt_argument(function: Callable[..., Any]) -> str:
    """How ``function`` takes the prompts: "keyword", "positional" or "none"."""
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some builtins tell nothing about their arguments
        return "none"
    if "prompts" in parameters:
        return (
            "keyword" if parameters["prompts"].kind is not inspect.Parameter.POSITIONAL_ONLY else "positional"
        )
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.kind in plain and p.default is inspect.Parameter.empty]
    return "positional" if len(required) >= 2 else "none"
