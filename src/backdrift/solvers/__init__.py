"""Solvers: each knows its order, the forms it works on, and how to take one step."""

from .adams import AdamsBashforth
from .adaptive import AdaptiveDormandPrince
from .base import Solver, Stepper
from .coupled import Kick, Leg, Pair, PairRun, ReversibleSolver, State
from .deis import DEIS
from .dpm import DPMSolverPP
from .reversible import EDICT, McCallumFoster, ReversibleHeun
from .runge_kutta import (
    RK4,
    BogackiShampine,
    DormandPrince,
    Euler,
    ExplicitRungeKutta,
    Heun,
    Midpoint,
    Ralston,
    RungeKutta,
    Tableau,
    ThreeEighths,
)
from .sde_dpm import SDEDPMSolverPP
from .singlestep import DPMSolver
from .stochastic import Ancestral, EulerMaruyama, ExponentialEuler, StochasticSolver, StochasticStepper

__all__ = [
    "DEIS",
    "EDICT",
    "RK4",
    "AdamsBashforth",
    "AdaptiveDormandPrince",
    "Ancestral",
    "BogackiShampine",
    "DPMSolver",
    "DPMSolverPP",
    "DormandPrince",
    "Euler",
    "EulerMaruyama",
    "ExplicitRungeKutta",
    "ExponentialEuler",
    "Heun",
    "Kick",
    "Leg",
    "McCallumFoster",
    "Midpoint",
    "Pair",
    "PairRun",
    "Ralston",
    "ReversibleHeun",
    "ReversibleSolver",
    "RungeKutta",
    "SDEDPMSolverPP",
    "Solver",
    "State",
    "Stepper",
    "StochasticSolver",
    "StochasticStepper",
    "Tableau",
    "ThreeEighths",
]
