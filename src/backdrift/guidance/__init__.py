"""Guided sampling: Symplectic Adjoint Guidance, and the rules it generalises."""

from .adaptive import Adaptive
from .attempt import Attempt, Rule
from .base import Guidance
from .guide import Guided, guide
from .presets import DPS, LGD, MPGD, TFG, FreeDoM, UniversalGuidance
from .strengths import Constant, Relative
from .symplectic import SymplecticAdjointGuidance
from .trace import Entry, GuidanceTrace

__all__ = [
    "DPS",
    "LGD",
    "MPGD",
    "TFG",
    "Adaptive",
    "Attempt",
    "Constant",
    "Entry",
    "FreeDoM",
    "Guidance",
    "GuidanceTrace",
    "Guided",
    "Relative",
    "Rule",
    "SymplecticAdjointGuidance",
    "UniversalGuidance",
    "guide",
]
