"""The doctor on every family of pipelines: each is measured, found right, and left as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backdrift as bd
from backdrift.pipelines.checkup.front import FAMILIES
from pipeline_state import state_of
from tiny_families import (
    tiny_animatediff,
    tiny_dit,
    tiny_modular,
    tiny_pixart,
    tiny_pixels,
    tiny_sana,
    tiny_stable_audio,
    tiny_wan,
)
from tiny_pipelines import tiny_controlnet, tiny_flux, tiny_sd3, tiny_sd_img2img, tiny_sdxl

DOCS = Path(__file__).parent.parent / "docs"
MEASURED = ("finite", "beside plain autograd", "by the noise")
# How each is made, and whether its embeddings can be handed in.
OTHERS: dict[str, tuple[Callable[[], Any], bool]] = {
    "sdxl": (tiny_sdxl, True),
    "sd3": (tiny_sd3, True),
    "flux": (tiny_flux, True),
    "pixart": (tiny_pixart, True),
    "sana": (tiny_sana, True),
    "dit": (tiny_dit, False),
    "ddpm": (tiny_pixels, False),
    "animatediff": (tiny_animatediff, True),
    "wan": (tiny_wan, True),
    "stable audio": (tiny_stable_audio, True),
    "modular": (tiny_modular, False),
    "image to image": (tiny_sd_img2img, True),
    "controlnet": (tiny_controlnet, True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_family_is_measured(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, embeddings = OTHERS[name]
    pipe = build()
    before = state_of(pipe)
    caplog.clear()
    checkup = bd.doctor(pipe, directions=1)
    assert not caplog.records  # pipelines remark on every call; those of the doctor are many
    assert state_of(pipe) == before
    assert checkup.ok, checkup.table()
    for title in MEASURED:
        assert checkup[title].status == "ok", checkup.table()
    assert checkup["beside plain autograd"].figures["relative difference"] == 0.0
    assert checkup["by the embeddings"].status == ("ok" if embeddings else "skipped"), checkup.table()
    assert checkup["noise"].status == ("handled" if name in ("dit", "ddpm", "image to image") else "ok")
    assert checkup["30 steps"].figures["smallest"] <= checkup["30 steps"].figures["max"]


def test_the_families_are_those_of_the_page() -> None:
    page = (DOCS / "compatibility.md").read_text()
    table = page[page.index("## Families") : page.index("## What comes back")]
    listed = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", table, re.MULTILINE)
    assert {cls: name for name, cls in listed} == FAMILIES
