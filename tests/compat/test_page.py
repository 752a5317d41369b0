"""The page of the matrix is what the tests say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import page
from traps import TRAPS


def test_the_page_is_up_to_date() -> None:
    found = subprocess.run(
        [sys.executable, str(Path(page.__file__))], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_every_row_has_a_test_and_every_test_module_a_place() -> None:
    here = Path(page.__file__).parent
    assert {path.stem for path in here.glob("test_*.py")} - {"test_page"} == set(page.MODULES)
    page.render()  # imports every test module, also where this file is run by itself
    assert all(trap.claims for trap in TRAPS)
