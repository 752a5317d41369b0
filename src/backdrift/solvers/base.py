"""What every solver offers: its order, its count of evaluations, and one step at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ..errors import InputError
from ..forms import FORMS, Form, Node
from ..scalars import add_scaled as add_scaled
from ..scalars import rescaled as rescaled


class Stepper(ABC):
    """One run of a solver: what the method remembers from step to step lives here."""

    @abstractmethod
    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        """The state x at ``b`` from the state x at ``a`` (both are x, not Y = x / scale)."""


class Solver(ABC):
    """A method for dY/ds = drift on given nodes.

    Attributes:
        order: the global order, for the state and for its gradient; measured by the tests.
        forms: the forms it can be used on.
        default_form: the form taken when none is named (None: the schedule decides).
    """

    order: int
    forms: tuple[str, ...] = FORMS
    default_form: str | None = None

    @abstractmethod
    def begin(self) -> Stepper:
        """A fresh run."""

    @abstractmethod
    def evaluations(self, index: int) -> int:
        """Evaluations of the model that step number ``index`` (from 0) of a run makes."""

    @property
    @abstractmethod
    def aside(self) -> Solver:
        """The one-step method that takes over beside a singular end, where the form changes for an interval, and
        where the method does not span an interval."""

    def spans(self, a: Node, b: Node) -> bool:
        """Whether the method itself can step from ``a`` to ``b``, two points where the form is regular.

        Not one that steps in lam, where lam is infinite at an end.
        """
        return True

    def fitted(self, steps: int) -> Solver:
        """The method for a run of that many steps: itself, unless a setting left open depends on them."""
        return self

    def check_form(self, form: str) -> None:
        """Raise if the method is not made for ``form``.

        Raises:
            InputError: it is not.
        """
        if form not in self.forms:
            raise InputError(
                f"{self!r} works on form={' or '.join(map(repr, self.forms))}; got form={form!r}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
