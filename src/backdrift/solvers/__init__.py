"""Solvers: each knows its order, the forms it works on, and how to take one step."""

from .adams import AdamsBashforth
from .base import Solver, Stepper
from .dpm import DPMSolverPP
from .runge_kutta import RK4, Euler, ExplicitRungeKutta, Heun, Tableau

__all__ = [
    "RK4",
    "AdamsBashforth",
    "DPMSolverPP",
    "Euler",
    "ExplicitRungeKutta",
    "Heun",
    "Solver",
    "Stepper",
    "Tableau",
]
