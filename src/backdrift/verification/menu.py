"""Gradient methods and solvers by name, and what each method claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..gradients import (
    AdjointDEIS,
    ContinuousAdjoint,
    Exact,
    GradientMethod,
    Plain,
    Reversible,
    SymplecticAdjoint,
)
from ..solvers import (
    DEIS,
    EDICT,
    RK4,
    AdamsBashforth,
    AdaptiveDormandPrince,
    BogackiShampine,
    DormandPrince,
    DPMSolver,
    DPMSolverPP,
    Euler,
    Heun,
    McCallumFoster,
    Midpoint,
    Ralston,
    ReversibleHeun,
    ReversibleSolver,
    Solver,
    StochasticSolver,
    ThreeEighths,
)
from ..suggest import closest

Claim = Literal["exact", "flow", "none"]

SOLVERS: dict[str, Callable[[], Solver]] = {
    "euler": Euler,
    "ddim": Euler,
    "midpoint": Midpoint,
    "heun": Heun,
    "ralston": Ralston,
    "bogacki-shampine": BogackiShampine,
    "rk4": RK4,
    "three-eighths": ThreeEighths,
    "dormand-prince": DormandPrince,
    "ab2": lambda: AdamsBashforth(2),
    "ab3": lambda: AdamsBashforth(3),
    "ab4": lambda: AdamsBashforth(4),
    "ab4:rising": lambda: AdamsBashforth(4, start="rising"),
    "deis2": lambda: DEIS(2),
    "deis3": lambda: DEIS(3),
    "deis4": lambda: DEIS(4),
    "dpm2": lambda: DPMSolver(2),
    "dpm3": lambda: DPMSolver(3),
    "dpm++2m": DPMSolverPP,
    "reversible-heun": ReversibleHeun,
    "edict": EDICT,
}

METHODS: dict[str, Callable[[], GradientMethod]] = {
    "plain": Plain,
    "exact": Exact,
    "exact:max": lambda: Exact("max"),
    "exact:min": lambda: Exact("min"),
    "symplectic": SymplecticAdjoint,
    "symplectic:stored": lambda: SymplecticAdjoint("stored"),
    "reversible": Reversible,
    "continuous": ContinuousAdjoint,
    "continuous:recompute": lambda: ContinuousAdjoint(trajectory="recompute"),
    "continuous:original": lambda: ContinuousAdjoint(form="original"),
    "continuous:exponential": lambda: ContinuousAdjoint(form="exponential"),
    "continuous:data": lambda: ContinuousAdjoint(form="data"),
    "continuous:heun": lambda: ContinuousAdjoint(Heun()),
    "continuous:rk4": lambda: ContinuousAdjoint(RK4()),
    "continuous:ab4": lambda: ContinuousAdjoint(AdamsBashforth(4)),
    "continuous:adaptive": lambda: ContinuousAdjoint(AdaptiveDormandPrince()),
    "deis1": lambda: AdjointDEIS(1),
    "deis2m": lambda: AdjointDEIS(2, "M"),
    "deis2s": lambda: AdjointDEIS(2, "S"),
}

#: What is measured when nothing is said; "{other}" is the form that the run does not use.
DEFAULTS = (
    "exact:max", "exact:min", "symplectic", "reversible", "continuous", "continuous:{other}",
    "continuous:recompute", "deis2m", "deis2s",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A method to be measured.

    Attributes:
        name: how it is called in the table.
        method: the method.
        claim: ``"exact"``: the sampler's own gradient; ``"flow"``: it approaches the true flow's; ``"none"``: it is
            not one of this package's.
    """

    name: str
    method: GradientMethod
    claim: Claim

    @property
    def couples(self) -> bool:
        """Whether it runs on the reversible coupling of the solver: a sampler of its own."""
        return isinstance(self.method, Reversible)

    def solver(self, solver: Solver) -> Solver:
        """The solver it runs on."""
        return McCallumFoster(solver) if self.couples and not isinstance(solver, ReversibleSolver) else solver


def entries(methods: Any, form: str) -> list[Entry]:
    """The methods to measure.

    Args:
        methods: names; gradient methods; a mapping from names of one's own to methods; None for
            :data:`DEFAULTS`.
        form: of the run.

    Raises:
        InputError: something is neither a known name nor a gradient method, or a name is there twice.
    """
    if methods is None:
        other = "exponential" if form == "original" else "original"
        methods = [name.format(other=other) for name in DEFAULTS]
    if isinstance(methods, str | GradientMethod):
        methods = [methods]
    if isinstance(methods, Mapping):
        pairs = [(str(name), _method(given)) for name, given in methods.items()]
    elif isinstance(methods, Sequence):
        pairs = [(given if isinstance(given, str) else repr(given), _method(given)) for given in methods]
    else:
        raise InputError(f"methods are names, gradient methods or a mapping to them; got {methods!r}")
    names = [name for name, _ in pairs]
    if not pairs or len(set(names)) < len(names):
        raise InputError(f"methods must be at least one, each named once; got {names}")
    return [Entry(name, method, _claim(method)) for name, method in pairs]


def solver_named(given: Any) -> Solver:
    """The solver that a name or a solver means.

    Raises:
        InputError: it is neither, or it adds noise or chooses its own steps.
    """
    if isinstance(given, str):
        if given not in SOLVERS:
            raise InputError(
                f"solver {given!r} is not known.{closest(given, SOLVERS)} The names are: {', '.join(SOLVERS)}."
            )
        return SOLVERS[given]()
    if not isinstance(given, Solver):
        raise InputError(f"solver must be a name or a Solver such as Heun(); got {given!r}")
    if isinstance(given, StochasticSolver | AdaptiveDormandPrince):
        raise InputError(
            f"a certificate compares gradients of one ODE on given steps, and {given!r} "
            f"{'adds noise' if isinstance(given, StochasticSolver) else 'chooses its own steps'}: use one of "
            f"{', '.join(SOLVERS)}"
        )
    return given


def _method(given: Any) -> GradientMethod:
    if isinstance(given, GradientMethod):
        return given
    if not isinstance(given, str):
        hint = " (an instance, so with brackets)" if isinstance(given, type) else ""
        raise InputError(f"a method is a name or a gradient method such as Exact(){hint}; got {given!r}")
    if given not in METHODS:
        raise InputError(
            f"method {given!r} is not known.{closest(given, METHODS)} The names are: {', '.join(METHODS)}."
        )
    return METHODS[given]()


def _claim(method: GradientMethod) -> Claim:
    if isinstance(method, Plain | Exact | SymplecticAdjoint | Reversible):
        return "exact"
    return "flow" if isinstance(method, ContinuousAdjoint | AdjointDEIS) else "none"
