"""The losses by name. Every module of this package is looked through, so a new file is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from ..errors import InputError
from ..suggest import closest
from .base import Loss

L = TypeVar("L", bound=type[Loss])

_KINDS: dict[str, type[Loss]] = {}


def register(name: str, *, argument: str = "", example: str = "") -> Callable[[L], L]:
    """Class decorator: make a loss available as ``name`` or ``name:argument``.

    Args:
        name: Lower-case letters, digits and hyphens.
        argument: What the text after the colon means, for the list of losses; "" when there is none.
        example: A complete spec string; the tests check the contract of every loss on it.
    """

    def add(kind: L) -> L:
        if name in _KINDS and _KINDS[name].__qualname__ != kind.__qualname__:
            raise InputError(
                f"Two losses are called {name!r}: {_KINDS[name].__qualname__}, {kind.__qualname__}."
            )
        kind.name, kind.argument, kind.example = name, argument, example or name
        _KINDS[name] = kind
        return kind

    return add


def kinds() -> dict[str, type[Loss]]:
    """Every loss that has a name, sorted by it."""
    _import_all()
    return dict(sorted(_KINDS.items()))


def find(name: str) -> type[Loss]:
    """The loss class called ``name``.

    Raises:
        InputError: When there is none; the message lists what there is and the closest name.
    """
    known = kinds()
    if name not in known:
        raise InputError(
            f"There is no loss called {name!r}.{closest(name, known)} There are: {', '.join(known)}; "
            f'or give your own as path/to/file.py:function. A "+" inside a text must be quoted, '
            f'as in clip:"one + one".'
        )
    return known[name]


@cache
def _import_all() -> None:
    package = importlib.import_module(__package__ or "backdrift.losses")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
