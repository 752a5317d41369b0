"""A network with some of its weights replaced, the network itself left as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class MovedNetwork(nn.Module):
    """The network, called with other values for some of its parameters.

    Args:
        network: it is not changed.
        values: by the parameters' names, of their shapes; the other parameters are its own.
    """

    def __init__(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network, self.values = network, dict(values)
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.network, self.values, args, kwargs)
