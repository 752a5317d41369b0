"""Numbers as people read them."""

from __future__ import annotations

from typing import Any

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any, digits: int = 4) -> str:
    """``digits`` significant digits; thousands in groups; ``–`` for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")  # narrow no-break space, as ISO 80000 groups digits
    if isinstance(value, float):
        if value == int(value) and abs(value) < 1e4:
            return str(int(value)).replace("-", "−")
        if 1e4 <= abs(value) < 1e6:
            return grouped(value)
        text = f"{value:.{digits}g}"
        if "e" in text:
            mantissa, exponent = text.split("e")
            return f"{mantissa}·10{str(int(exponent)).translate(RAISED)}".replace("-", "−")
        return text.replace("-", "−")
    return str(value)


def grouped(value: float, decimals: int = 0) -> str:
    """``17 208``, with so many decimals."""
    return f"{value:,.{decimals}f}".replace(",", "\u202f").replace("-", "−")  # a space as above


def tick(value: float) -> str:
    """A number at an axis: as :func:`number`, and a power of ten that is far from 1 as ``10⁻⁶``."""
    return number(float(value)).removeprefix("1·")


def seconds(value: float | None) -> str:
    """``0.42 s``, ``38 s``, ``2 min 05 s``, ``1 h 12 min``."""
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    if round(value) < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float | None) -> str:
    """Bytes in binary units, three significant digits."""
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"


def change(before: float | None, after: float | None) -> str:
    """The relative change, ``−93 %``; empty where it says nothing (a start at or below zero)."""
    if before is None or after is None or before <= 0 or after < 0:
        return ""
    percent = 100 * (after - before) / before
    digits = 1 if abs(percent) >= 99 and after > 0 else 0
    return f"{percent:+.{digits}f} %".replace("-", "−")
