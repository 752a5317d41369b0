"""Every solver's declared order is its measured one, for states and for gradients, on data with a known flow.

The cases are the table in solver_table.py, which docs/solvers.md prints.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from backdrift.solvers import Tableau
from side_by_side import SCHEDULES, SideBySide, by_torchdiffeq, ends, inputs, known, outcome, scaled_end
from solver_table import BLOCKS, CASES, PAGE, ROWS, SAME, Row, marked, measured

TABLEAUS = {
    row.name: (row.solver.tableau, row.solver.order) for row in ROWS if hasattr(row.solver, "tableau")
}


@pytest.mark.parametrize(
    ("row", "schedule", "form"), CASES, ids=[f"{row.name}-{schedule}-{form}" for row, schedule, form in CASES]
)
def test_declared_order_is_measured(row: Row, schedule: str, form: str) -> None:
    for (problem, quantity), slope in measured(row, schedule, form).items():
        assert abs(slope - row.order_on(problem, schedule, form)) <= 0.25, (problem, quantity, slope)


@pytest.mark.parametrize(
    ("row", "schedule", "form"), SAME, ids=[f"{row.name}-{schedule}-{form}" for row, schedule, form in SAME]
)
def test_a_run_depends_on_the_schedule_through_rho_alone(row: Row, schedule: str, form: str) -> None:
    """What is measured on the linear schedule holds on this one: the run ends at the same x/alpha, rounding apart."""
    ours, theirs = (scaled_end(name, form, row.solver) for name in (schedule, "linear"))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "flow"])
def test_the_two_known_answers_agree(name: str) -> None:
    """torchdiffeq's eighth-order method gives the closed form where there is one."""
    schedule = SCHEDULES[name]
    network, (x, cond) = SideBySide(schedule, "epsilon"), inputs(schedule)
    solved = outcome(by_torchdiffeq(schedule, network, x, cond, ends(schedule)), x, cond, network)[0]
    for one, other in zip(solved, known(name)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_the_page_says_what_is_measured() -> None:
    """docs/solvers.md is up to date; ``make orders`` writes it. Machines may differ in a figure's last digit."""
    text, figure = PAGE.read_text(), re.compile(r"\d\.\d\d|\de[+-]\d\d")
    for name, make in BLOCKS.items():
        found, wanted = marked(text, name), make() + "\n"
        assert figure.sub("", found) == figure.sub("", wanted)
        for a, b in zip(figure.findall(found), figure.findall(wanted), strict=True):
            close = abs(float(a) - float(b)) <= 0.03 if "." in a else 0.4 < float(a) / float(b) < 2.5
            assert close, (name, a, b)


# Rooted trees are tuples of their subtrees: () is the single node.
Tree = tuple["Tree", ...]


def trees(order: int) -> set[Tree]:
    """All rooted trees with that many nodes."""
    return set() if order < 1 else {tuple(sorted(forest)) for forest in _forests(order - 1, order - 1)}


def _forests(nodes: int, largest: int) -> Iterator[tuple[Tree, ...]]:
    """Sets of trees with that many nodes in all, none with more than ``largest``."""
    if nodes == 0:
        yield ()
    for size in range(min(nodes, largest), 0, -1):
        for tree, rest in itertools.product(sorted(trees(size)), list(_forests(nodes - size, size))):
            yield (tree, *rest)


def nodes(tree: Tree) -> int:
    return 1 + sum(map(nodes, tree))


def density(tree: Tree) -> int:
    return nodes(tree) * math.prod(map(density, tree))


def weight(tableau: Tableau, tree: Tree) -> Fraction:
    """Σ_i b_i Π over subtrees, in rational numbers."""
    b = [exact(w) for w in tableau.b]
    return sum((w * value for w, value in zip(b, inner(tableau, tree), strict=True)), Fraction(0))


def inner(tableau: Tableau, tree: Tree) -> list[Fraction]:
    values = [Fraction(1)] * len(tableau.b)
    for subtree in tree:
        below = inner(tableau, subtree)
        for i, row in enumerate(tableau.a):
            values[i] *= sum((exact(w) * below[j] for j, w in enumerate(row)), Fraction(0))
    return values


def exact(value: float) -> Fraction:
    """The rational number a coefficient stands for."""
    return Fraction(value).limit_denominator(100_000)


def test_trees_are_counted_right() -> None:
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("name", TABLEAUS)
def test_order_conditions(name: str) -> None:
    """Butcher's: Σ b_i Φ_i(tree) = 1/density(tree) for rooted trees up to the order, not for all of the next."""
    tableau, order = TABLEAUS[name]
    for size in range(1, order + 1):
        for tree in trees(size):
            assert weight(tableau, tree) == Fraction(1, density(tree)), tree
    assert any(weight(tableau, tree) != Fraction(1, density(tree)) for tree in trees(order + 1))
