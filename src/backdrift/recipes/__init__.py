"""Applications: each a configuration of the one optimisation loop, one per file."""

from __future__ import annotations

from .ambigram import ambigram
from .effect import measure_effect
from .embedding import Embedding, load_embedding
from .invert import invert
from .pairs import Pair, effect_pairs

__all__ = [
    "Embedding",
    "Pair",
    "ambigram",
    "effect_pairs",
    "invert",
    "load_embedding",
    "measure_effect",
]
