"""The end of a guided application: pictures scored, rows and strips drawn, the table and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pictures import side_by_side
from ..run import Run
from .guided_variants import N_STEP, ONE_STEP, UNGUIDED

if TYPE_CHECKING:
    from .guiding import Task

ORDER = (UNGUIDED, ONE_STEP, N_STEP)
STYLE = {UNGUIDED: "faint", ONE_STEP: "second", N_STEP: "main"}
COLUMNS = 12  # most estimates of a strip, the finished picture apart


def conclude(run: Run, task: Task) -> None:
    """Score the pictures of all three ways, draw them, and finish the run."""
    made = {name: run.tensors(name) for name in ORDER}
    record, variants = run.record, run.record["variants"]
    names = ["loss", *(judge.name for judge in task.judges)]
    for name in ORDER:
        variants[name]["scores"] = dict(
            zip(names, score(task, made[name]["images"], record["prompt"]), strict=True)
        )
    lower = [True, *(judge.lower for judge in task.judges)]
    record["comparison"] = {
        "scores": [{"name": n, "lower": low} for n, low in zip(names, lower, strict=True)],
        "rows": [row(called(name, variants[name]), variants[name]) for name in ORDER],
        "note": NOTE[shared if isinstance(shared := record["settings"]["one_step"], str) else "given"],
    }
    record["curves"] = curves(variants, record["settings"]["num_inference_steps"])
    _draw(run, task, made)
    record["figures"] |= headline(variants)
    for count in ("network_calls", "redone", "vjps"):
        record["stats"][count] = sum(entry[count] for entry in variants.values())
    record["stats"]["seconds"] = sum(entry["seconds"] for entry in variants.values())
    run.finish()


_GUIDED = "The loss is what the pictures were guided by; the other scores guided nothing. "
NOTE = {
    "seconds": _GUIDED + "One-step guidance has as many tries of each guided step as take n-step guidance's time, "
    "measured on a run with one try of each.",
    "calls": _GUIDED + "One-step guidance has as many tries of each guided step as make the network calls and "
    "vector–Jacobian products (VJPs) of n-step guidance.",
    "given": _GUIDED + "How many tries one-step guidance has was set by hand.",
}  # fmt: skip


@torch.no_grad()
def score(task: Task, images: Tensor, prompts: Sequence[str]) -> list[list[float]]:
    """The loss and what each judge says, (N,) each, of finished pictures clamped to [0, 1]."""
    seen = images.float().clamp(0, 1)
    found = [task.loss(seen, prompts), *(judge.score(seen, prompts) for judge in task.judges)]
    return [values.detach().cpu().double().tolist() for values in found]


def called(name: str, facts: Mapping[str, Any]) -> str:
    """What people call a way of sampling."""
    if name == UNGUIDED:
        return "unguided"
    if name == ONE_STEP:
        return "one-step (n = 1)"
    return "adaptive n" if facts["n"] == "adaptive" else f"n = {facts['n']}"


def row(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table of scores and costs."""
    guided = [step["attempts"] for step in facts["steps"]] if facts["n"] is not None else []
    return {
        "name": name,
        "scores": list(facts["scores"].values()),
        "tries": None if not guided else [min(guided), max(guided)],
        **{k: facts[k] for k in ("network_calls", "redone", "vjps", "decodes", "seconds")},
    }


def curves(variants: Mapping[str, Any], total: int) -> dict[str, Any]:
    """The mean loss of the estimates at the guided steps, and at the end that of the finished pictures."""
    lines = []
    for name in ORDER:
        facts = variants[name]
        points = [[step["index"], _mean(step["loss"])] for step in facts["steps"]]
        points.append([total, _mean(facts["scores"]["loss"])])
        lines.append({"name": called(name, facts), "style": STYLE[name], "points": points})
    return {
        "label": "loss",
        "across": "step",
        "lines": lines,
        "note": "Mean over the samples. At the guided steps: of the estimate that guided the step's last attempt, in "
        "as many steps as it was made with (unguided: in one). At the end: of the finished pictures.",
    }


def headline(variants: Mapping[str, Any]) -> dict[str, Any]:
    """In how many samples the loss of n steps is below that of one."""
    ours, theirs = (variants[name]["scores"]["loss"] for name in (N_STEP, ONE_STEP))
    below = sum(a < b for a, b in zip(ours, theirs, strict=True))
    name = f"loss with {called(N_STEP, variants[N_STEP])} below one-step guidance's"
    return {name: f"{below} of {len(ours)} samples"}


def _draw(run: Run, task: Task, made: Mapping[str, Mapping[str, Tensor]]) -> None:
    variants = run.record["variants"]
    if task.reference is not None:
        run.save_picture("reference", *task.reference)
    for name in ORDER:
        facts = variants[name]
        caption = f"{called(name, facts)}: loss {_short(_mean(facts['scores']['loss']))}"
        run.save_picture(name, made[name]["images"], caption, flagged=facts["flagged"])
    for name in ORDER:
        if "strip" in made[name]:
            for i, strip in enumerate(made[name]["strip"]):
                shown, steps = along(strip, [step["index"] for step in variants[name]["steps"]])
                last = _fit(made[name]["images"][i], strip.shape[-2:])
                caption = (
                    f"{called(name, variants[name])}, sample {i}: estimates at steps {', '.join(map(str, steps))}, "
                    "and the finished picture"
                )
                run.save_picture(
                    f"{name} strip {i}", side_by_side(torch.cat([shown, last[None]])), caption,
                    flagged=variants[name]["flagged"],
                )  # fmt: skip


def along(strip: Tensor, steps: Sequence[int]) -> tuple[Tensor, list[int]]:
    """At most :data:`COLUMNS` of the K estimates (K, 3, h, w), evenly spread with both ends, in [0, 1]; their steps."""
    count = min(COLUMNS, len(strip))
    chosen = torch.linspace(0, len(strip) - 1, count).round().long().tolist()
    return strip[chosen].float() / 255, [steps[i] for i in chosen]


def _fit(image: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image.float()
    return torch.nn.functional.interpolate(
        image[None].float(), size=tuple(size), mode="bilinear", antialias=True
    )[0]


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
