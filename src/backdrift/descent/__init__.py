"""The one optimisation loop and its parts: what is optimised, how it is measured, what is kept."""

from __future__ import annotations

from .loop import Descent
from .options import Options
from .subject import Example
from .variables import Noise, PromptEmbeds, Variable
from .weights import Lora, Weights, variable_for

__all__ = [
    "Descent",
    "Example",
    "Lora",
    "Noise",
    "Options",
    "PromptEmbeds",
    "Variable",
    "Weights",
    "variable_for",
]
