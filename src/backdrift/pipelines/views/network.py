"""A pipeline's networks as one in the calling order of a :class:`~backdrift.Denoiser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..recorded import outputs_of
from .process import Preconditioning
from .split import CallPlan

__all__ = ["PROGRAM", "Preconditioned", "Program", "ViewNetwork", "prediction_in"]

PROGRAM = "program"  # in cond: which program its call is, where there are two


@dataclass(frozen=True)
class Program:
    """The calls of one evaluation: control networks', by number, and that which predicts."""

    controls: Mapping[int, CallPlan]
    main: CallPlan


class ViewNetwork(nn.Module):
    """``network(x, t, cond)``: what a pipeline's networks predict, with the arguments that the pipeline gave them.

    Args:
        programs: the calls; two where the pipeline calls its network once for each half of guidance.
        networks: by the components' names.
        shape: of one sample's state.
    """

    def __init__(
        self, programs: Sequence[Program], networks: Mapping[str, nn.Module], shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(dict(networks))
        self._programs, self._shape = tuple(programs), tuple(shape)
        self.training = any(network.training for network in networks.values())

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Any] | None) -> Tensor:
        """The prediction (B, …) at x (B, …) and t (B,)."""
        given = cond or {}
        program = self._programs[given.get(PROGRAM, 0)]
        made: dict[int, list[Tensor]] = {}
        for number, plan in program.controls.items():
            made[number] = outputs_of(self.networks[plan.name](**plan.filled(x, t, given, {})))
        main = program.main
        found = self.networks[main.name](**main.filled(x, t, given, made))
        return prediction_in(found, self._shape)


class Preconditioned(nn.Module):
    """x0 of a network under EDM's preconditioning, at states x0 + sigma eps; t is sigma.

    Args:
        network: as above, at the scaled state and what it is told of sigma.
        by: the preconditioning.
        dtype: of the network's input.
    """

    def __init__(self, network: ViewNetwork, by: Preconditioning, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self._by, self._dtype = network, by, dtype
        self.training = network.training

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Any] | None) -> Tensor:
        data, sigma = self._by.sigma_data, t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        size = (sigma**2 + data**2).sqrt()
        parameter = next(self.network.parameters())
        dtype = parameter.dtype if parameter.dtype == torch.float64 else self._dtype
        found = self.network((x / size).to(dtype), self._by.told(t), cond).to(x.dtype)
        return (data / size) ** 2 * x + self._by.sign * (sigma * data / size) * found


def prediction_in(output: Any, shape: Sequence[int]) -> Tensor:
    """The prediction in a network's output, for states (B, *shape): what lies beside it is left out."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    for d, length in enumerate(shape, 1):  # a learned variance, a reference picture's tokens
        if d < found.ndim and found.shape[d] > length:
            found = found.narrow(d, 0, length)
    return found
