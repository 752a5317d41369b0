"""Applications: each a configuration of the one optimisation loop or of guidance, one per file."""

from __future__ import annotations

from .ambigram import ambigram
from .audit import ClassFilter, SafetyFilter, ScoreFilter, audit, stand_in
from .effect import measure_effect
from .embedding import Embedding, load_embedding
from .expand import expand
from .guided_aesthetic import guide_aesthetic
from .guided_class import guide_class
from .guided_object import guide_object
from .guided_style import guide_style
from .guiding import Guiding, Sampling
from .invert import invert
from .pairs import Pair, effect_pairs
from .stylize import stylize

__all__ = [
    "ClassFilter",
    "Embedding",
    "Guiding",
    "Pair",
    "SafetyFilter",
    "Sampling",
    "ScoreFilter",
    "ambigram",
    "audit",
    "effect_pairs",
    "expand",
    "guide_aesthetic",
    "guide_class",
    "guide_object",
    "guide_style",
    "invert",
    "load_embedding",
    "measure_effect",
    "stand_in",
    "stylize",
]
