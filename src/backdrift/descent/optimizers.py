"""Optimizers and learning-rate schedules of PyTorch, by name or as a callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..suggest import closest

OPTIMIZERS: dict[str, str] = {
    "adamw": "AdamW",
    "adam": "Adam",
    "sgd": "SGD",
    "rmsprop": "RMSprop",
    "adamax": "Adamax",
    "nadam": "NAdam",
    "radam": "RAdam",
    "adagrad": "Adagrad",
}
SCHEDULES = ("constant", "linear", "cosine")

OptimizerSpec = str | Callable[..., torch.optim.Optimizer]
ScheduleSpec = str | Callable[[torch.optim.Optimizer], Any] | None


def make_optimizer(
    spec: OptimizerSpec, parameters: Iterable[Tensor], lr: float, kwargs: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer called ``spec``, or ``spec(parameters, lr=lr, **kwargs)``.

    Raises:
        InputError: the name is unknown, or the arguments do not suit the optimizer.
    """
    if isinstance(spec, str):
        if spec.lower() not in OPTIMIZERS:
            raise InputError(
                f"There is no optimizer {spec!r}.{closest(spec, OPTIMIZERS)} Names: {', '.join(OPTIMIZERS)}; "
                "or give a callable such as torch.optim.AdamW."
            )
        make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, OPTIMIZERS[spec.lower()])
    else:
        make = spec
    if make is torch.optim.LBFGS:
        raise InputError(
            "LBFGS calls the sampler several times a step and is not supported; use 'adamw' or 'sgd'."
        )
    try:
        return make(list(parameters), lr=lr, **kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The optimizer {describe(spec)} does not take lr={lr}, {kwargs}: {error}"
        ) from error


def make_schedule(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The schedule called ``spec`` over ``steps`` updates, ``spec(optimizer)``, or ``None`` for a constant rate.

    ``"linear"`` and ``"cosine"`` fall from the learning rate to 0 after the last update.

    Raises:
        InputError: the name is unknown.
    """
    if spec is None or spec == "constant":
        return None
    if callable(spec):
        return spec(optimizer)
    if spec == "linear":
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(steps, 1))
    if spec == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    raise InputError(
        f"There is no learning-rate schedule {spec!r}.{closest(str(spec), SCHEDULES)} Names: "
        f"{', '.join(SCHEDULES)}; or give a callable that takes the optimizer."
    )


def describe(spec: Any) -> Any:
    """A name for the record: strings as they are, callables by their qualified name."""
    if spec is None or isinstance(spec, str):
        return spec
    return f"{getattr(spec, '__module__', '')}.{getattr(spec, '__qualname__', type(spec).__name__)}"
