"""Pictures of the built-in pipelines, encoded to a pair and decoded again through their ``Denoiser`` view."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import backdrift as bd


@pytest.mark.parametrize(("name", "steps", "solver"), [("sd", 50, "edict"), ("flow", 20, "mf")])
def test_a_picture_of_the_built_in_pipelines_comes_back(name: str, steps: int, solver: str) -> None:
    """In the pipelines' own float32, with guidance; both members of the pair."""
    pipe = bd.load() if name == "sd" else bd.load("flow")
    view = bd.as_denoiser(pipe, "a red seven", 3.0)
    coupled = bd.EDICT() if solver == "edict" else bd.McCallumFoster(bd.Euler())
    how: dict[str, Any] = {"solver": coupled, "grid": bd.TimeGrid("uniform", steps)}
    with torch.no_grad():
        picture = bd.sample(view.model, bd.noise(pipe, seed=0), view.cond, grid=bd.TimeGrid("uniform", 8)).x0
        pair = bd.encode(view.model, picture, view.cond, **how)
        found = bd.sample(view.model, pair, view.cond, **how).pair
    assert found is not None
    for state in found:
        assert float((state - picture).norm() / picture.norm()) <= 1e-3
