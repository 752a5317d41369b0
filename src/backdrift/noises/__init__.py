"""Noises: what a stochastic solver adds in a step, as a function of the step's two times."""

from .base import Draw, Noise
from .brownian import Brownian
from .given import GivenNoise

__all__ = ["Brownian", "Draw", "GivenNoise", "Noise"]
