"""Who takes part: every setting for the counts, and a line-up of a few for time and memory."""

from __future__ import annotations

from importlib.util import find_spec

from . import flowgrad, in_jax, invertible, ode, ours, sde, symplectic
from .method import Method

# What a package needs to take part.
NEEDS = {"torchdiffeq": "torchdiffeq", "torchsde": "torchsde", "diffrax": "diffrax"}


def missing() -> list[str]:
    """The peers that are not installed (``pip install "backdrift[peers]"``)."""
    return [package for package, module in NEEDS.items() if find_spec(module) is None]


def all_methods(problem: str) -> list[Method]:
    """Every method in every setting on a problem; peers that are not installed are left out."""
    if problem == "sde":
        found = sde.methods()
    else:
        found = [*ours.exact_to_the_steps(), *ours.of_the_flow(), *ode.methods(), *symplectic.methods()]
        found += [*flowgrad.methods(), *invertible.methods()]
        if problem == "mixture":
            found += in_jax.methods()
    absent = missing()
    return [method for method in found if method.package not in absent]


# For time and memory: what everybody would choose. A "*" ends a beginning.
_FIRST_ORDER = (
    "autograd | plain | Euler",
    "autograd | checkpoint per call | Euler",
    'backdrift | Exact("max") | Euler',
    'backdrift | Exact("min") | Euler',
    "backdrift | SymplecticAdjoint | Euler",
    "published | symplectic adjoint, stored states | Euler",
    "FlowGrad | stored-state sweep | Euler, every step",
    "torchdiffeq | odeint_adjoint, stored | euler, exponential form, log-SNR nodes",
    "torchdiffeq | odeint_adjoint, solved back | euler, exponential form, log-SNR nodes",
    "backdrift | ContinuousAdjoint | Euler",
    "backdrift | Reversible | EDICT",
    "DOODL | invertible gradient | EDICT",
)
_MORE = (
    "autograd | plain | AB4",
    'backdrift | Exact("min") | AB4',
    'backdrift | Exact("max") | DEIS-3 in log-SNR',
    "backdrift | AdjointDEIS-2M | AB4",
    "backdrift | SymplecticAdjoint | RK4",
    "published | symplectic adjoint, stored states | RK4",
    "backdrift | ContinuousAdjoint | RK4",
    "backdrift | Reversible | reversible Heun",
    "torchdiffeq | odeint_adjoint, stored | rk4, exponential form in log-SNR",
    "torchdiffeq | odeint_adjoint, stored | rk4, original form, uniform t",
    "torchdiffeq | odeint_adjoint, solved back | explicit_adams, order 4, exponential form in log-SNR",
    "torchdiffeq | odeint_adjoint | dopri5, exponential form in log-SNR",
    "torchdiffeq | odeint_adjoint | dopri5, original form",
)
_JAX = (
    "diffrax | RecursiveCheckpointAdjoint | Tsit5, exponential form in log-SNR",
    "diffrax | BacksolveAdjoint | Tsit5, exponential form in log-SNR",
    "diffrax | RecursiveCheckpointAdjoint | Tsit5 adaptive, exponential form in log-SNR",
)


def line_up(problem: str) -> list[Method]:
    """The methods whose time and memory are measured on a problem."""
    keys = {
        "mixture": _FIRST_ORDER + _MORE + _JAX,
        "digits": _FIRST_ORDER + _MORE,
        "sde": (),
    }.get(problem, _FIRST_ORDER)
    known = {method.key: method for method in all_methods(problem)}
    return list(known.values()) if problem == "sde" else [known[key] for key in keys if key in known]
