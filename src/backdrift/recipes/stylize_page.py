"""What a page of stylisation shows: the reference; pictures before and after, of noises and prompts seen and unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..descent import Example, Options, Variable
from ..descent.measure import Measure
from ..run import Run
from .references import centre
from .stylize_loss import StyleAndContent, originals_of
from .stylize_originals import FILE
from .stylize_weights import applied

REFERENCE = "reference"
SEEN = "seen noises and prompts"


@dataclass(frozen=True)
class Shown:
    """Examples that were not trained on, and how to sample them."""

    examples: list[Example]
    options: Options


def shown_already(run: Run) -> bool:
    """Whether a finished run has its pictures."""
    return REFERENCE in run.record["pictures"]


def show(
    run: Run,
    pipe: Any,
    variable: Variable,
    loss: StyleAndContent,
    reference: Tensor,
    name: str,
    examples: Sequence[Example],
    flagged: Tensor,
    groups: Mapping[str, Shown],
    shown: int,
) -> None:
    """Make the unseen pictures with the old and the new weights, and write pictures and figures of all groups.

    Args:
        examples: those trained on, with their originals as targets, and ``flagged`` of each by a safety checker.
        groups: what else is shown, by name.
        shown: how many of the examples.
    """
    best = run.best
    chosen = _spread(len(examples), shown)
    before, after, flags = (
        {SEEN: originals_of(examples)},
        {SEEN: best.images},
        {SEEN: bool(flagged[chosen].any())},
    )
    with run.writing():
        for group, of in groups.items():
            before[group], flags[group] = _sample(run, pipe, Variable(), of)
        with applied(pipe, variable, best.tensors, examples, run.record["seed"]):
            for group, of in groups.items():
                after[group], more = _sample(run, pipe, variable, of)
                flags[group] = flags[group] or more
        for group in before:
            run.record["figures"] |= _figures(loss, group, before[group], after[group])
        _draw(run, reference, name, {g: (before[g], after[g]) for g in before}, chosen, flags, groups)
        run.record["files"]["originals"] = {
            "path": FILE,
            "caption": "what the untouched weights made of the prompts and noises that were trained on: images",
        }
        run.finish(run.record["status"], run.record["message"])


def _sample(run: Run, pipe: Any, variable: Variable, of: Shown) -> tuple[Tensor, bool]:
    """Pictures (n, 3, H, W), on the CPU, and whether the safety checker flagged any."""
    measure = Measure(pipe, variable, of.options, None, run.record["stats"])
    batch = range(len(of.examples))
    found = measure(of.examples, batch, lambda images, _: images.flatten(1).mean(1), gradient=False)
    return found.images.float().cpu(), bool(found.flagged.any())


@torch.no_grad()
def _figures(loss: StyleAndContent, group: str, before: Tensor, after: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    for when, images in (("before", before), ("after", after)):
        pairs = zip(images.split(8), before.split(8), strict=True)
        terms = [loss.terms(made.cpu(), original) for made, original in pairs]
        found[f"style, {group}: {when}"] = torch.cat([style for style, _ in terms]).mean().item()
        if when == "after":
            found[f"content, {group}: {when}"] = torch.cat([content for _, content in terms]).mean().item()
    return found


def _draw(
    run: Run,
    reference: Tensor,
    name: str,
    pictures: Mapping[str, tuple[Tensor, Tensor]],
    chosen: list[int],
    flags: Mapping[str, bool],
    groups: Mapping[str, Shown],
) -> None:
    """The page's pictures in place of those that were shown while it ran."""
    for entry in run.record["pictures"].values():
        (run.folder / entry["path"]).unlink(missing_ok=True)
    run.record["pictures"] = {}
    run.save_picture(REFERENCE, centre(reference), f"the style to take: {name}")
    tensors: dict[str, Tensor] = {}
    for group, (before, after) in pictures.items():
        rows = (before[chosen], after[chosen].to(before)) if group == SEEN else (before, after)
        what = f"{group}; above before, below after"
        if group in groups and not {e.prompt for e in groups[group].examples} & set(run.record["prompt"]):
            what += ": " + "; ".join(dict.fromkeys(e.prompt for e in groups[group].examples))
        run.save_picture(group, above(*rows), what, flagged=flags[group])
        tensors |= {f"{group}: before": rows[0], f"{group}: after": rows[1]}
    run.save_tensors("pictures", tensors)


def above(first: Tensor, second: Tensor, gap: int = 2) -> Tensor:
    """Two rows of pictures (n, 3, H, W) as one, (n, 3, 2H + gap, W), white in between."""
    white = first.new_ones(len(first), 3, gap, first.shape[3])
    return torch.cat([first, white, second], 2)


def _spread(n: int, count: int) -> list[int]:
    """``count`` of ``n`` places, evenly spread; all where there are fewer."""
    count = min(n, count)
    return [round((i + 0.5) * n / count - 0.5) for i in range(count)]
