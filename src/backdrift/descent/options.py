"""How to descend, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import InputError
from ..through import Through
from .optimizers import OptimizerSpec, ScheduleSpec, describe
from .subject import describe_value
from .variables import Variable


@dataclass(frozen=True)
class Options:
    """How to descend; the fields are explained at :func:`optimize`."""

    steps: int = 50
    seed: int = 0
    optimizer: OptimizerSpec = "adamw"
    optimizer_kwargs: dict[str, Any] | None = None
    lr: float | None = None
    lr_schedule: ScheduleSpec = None
    clip_grad: float | None = None
    noise_prior: float = 0.0
    patience: int | None = None
    enough: float | None = None
    minibatch: int | None = None
    chunk: int | None = None
    memory: str | int = "auto"
    clamp: bool = False
    through: Through | str = "all"
    checkpoint_every: int = 1
    call: dict[str, Any] = field(default_factory=dict)  # keywords of the pipeline's call

    def __post_init__(self) -> None:
        for name in ("minibatch", "chunk", "patience", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name}={value!r} must be a whole number, at least 1.")
        if not isinstance(self.steps, int) or self.steps < 0:
            raise InputError(f"steps={self.steps!r} must be a whole number, at least 0.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"lr={self.lr!r} must be positive and finite.")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise InputError(f"clip_grad={self.clip_grad!r} must be positive, or None for no clipping.")
        object.__setattr__(self, "through", Through.parse(self.through))
        if not self.noise_prior >= 0:
            raise InputError(f"noise_prior={self.noise_prior!r} must be 0 or more.")

    @classmethod
    def among(cls, given: Mapping[str, Any]) -> Options:
        """The options among the arguments of a verb, by their names; a verb hands in its ``locals()``."""
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})

    def settings(self, variable: Variable) -> dict[str, Any]:
        """The options as they will be used, for the record."""
        names = (
            "steps",
            "clip_grad",
            "noise_prior",
            "patience",
            "enough",
            "minibatch",
            "chunk",
            "memory",
            "clamp",
        )
        return {
            **variable.settings(),
            **{name: getattr(self, name) for name in names},
            "through": self.choice.spec,
            "optimizer": describe(self.optimizer),
            "optimizer_kwargs": self.arguments(variable),
            "lr": self.rate(variable),
            "lr_schedule": describe(self.lr_schedule),
            "checkpoint_every": self.checkpoint_every,
            **{k: describe_value(v) for k, v in self.call.items()},
        }

    @property
    def choice(self) -> Through:
        """Which steps carry the gradient."""
        return Through.parse(self.through)

    def rate(self, variable: Variable) -> float:
        return variable.lr if self.lr is None else self.lr

    def arguments(self, variable: Variable) -> dict[str, Any]:
        if self.optimizer_kwargs is not None:
            return self.optimizer_kwargs
        return variable.optimizer_kwargs if self.optimizer == "adamw" else {}
