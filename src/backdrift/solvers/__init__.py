"""Solvers: each knows its order, the forms it works on, and how to take one step."""

from .adams import AdamsBashforth
from .base import Solver, Stepper
from .coupled import Kick, Leg, Pair, PairRun, ReversibleSolver, State
from .dpm import DPMSolverPP
from .reversible import EDICT, McCallumFoster, ReversibleHeun
from .runge_kutta import RK4, Euler, ExplicitRungeKutta, Heun, Tableau
from .sde_dpm import SDEDPMSolverPP
from .stochastic import Ancestral, EulerMaruyama, ExponentialEuler, StochasticSolver, StochasticStepper

__all__ = [
    "EDICT",
    "RK4",
    "AdamsBashforth",
    "Ancestral",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "ExplicitRungeKutta",
    "ExponentialEuler",
    "Heun",
    "Kick",
    "Leg",
    "McCallumFoster",
    "Pair",
    "PairRun",
    "ReversibleHeun",
    "ReversibleSolver",
    "SDEDPMSolverPP",
    "Solver",
    "State",
    "Stepper",
    "StochasticSolver",
    "StochasticStepper",
    "Tableau",
]
