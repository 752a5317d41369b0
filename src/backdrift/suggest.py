"""“Did you mean …?”: the closest of the allowed names, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(given: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` (with its leading space) for the allowed name nearest to ``given``, or ``""``."""
    names = {name.lower(): name for name in allowed}
    found = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.55)
    return f" Did you mean {names[found[0]]!r}?" if found else ""
