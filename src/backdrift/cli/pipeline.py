"""The pipeline that a command's settings name, loaded and moved."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import InputError
from .config import Settings


def open_pipeline(settings: Settings, **kwargs: Any) -> Any:
    """Load ``settings.model`` in its dtype and move it to its device; ``kwargs`` go to ``load``.

    Raises:
        InputError: When the model cannot be loaded or the device is not there.
    """
    import torch

    from ..pipelines.load import load

    device = find_device(settings.device)
    quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the libraries' notices to each other
        pipe: Any = load(settings.model, torch_dtype=getattr(torch, settings.dtype), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def find_device(name: str) -> Any:
    """The device called ``name``; ``"auto"`` is the first of CUDA, XPU, MPS and CPU that is there.

    Raises:
        InputError: When there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device(devices()[0])
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("nothing can be computed there")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError):
        raise InputError(
            f"The device {name!r} is not available here; there are: {', '.join(devices())}.{_why(name)}"
        ) from None
    return device


def _why(name: str) -> str:
    """What stands between the user and a device that is usually there."""
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f" PyTorch {torch.__version__} is built for the CPU alone: install a build for CUDA."
        return " PyTorch is built for GPUs and finds none: nvidia-smi tells whether the driver does."
    if name.startswith("mps") and not torch.backends.mps.is_available():
        return " It is the GPU of Apple's own processors, with a PyTorch for macOS."
    return ""


def devices() -> list[str]:
    """The devices of this machine, the preferred one first."""
    from ..accelerators import available

    return [*map(str, available()), "cpu"]


def quiet() -> None:
    """Silence the libraries' own progress bars and notices; errors still come through."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
