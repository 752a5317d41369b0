"""The table of the deterministic solvers: what the tests measure, and what docs/solvers.md prints.

python tests/solver_table.py            # print it; exit status 1 if the page says anything else
python tests/solver_table.py --write    # put it into the page
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import backdrift.solvers as package
from backdrift.forms import FORMS
from backdrift.solvers import (
    DEIS,
    EDICT,
    RK4,
    AdamsBashforth,
    AdaptiveDormandPrince,
    BogackiShampine,
    DormandPrince,
    DPMSolver,
    DPMSolverPP,
    Euler,
    ExplicitRungeKutta,
    Heun,
    McCallumFoster,
    Midpoint,
    Ralston,
    ReversibleHeun,
    Solver,
    StochasticSolver,
    ThreeEighths,
)
from problems import SCHEDULES
from side_by_side import PROBLEMS, QUANTITIES, error_at, known, run, slopes

PAGE = Path(__file__).parent.parent / "docs" / "solvers.md"

Case = tuple[str, str]  # schedule and form


@dataclass(frozen=True)
class Row:
    """A solver, and where its order is measured.

    Attributes:
        steps: the slope is that between this many steps and twice as many.
        gaussian: its order on Gaussian data that spread like the root of a quadratic of the clock, if that is another.
        only: the cases in which it is measured; None for all that make sense.
        problems: on which of the two kinds of data.
    """

    solver: Solver
    steps: int
    gaussian: int | None = None
    only: tuple[Case, ...] | None = None
    problems: tuple[str, ...] = PROBLEMS

    @property
    def name(self) -> str:
        return repr(self.solver)

    @property
    def sensible(self) -> list[Case]:
        """The cases that make sense: with alpha = 1 the original form is the exponential one under another name."""
        return [
            (schedule, form)
            for schedule in SCHEDULES
            for form in FORMS
            if form in self.solver.forms and not (schedule == "edm" and form == "original")
        ]

    @property
    def cases(self) -> list[Case]:
        """Those whose slopes are measured. The others are the same runs as another case (see :func:`as_linear`)."""
        if self.only is not None:
            return list(self.only)
        return [case for case in self.sensible if not as_linear(self.solver, *case)]

    def order_on(self, problem: str, schedule: str, form: str) -> int:
        quadratic = problem == "Gaussian" and (form != "original" or schedule == "flow")
        return self.gaussian if self.gaussian and quadratic else self.solver.order


def as_linear(solver: Solver, schedule: str, form: str) -> bool:
    """Whether a run is the same as on the linear schedule.

    On the exponential and on the data form the equation and the nodes depend on the schedule through rho alone, and so
    does a solver that does not look at t; "edm" is measured apart for its other grid.
    """
    looks_at_t = isinstance(solver, DEIS) and solver.clock == "t"
    return form != "original" and schedule not in ("linear", "edm") and not looks_at_t


# Pairs of the methods above: what is measured of those need not be measured of these on every schedule.
REPRESENTATIVE = (("linear", "original"), ("linear", "exponential"), ("linear", "data"), ("flow", "original"))

ROWS = [
    Row(Euler(), 20),
    # For a spread of sqrt(q), dY/ds = f (Y - mean) with f = q'/(2q). Where q is a quadratic this method's local error,
    # h³ (f''/24 + f f'/4 + f³/6), is 0.
    Row(Midpoint(), 16, gaussian=3),
    Row(Heun(), 16),
    Row(Ralston(), 16),
    Row(BogackiShampine(), 20),
    Row(RK4(), 12),
    Row(ThreeEighths(), 18),
    # Its leading error is so small that elsewhere rounding comes before the asymptotic range; its order is that of
    # its tableau (test_order_conditions).
    Row(DormandPrince(), 40, only=(("linear", "exponential"),), problems=("mixture",)),
    Row(AdamsBashforth(2), 24),
    Row(AdamsBashforth(3), 30),
    Row(AdamsBashforth(4), 50),
    # Their error is their first step's, of order 2, as soon as that of the others is below it.
    Row(AdamsBashforth(2, start="rising"), 24, only=REPRESENTATIVE),
    Row(AdamsBashforth(4, start="rising"), 100, only=REPRESENTATIVE),
    Row(DEIS(3, "lam", start="rising"), 100, only=(("linear", "exponential"),)),
    Row(DEIS(2), 24),
    Row(DEIS(3), 30),
    Row(DEIS(4), 50),
    Row(DEIS(2, "lam"), 24),
    Row(DEIS(3, "lam"), 30),
    Row(DEIS(4, "lam"), 50),
    Row(DPMSolver(2), 16),
    Row(DPMSolver(3), 16),
    Row(DPMSolverPP(), 16),
    Row(McCallumFoster(), 16, only=REPRESENTATIVE),
    Row(ReversibleHeun(), 16, only=REPRESENTATIVE),
    Row(EDICT(), 40, only=REPRESENTATIVE),
]
"""Order 1 of AdamsBashforth and of DEIS is Euler's method (test_solvers.py)."""


