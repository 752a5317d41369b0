"""The small parts and pipelines that the tests use too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # they live beside the tests

import tiny_families as families
import tiny_pipelines as pipelines
from tiny_pipelines import LATENT, PICTURE, WIDTH

__all__ = ["LATENT", "PICTURE", "WIDTH", "families", "pipelines"]
