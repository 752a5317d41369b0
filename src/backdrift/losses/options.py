"""An option in parentheses at the end of a loss's text: ``class:seven (logit)``, ``style:ref.png (block 2)``.

It is how a loss that was made in Python with such an option writes itself into a record, so that a record's text
makes the same loss again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_OPTION = re.compile(r"(.*?)\s*\(\s*([\w-]+)\s*\)$", re.DOTALL)
_BLOCK = re.compile(r"(.*?)\s*\(\s*block\s+(\d+)\s*\)$", re.DOTALL)


def split_option(text: str, allowed: Sequence[str]) -> tuple[str, str | None]:
    """``"text (word)"`` -> ``("text", "word")`` where the word is allowed, else ``(text, None)``.

    Any other word in parentheses is part of the text: a file may be called ``picture (copy)``.
    """
    found = _OPTION.match(text)
    return (found[1], found[2]) if found and found[2] in allowed else (text, None)


def unread_option(text: str) -> str | None:
    """The word in parentheses at the end of ``text``, or None."""
    found = _OPTION.match(text)
    return found[2] if found else None


def split_block(text: str) -> tuple[str, int | None]:
    """``"text (block 2)"`` -> ``("text", 2)``; ``(text, None)`` without it."""
    found = _BLOCK.match(text)
    return (found[1], int(found[2])) if found else (text, None)
