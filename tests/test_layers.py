"""A room imports only from rooms above it: the layer rule, read from every import statement of the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import backdrift

PACKAGE = Path(backdrift.__file__).parent

# Every module or package directly under backdrift, from the top down. A line's rooms are on one floor and do not
# import each other. A dotted name is a part of a room that stands higher than the room itself.
FLOORS: list[set[str]] = [
    {"accelerators"},
    {"_version", "errors", "nests", "parking", "residence", "stats", "suggest", "versions"},
    {"ambient", "budget", "carried", "curves", "files", "predictions", "scalars", "through"},
    {"schedules", "pictures", "trace", "weights", "repeats"},
    {"conditioning"},
    {"grids", "denoiser", "noises"},
    {"host"},
    {"forms"},
    {"solvers"},
    {"integrate"},
    {"holdings", "frames", "blocks"},
    {"passes", "shortage"},
    {"memory"},
    {"planning"},
    {"gradients"},
    {"sampling"},
    {"cycle", "encoding"},
    {"pipelines.classifier", "pipelines.digits"},
    {"pipelines.assets"},  # the shipped networks: losses score with them
    {"losses"},
    {"pipelines"},
    {"guidance"},
    {"progress", "record"},
    {"run"},
    {"descent"},
    {"optimization"},
    {"recipes"},
    {"report"},
    {"verification"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, floor in enumerate(FLOORS) for room in floor}


def room_of(parts: list[str]) -> str:
    """The room of a dotted name inside the package: the longest prefix that has a floor, else its first part."""
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in RANK:
            return ".".join(parts[:length])
    return parts[0] if parts else ""


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of another part of the package, those inside functions included.

    What is imported for type checkers only is no dependency.
    """
    package = ["backdrift", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "backdrift" and node not in typing_only:
                yield node.lineno, room_of(name[1:])


def violations(path: Path) -> list[str]:
    room, found = room_of(list(path.relative_to(PACKAGE).with_suffix("").parts)), []
    for line, other in rooms_imported(path):
        where = f"{path.relative_to(PACKAGE)}:{line}"
        # The command line is a user of the public names like any other.
        if other in ("__version__", room) or (other == "" and room == "cli"):
            continue
        if other not in RANK:
            found.append(f"{where} imports {other or 'the whole package'!r}, which is no room")
        elif RANK[other] >= RANK[room]:
            found.append(f"{where}: {room} imports {other}, which is not above it")
    return found


def sources() -> list[Path]:
    return [
        p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py" and "assets" not in p.parts
    ]


def test_every_room_has_its_floor() -> None:
    missing = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in sources()} - set(RANK)
    assert not missing, f"add {sorted(missing)} to FLOORS, and to the table of rooms"


def test_rooms_import_only_from_above() -> None:
    found = [v for path in sources() for v in violations(path)]
    assert not found, "\n".join(found)


def test_the_rule_sees_lazy_relative_and_absolute_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "schedules.py"
    copy.write_text(
        "from .errors import InputError\n"
        "def f():\n    from .sampling import sample\n"
        "import backdrift.cli\n"
        "from backdrift import optimization\n"
        "import backdrift\n"
        "if TYPE_CHECKING:\n    from .gradients import Exact\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert sorted(rooms_imported(copy)) == [
        (1, "errors"),
        (3, "sampling"),
        (4, "cli"),
        (5, "optimization"),
        (6, ""),
    ]
    assert len(violations(copy)) == 4
