"""The doctor on families of pictures: each is measured, found right, and left as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdrift.pipelines.checkup.front import FAMILIES
from examined import examine
from tiny_families import tiny_dit, tiny_pixart, tiny_pixels, tiny_sana
from tiny_pipelines import tiny_flux, tiny_sd3, tiny_sdxl

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd3, tiny_flux, tiny_pixart, tiny_sana])
def test_pipelines_that_take_noise_and_embeddings(build: Callable[[], Any]) -> None:
    examine(build())


@pytest.mark.parametrize("build", [tiny_dit, tiny_pixels])
def test_pipelines_that_draw_their_noise(build: Callable[[], Any]) -> None:
    checkup = examine(build(), embeddings=False, draws=True)
    assert "noise=" in checkup["noise"].advice


def test_the_families_are_those_of_the_page() -> None:
    page = (DOCS / "compatibility.md").read_text()
    table = page[page.index("## Families") : page.index("## What comes back")]
    listed = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", table, re.MULTILINE)
    assert {cls: name for name, cls in listed} == FAMILIES
