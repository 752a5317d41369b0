"""Gradient methods: how the network calls of a run are made, so that a loss on its result can be differentiated."""

from .base import GradientMethod
from .exact import Exact
from .plain import Plain

__all__ = ["Exact", "GradientMethod", "Plain"]
