"""The doctor on video, sound, modular pipelines, start and control pictures."""

from __future__ import annotations

import pytest

from examined import examine
from tiny_families import tiny_animatediff, tiny_modular, tiny_stable_audio, tiny_wan
from tiny_pipelines import tiny_controlnet, tiny_sd_img2img


def test_video(caplog: pytest.LogCaptureFixture) -> None:
    assert ", 2 frames" in examine(tiny_animatediff())["finite"].found
    pipe = tiny_wan()
    caplog.clear()
    examine(pipe)
    assert not caplog.records  # the pipeline remarks on every call, and those of the doctor are many


def test_sound() -> None:
    assert "result 1x2x" in examine(tiny_stable_audio())["finite"].found


def test_a_modular_pipeline() -> None:
    checkup = examine(tiny_modular(), embeddings=False)
    assert "modular" in checkup["pipeline"].found


def test_start_and_control_pictures() -> None:
    examine(tiny_sd_img2img(), draws=True)
    assert "controlnet" in examine(tiny_controlnet())["one network call"].found
