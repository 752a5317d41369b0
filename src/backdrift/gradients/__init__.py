"""Gradient methods: how a run is carried out so that a loss on its states can be differentiated."""

from .base import GradientMethod, Job
from .exact import Exact
from .plain import Plain
from .reversible import Reversible

__all__ = ["Exact", "GradientMethod", "Job", "Plain", "Reversible"]
