"""The rules of guidance that Symplectic Adjoint Guidance generalises, and their siblings; one paper per file.

A rule is a frozen dataclass that is called with an :class:`~backdrift.guidance.attempt.Attempt` and returns the
state after the step. Each acts on every sample by itself, is the paper's own on variance-preserving schedules, and
the same rule in every other system of coordinates (:mod:`~backdrift.guidance.strengths`). Users hold presets of
them (:mod:`backdrift.guidance.presets`); docs/guidance-rules.md compares them.
"""

from .dps import DPSRule
from .lgd import LGDRule
from .mpgd import MPGDRule
from .tfg import TFGRule
from .universal import UniversalRule

__all__ = ["DPSRule", "LGDRule", "MPGDRule", "TFGRule", "UniversalRule"]
