"""Solvers: each knows its order, the forms it works on, and how to take one step."""

from .adams import AdamsBashforth
from .base import Solver, Stepper
from .dpm import DPMSolverPP
from .runge_kutta import RK4, Euler, ExplicitRungeKutta, Heun, Tableau
from .sde_dpm import SDEDPMSolverPP
from .stochastic import Ancestral, EulerMaruyama, ExponentialEuler, StochasticSolver, StochasticStepper

__all__ = [
    "RK4",
    "AdamsBashforth",
    "Ancestral",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "ExplicitRungeKutta",
    "ExponentialEuler",
    "Heun",
    "SDEDPMSolverPP",
    "Solver",
    "Stepper",
    "StochasticSolver",
    "StochasticStepper",
    "Tableau",
]
