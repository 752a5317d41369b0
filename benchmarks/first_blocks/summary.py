"""What the results of the blocks say, in rows."""

from __future__ import annotations

from collections import Counter
from typing import Any


def rows(cells: list[dict[str, Any]]) -> list[list[str]]:
    """One row a block: its page, what became of one line, and of the fifteen."""
    return [[cell["page"], _words(cell["backdrift"]), _words(cell["fifteen"])] for cell in cells]


def figures(cells: list[dict[str, Any]]) -> list[list[str]]:
    """The README's row."""
    ours = sum(cell["backdrift"]["status"] == "verified" for cell in cells)
    theirs = Counter(cell["fifteen"]["status"] for cell in cells)
    others = [f"{n} {_KINDS[status]}" for status, n in theirs.items() if status != "verified"]
    fifteen = f"{theirs['verified']} of {len(cells)}" + (f" ({', '.join(others)})" if others else "")
    return [
        [
            f"{len(cells)} first code blocks of model pages, one line added: finite, verified gradient by the noise",
            f"{ours} of {len(cells)}; with the fifteen lines of `torch.utils.checkpoint` below: {fifteen}",
        ]
    ]


_KINDS = {
    "raises": "raise",
    "no gradient": "without a gradient",
    "not finite": "not finite",
    "wrong": "wrong",
    "unverified": "unverified",
}


def _words(verdict: dict[str, Any]) -> str:
    words = verdict["status"]
    if verdict.get("bits"):
        words += ", plain autograd's bits"
    elif "error" in verdict:
        words += f", {verdict['error']:.1e} off"
    return f"{words}: {verdict['says']}" if verdict.get("says") else words
