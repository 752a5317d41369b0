"""The checks of ``differentiable``, each made on one part of a pipeline at a time, so that all refusals are found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...errors import BackdriftError
from ..forwards import check_networks
from ..parallel import check_parallel
from ..refusals import check_components
from ..states import check_states

#: Checks that look at one network after the other.
OF_NETWORKS: tuple[Callable[[Any], None], ...] = (
    check_components,
    check_networks,
    check_states,
    lambda pipe: check_parallel(pipe, {}),
)


def refusal(check: Callable[..., Any], *args: Any) -> str | None:
    """What a check says against its arguments; None if nothing."""
    try:
        check(*args)
    except BackdriftError as error:
        return str(error)
    return None


def split_refusal(message: str) -> tuple[str, str]:
    """What is in the way, and what to do: most refusals put the second behind their last colon or semicolon."""
    at = max(message.rfind(": "), message.rfind("; "))
    return (message, "") if at < 0 else (message[:at], message[at + 2 :])


def with_one_network(pipe: Any, key: str | None) -> Any:
    """A copy of a pipeline without its other networks (``None``: without any)."""
    view = copy.copy(pipe)
    for name, value in vars(pipe).items():
        if isinstance(value, nn.Module) and name != key:
            del view.__dict__[name]
    return view


def with_one_scheduler(pipe: Any, key: str | None) -> Any:
    """A copy of a pipeline without its other schedulers (``None``: without any)."""
    view = copy.copy(pipe)
    for name in schedulers(pipe):
        if name != key:
            del view.__dict__[name]
    return view


def schedulers(pipe: Any) -> dict[str, Any]:
    """What steps and has times, by attribute name."""
    return {
        key: value
        for key, value in vars(pipe).items()
        if callable(getattr(value, "step", None)) and callable(getattr(value, "set_timesteps", None))
    }


def modules(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's networks as they are, wrappers around them included."""
    return {key: value for key, value in vars(pipe).items() if isinstance(value, nn.Module)}


def network_refusals(pipe: Any) -> Iterator[tuple[str, str]]:
    """Component and message of every refusal that concerns a network."""
    for key in modules(pipe):
        view = with_one_network(pipe, key)
        for check in OF_NETWORKS:
            message = refusal(check, view)
            if message is not None:
                yield key, message
