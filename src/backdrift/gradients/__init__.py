"""Gradient methods: how a run is carried out so that a loss on its states can be differentiated."""

from .base import GradientMethod, Job
from .continuous import ContinuousAdjoint
from .deis import AdjointDEIS
from .exact import Exact
from .plain import Plain
from .reversible import Reversible
from .symplectic import SymplecticAdjoint

__all__ = [
    "AdjointDEIS",
    "ContinuousAdjoint",
    "Exact",
    "GradientMethod",
    "Job",
    "Plain",
    "Reversible",
    "SymplecticAdjoint",
]
