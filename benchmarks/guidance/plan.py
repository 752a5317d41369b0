"""Which ways are compared on which cases, and how much each may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .bench import Bench
from .costs import Units, attempts_for, expected
from .search import settle
from .setting import Case
from .tasks import Task
from .ways import DOODL, FREEDOM, SAG, TFG, UNGUIDED, UNIVERSAL, Way

N = 4  # steps of SAG's estimate
ONCE, EQUAL, LEAST, PUBLISHED = "once", "equal seconds", "one step", "as published"
EDICT_STEPS = (
    50  # as published; with 30, p = 0.93 leaves the pair's states so far apart that pictures fall apart
)
DOODL_STEPS, DOODL_RATE = 50, 1.0  # of optimisation, as published
FEW = {PUBLISHED: 4}
"""On how many cases a group is measured at most: a published run of DOODL takes as long as some 50 of SAG."""
RULES = {
    "style": (UNIVERSAL, FREEDOM, TFG),
    "aesthetic": (FREEDOM, DOODL),
    "object": (FREEDOM, DOODL),
}
ABLATED = ("n", "subgrid", "range", "range, n = 1", "repeats", "n, equal seconds")
EQUAL_N = (1, 2, 3, 4, 6, 8, 10)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        way: its strength is 0 as long as it has not been settled.
        group: how its cost was fixed.
    """

    way: Way
    group: str

    @property
    def facts(self) -> dict[str, Any]:
        """For the results file."""
        return {"way": self.way.key, "group": self.group}


def ours(task: Task) -> Way:
    """SAG, each guided step once."""
    return Way(SAG, n=N, start=task.start, stop=task.stop)


def equalled(way: Way, total: int, units: Units, task: Task) -> Way:
    """A way with as many attempts as come nearest to SAG's seconds."""
    seconds = units.seconds(expected(ours(task), total))
    return replace(way, attempts=attempts_for(seconds, way, total, units))


def rows(task: Task, total: int, units: Units) -> list[Row]:
    """The rows of a task's table, in the order in which they are measured; strengths are yet to be settled."""
    found = [Row(Way(UNGUIDED), ONCE), Row(ours(task), ONCE)]
    singles = []
    for rule in RULES[task.name]:
        if rule == DOODL:
            way = equalled(Way(DOODL, n=EDICT_STEPS), total, units, task)
            found.append(Row(way, EQUAL if way.attempts > 1 else LEAST))
            singles.append(Row(Way(DOODL, w=DOODL_RATE, attempts=DOODL_STEPS, n=EDICT_STEPS), PUBLISHED))
            continue
        way = Way(rule, start=task.start, stop=task.stop)
        equal = equalled(way, total, units, task)
        found.append(Row(equal, EQUAL))
        if equal.attempts > 1.5 * len(way.guided(total)):  # else the same row again, nearly
            singles.append(Row(way, ONCE))
    return found + singles


def settled(bench: Bench, row: Row) -> Row:
    """The row with its strength."""
    if row.way.rule == UNGUIDED or row.group == PUBLISHED:
        return row
    return Row(replace(row.way, w=settle(bench, row.way)["w"]), row.group)


def compare(
    bench: Bench,
    units: Units,
    only: Sequence[str] = (),
    cases: int | None = None,
    rules: Sequence[str] = (),
) -> None:
    """Settle the strengths of a task's rows and measure all cells; what is there already is not measured again.

    Args:
        only: groups of rows; all if empty.
        rules: likewise.
        cases: the first so many.
    """
    total = bench.setting.steps
    found = []
    for row in rows(bench.task, total, units):
        wanted = (not only or row.group in only) and (not rules or row.way.rule in rules)
        if wanted or row.way.rule in (UNGUIDED, SAG):
            found.append(settled(bench, row))
            known = bench.results.data.get("rows", [])
            if found[-1].facts not in known:
                bench.results.note("rows", [*known, found[-1].facts])
    for place, case in enumerate(spread(bench.task.cases)[:cases]):
        for row in found:
            if place < FEW.get(row.group, place + 1):
                bench.cell(row.way, case)


def spread(cases: Sequence[Case]) -> list[Case]:
    """The same cases, so ordered that the first few differ in reference and prompt."""
    references, prompts = [list(dict.fromkeys(getattr(c, f) for c in cases)) for f in ("reference", "prompt")]
    if len(references) * len(prompts) != len(cases):
        prompts_of = {r: [c for c in cases if c.reference == r] for r in references}
        return [
            of[k]
            for k in range(max(map(len, prompts_of.values())))
            for of in prompts_of.values()
            if k < len(of)
        ]
    at = {(c.reference, c.prompt): c for c in cases}
    order = [(i, (i + shift) % len(prompts)) for shift in range(len(prompts)) for i in range(len(references))]
    return [at[references[i], prompts[j]] for i, j in order]


def variations(way: Way, total: int, units: Units, task: Task) -> dict[str, list[Way]]:
    """The ablations of SAG at its settled strength."""
    ranges = [replace(way, start=s, stop=round(s + 0.4, 1)) for s in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    attempts = len(way.guided(total))
    return {
        "n": [replace(way, n=n) for n in (1, 2, 3, 4, 5, 6, 8, 10)],
        "subgrid": [replace(way, subgrid=s) for s in ("paper", "uniform", "logsnr")],
        "range": ranges,
        "range, n = 1": [],  # filled by :func:`ablate`, from FreeDoM's own strength
        "repeats": [way] + [replace(way, attempts=k * attempts) for k in (2, 3)],
    }


def ablate(bench: Bench, units: Units, cases: int, kinds: Sequence[str] = ()) -> None:
    """SAG with one setting changed at a time, on the first so many cases."""
    total, task = bench.setting.steps, bench.task
    way = settled(bench, Row(ours(task), ONCE)).way
    found = variations(way, total, units, task)
    one = settled(
        bench, Row(equalled(Way(FREEDOM, start=task.start, stop=task.stop), total, units, task), EQUAL)
    ).way
    found["range, n = 1"] = [replace(one, start=r.start, stop=r.stop) for r in found["range"]]
    kinds = kinds or ABLATED
    known = bench.results.data.get("ablations", {}).get("n, equal seconds", [])
    found["n, equal seconds"] = [Way(**key) for key in known]
    if "n, equal seconds" in kinds:
        equal = [equalled(replace(way, n=n, w=0.0), total, units, task) for n in EQUAL_N if n != N]
        every = [way, *(settled(bench, Row(each, EQUAL)).way for each in equal)]
        found["n, equal seconds"] = sorted(every, key=lambda each: each.n)
    bench.results.note("ablations", {kind: [w.key for w in ways] for kind, ways in found.items()})
    bench.results.note("ablated cases", [c.key for c in spread(task.cases)[:cases]])
    for kind in kinds:
        for case in spread(task.cases)[:cases]:
            for variation in found[kind]:
                bench.cell(variation, case)
