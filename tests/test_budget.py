"""Sizes and memory plans as users write them."""

from __future__ import annotations

from typing import Any

import pytest

from backdrift.budget import format_size, parse_size
from backdrift.errors import BackdriftError, BudgetError
from backdrift.memory import MemoryPlan


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("2k", 2048),
        ("1_000", 1000),
        ("7b", 7),
        (12345, 12345),
        (16e9, 16 * 10**9),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "bad", ["", "much", "6 GiBi", "-3MiB", "0", 0, -1, True, None, 2.5, float("inf"), "1e9", "MiB"]
)
def test_what_is_no_size_is_refused(bad: Any) -> None:
    with pytest.raises(BudgetError, match="allowed"):
        MemoryPlan.parse(bad)
    with pytest.raises(BudgetError, match="allowed: a number of bytes"):
        parse_size("min")  # a plan, and no size
    assert issubclass(BudgetError, BackdriftError)
    assert issubclass(BudgetError, ValueError)


def test_a_formatted_size_can_be_given_back() -> None:
    text = format_size(3 * 2**30 + 17)
    assert text.startswith("3.0 GiB")
    assert parse_size(int(text.split("(")[1].split(" ")[0])) == 3 * 2**30 + 17


def test_plans_are_read() -> None:
    assert MemoryPlan.parse("min").mode == "min"
    assert MemoryPlan.parse("1KiB") == MemoryPlan("bytes", 1024)
    assert MemoryPlan.parse(MemoryPlan("max")) == MemoryPlan("max")
