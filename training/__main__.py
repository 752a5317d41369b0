"""``python -m training all`` rebuilds every built-in asset; each part can be named alone, in this order.

``python -m training restore`` takes what ships as if it had been trained here, so that one network can be
trained on, or anew, without the others.
"""

from __future__ import annotations

import os
import sys

from .parts import EXTRA, PARTS

# Without these, glibc gives every large tensor back to the system and asks for it again: a third of the
# time on a CPU goes into page faults. They are read when a process starts, hence the exec below.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def main(names: list[str]) -> int:
    """Train the named parts in order; ``all`` means every one."""
    chosen = list(PARTS) if names == ["all"] else names
    unknown = [n for n in chosen if n not in PARTS | EXTRA]
    if unknown or not chosen:
        print(
            f"parts: {', '.join(PARTS | EXTRA)}, or all"
            + (f"; not known: {', '.join(unknown)}" if unknown else "")
        )
        return 2
    for name in chosen:
        (PARTS | EXTRA)[name]()
    return 0


if __name__ == "__main__":
    if not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "training", *sys.argv[1:]], {**os.environ, **MALLOC})
    raise SystemExit(main(sys.argv[1:]))
