"""Every example runs, on the built-in pipeline and in small, and leaves what it promises."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SMALL: dict[str, dict[str, Any]] = {
    "optimize_noise": {"steps": 2, "num_inference_steps": 2},
    "invert_an_effect": {"steps": 1, "num_inference_steps": 2},
    "ambigrams": {"seeds": 1, "steps": 1, "num_inference_steps": 2},
    "guide_a_class": {"samples": 1, "num_inference_steps": 10},
}
LEAVES = {
    "invert_an_effect": ["another.png", "embedding.safetensors", "report.html"],
    "guide_a_class": ["report.html", "pictures/unguided.png", "record.json"],
    "ambigrams": ["report.html", "pictures/upside-down.png", "pictures/one-step-guidance.png"],
}


def test_every_example_is_listed_here() -> None:
    assert {path.stem for path in EXAMPLES} == set(SMALL)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.main(out=str(tmp_path / "out"), **SMALL[path.stem])
    assert run.finished
    for name in LEAVES.get(path.stem, ["report.html", "pictures/after.png"]):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "report.html" in capsys.readouterr().out
