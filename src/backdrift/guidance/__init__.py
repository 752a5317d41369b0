"""Guided sampling: Symplectic Adjoint Guidance, and the rules it generalises."""

from .attempt import Attempt, Rule
from .base import Guidance
from .strengths import Constant, Relative
from .symplectic import Adaptive, SymplecticAdjointGuidance
from .trace import Entry, GuidanceTrace

__all__ = [
    "Adaptive",
    "Attempt",
    "Constant",
    "Entry",
    "Guidance",
    "GuidanceTrace",
    "Relative",
    "Rule",
    "SymplecticAdjointGuidance",
]
