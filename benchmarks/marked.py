"""What stands on a page between ``<!-- name -->`` and ``<!-- /name -->``: written from results, never by hand."""

from __future__ import annotations

from collections.abc import Mapping


def marked(text: str, name: str) -> str:
    """What stands between a page's markers of that name.

    Raises:
        ValueError: they are not there once each, in order.
    """
    start, end = _markers(name)
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"the page needs one line {start.strip()} and one line {end.strip()}, in this order")
    return text.split(start)[1].split(end)[0]


def rewritten(text: str, blocks: Mapping[str, str]) -> str:
    """The page with other text between its markers, by name.

    Raises:
        ValueError: as :func:`marked`.
    """
    for name, block in blocks.items():
        start, end = _markers(name)
        text = text.replace(start + marked(text, name) + end, start + block + end)
    return text


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
