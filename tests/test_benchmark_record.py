"""The benchmarks' results file: what is found again, what is put in whose place, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.record import Record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "r.json"


def test_a_record_is_taken_up_where_it_was(path: Path) -> None:
    record = Record(path, {"cores": 2}, {"steps": 5}, "times", "memory")
    record.add("times", method="a", seconds=1.5)
    record.note("figures", [["what", "5 × as much"]])
    again = Record(path, {"cores": 2}, {"steps": 5}, "times", "memory")
    assert again.find("times") == [{"method": "a", "seconds": 1.5}]
    assert again.find("memory") == []
    assert again.data["figures"] == [["what", "5 × as much"]]
    assert list(path.parent.iterdir()) == [path]


def test_a_measurement_is_made_once(path: Path) -> None:
    made: list[float] = []

    def measure() -> dict[str, Any]:
        made.append(0.5)
        return {"seconds": made[-1]}

    for _ in range(2):
        record = Record(path, {}, {}, "times")
        for steps in (4, 8):
            cell = record.ensure("times", {"method": "a", "steps": steps}, measure)
            assert cell == {"method": "a", "steps": steps, "seconds": 0.5}
    assert len(made) == 2
    assert record.find("times", steps=8) == [{"method": "a", "steps": 8, "seconds": 0.5}]


def test_a_measurement_takes_the_place_of_the_same_one_only(path: Path) -> None:
    record = Record(path, {}, {}, "cells")
    for method in ("a", "b"):
        record.add("cells", method=method, status="failed")
    record.replace("cells", {"method": "a"}, {"method": "a", "status": "done"})
    kept = Record(path, {}, {}, "cells").data["cells"]
    assert kept == [{"method": "b", "status": "failed"}, {"method": "a", "status": "done"}]


def test_a_file_has_a_measurement_on_a_line(path: Path) -> None:
    record = Record(path, {"cores": 2}, {}, "times", "memory")
    record.add("times", method="a", errors={"x": 1.0})
    record.add("times", method="é", errors={"x": 2.0})
    text = path.read_text()
    assert json.loads(text) == record.data
    assert [line for line in text.splitlines() if "method" in line] == [
        '{"method": "a", "errors": {"x": 1.0}},',
        '{"method": "é", "errors": {"x": 2.0}}',
    ]


@pytest.mark.parametrize(
    ("machine", "settings", "named"),
    [({"cores": 4}, {"steps": 5}, "cores"), ({"cores": 2}, {"steps": 6}, "steps")],
)
def test_figures_of_another_machine_or_setting_are_not_mixed_in(
    path: Path, machine: dict[str, Any], settings: dict[str, Any], named: str
) -> None:
    Record(path, {"cores": 2}, {"steps": 5}).save()
    before = path.read_text()
    with pytest.raises(SystemExit, match=rf"r\.json was measured with other {named}: delete it"):
        Record(path, machine, settings)
    assert path.read_text() == before


def test_a_write_that_breaks_off_leaves_the_old_file(path: Path) -> None:
    record = Record(path, {}, {}, "times")
    record.add("times", seconds=1.0)
    before = path.read_text()
    with pytest.raises(TypeError):
        record.add("times", seconds=object())
    assert path.read_text() == before
