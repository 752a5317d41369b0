"""What tests of several files here ask for."""

from __future__ import annotations

import pytest
from offloaded_runs import Watched


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """Those of the runs made in a test."""
    from backdrift.pipelines import offloaded

    made: list[Watched] = []
    monkeypatch.setattr(offloaded, "Turns", lambda device: Watched(device, made))
    return made