def newcomers() -> list[Row]:
    """Solvers that the package exports and the table does not have: measured without being listed."""
    listed = {type(row.solver) for row in ROWS} | {ExplicitRungeKutta, AdaptiveDormandPrince}
    exported = (getattr(package, name) for name in package.__all__)
    kinds = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, Solver)]
    found = [
        kind()
        for kind in kinds
        # Stochastic ones are measured along their noise, in test_stochastic.py.
        if kind not in listed and not inspect.isabstract(kind) and not issubclass(kind, StochasticSolver)
    ]
    return [Row(solver, {1: 40, 2: 24, 3: 30}.get(solver.order, 40)) for solver in found]


ROWS += newcomers()
CASES = [(row, schedule, form) for row in ROWS for schedule, form in row.cases]
SAME = [
    (row, schedule, form)
    for row in ROWS
    for schedule, form in row.sensible
    if as_linear(row.solver, schedule, form)
]


@cache
def measured(row: Row, schedule: str, form: str) -> dict[tuple[str, str], float]:
    """The slopes by problem and quantity."""
    coarse, fine = (run(schedule, form, row.solver, steps) for steps in (row.steps, 2 * row.steps))
    found = zip(PROBLEMS, slopes(coarse, fine, known(schedule)), strict=True)
    return {
        (problem, quantity): slope
        for problem, values in found
        if problem in row.problems
        for quantity, slope in zip(QUANTITIES, values, strict=True)
    }


def sentence(solver: Solver) -> str:
    """The first sentence of a solver's docstring, as plain text."""
    text = " ".join((type(solver).__doc__ or "").split("\n\n")[0].split())
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text).replace("``", "`")
    return re.split(r"\. (?=[A-Z])|\.$", text)[0]


def evaluations(solver: Solver) -> str:
    """Evaluations of a step; the first steps' apart where they differ."""
    steady = solver.evaluations(50)
    start = [solver.evaluations(i) for i in range(50) if solver.evaluations(i) != steady]
    if not start:
        return str(steady)
    return f"{steady}; {start[0]} in the first" + (f" {len(start)}" if len(start) > 1 else "")


def solver_table() -> str:
    lines = ["| solver | order | evaluations a step | forms | |", "|---|---|---|---|---|"]
    before = ""
    for row in ROWS:
        solver, text = row.solver, sentence(row.solver)
        forms = "all" if tuple(solver.forms) == FORMS else ", ".join(solver.forms)
        shown, before = "" if text == before else text, text
        lines.append(f"| `{row.name}` | {solver.order} | {evaluations(solver)} | {forms} | {shown} |")
    return "\n".join(lines)


def slope_table() -> str:
    lines = [
        "| solver | form | N | " + " | ".join(SCHEDULES) + " |",
        "|---|---|---|" + "---|" * len(SCHEDULES),
    ]
    for row in ROWS:
        for form in FORMS:
            names = {schedule for schedule, other in row.cases if other == form}
            if not names:
                continue
            cells = []
            for schedule in SCHEDULES:
                values = measured(row, schedule, form).values() if schedule in names else None
                same = (row, schedule, form) in SAME
                cells.append(
                    f"{min(values):.2f}–{max(values):.2f}" if values else "as linear" if same else ""
                )
            lines.append(f"| `{row.name}` | {form} | {row.steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def work_table() -> str:
    budgets = (10, 20, 40, 80)
    lines = ["| solver | " + " | ".join(map(str, budgets)) + " |", "|---|" + "---|" * len(budgets)]
    for row in ROWS:
        errors = [error_at(row.solver, budget) for budget in budgets]
        cells = [f"{e.state:.0e} / {e.gradient:.0e}" if e else "" for e in errors]
        lines.append(f"| `{row.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


BLOCKS = {"solvers": solver_table, "slopes": slope_table, "work": work_table}


def marked(text: str, name: str) -> str:
    """What stands between the page's markers of that name.

    Raises:
        ValueError: they are not there once each.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the page needs one line {start.strip()} and one line {end.strip()}")
    return text.split(start)[1].split(end)[0]


def main(arguments: list[str]) -> int:
    """Print the tables, or write them."""
    text, same = PAGE.read_text(), True
    for name, make in BLOCKS.items():
        found, wanted = marked(text, name), make() + "\n"
        same = same and found == wanted
        text = text.replace(f"<!-- {name} -->\n{found}", f"<!-- {name} -->\n{wanted}")
        if "--write" not in arguments:
            print(wanted)
    if "--write" in arguments:
        PAGE.write_text(text)
        return 0
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
