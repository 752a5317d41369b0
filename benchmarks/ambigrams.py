"""How often an ambigram succeeds: the gradient through the whole run beside one-step guidance, fairly.

*Fair* means: as many network calls for each picture, counted forward and back (one-step guidance also decodes at
every guided step, which is not counted against it); one-step guidance keeps the best of all the tries that fit;
its settings are those with which most pictures succeed on seeds that are not tested; and success is told by a judge
that was in nobody's loss (``training/judge.py``) together with a rule for clean pictures (``clean.py``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training.judge import judge
from training.scenes import DIGITS

import backdrift as bd
from backdrift.descent.randomness import seeded
from backdrift.losses import Ambigram, Classifier
from backdrift.recipes.ambigram import CALLS, Jittered, ambigram
from backdrift.recipes.one_step import OneStep, guide_one_step
from backdrift.recipes.reading import reads_both_ways

from .clean import NAMES, Usual

TUNING, TESTED, PLAIN = tuple(range(100, 106)), tuple(range(20)), range(200, 264)
PAIRS = (("four", "seven"), ("three", "five"), ("two", "seven"), ("five", "four"))
SETTINGS = tuple(
    OneStep(strength, start, stop, repeats)
    for repeats, strengths in ((1, (0.2, 0.5, 1.0, 2.0)), (3, (0.2, 0.5)))
    for start, stop in ((0.3, 0.7), (0.0, 1.0))
    for strength in strengths
)
DRAWS = 2
CALL: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 2.0}
STEPS = 40
RULE = (
    "the pair in which most pictures of the gradient through the whole run succeed on the tuning seeds; among equals "
    "the one in which fewest of one-step guidance at its best settings do; among these the first of the list"
)


class Success:
    """Whether pictures of one pair succeed: read both ways by the independent judge, and clean."""

    def __init__(self, pipe: Any, pair: tuple[str, str]) -> None:
        self.reader = Ambigram(*pair, Classifier(judge(), DIGITS))
        noise = torch.cat([bd.noise(pipe, seed=seed) for seed in PLAIN])
        with torch.no_grad():
            plain = [
                pipe([prompt_of(pair)] * len(part), latents=part, output_type="pt", **CALL).images
                for part in noise.split(16)
            ]
        self.usual = Usual.of(torch.cat(plain))

    def __call__(self, pictures: Tensor) -> dict[str, list[bool]]:
        reads, clean = reads_both_ways(pictures, self.reader), self.usual.clean(pictures)
        return {"reads": reads.tolist(), "clean": clean.tolist(), "succeeds": (reads & clean).tolist()}


def prompt_of(pair: tuple[str, str]) -> str:
    """What the sampler is told: the upright digit."""
    return f"a red {pair[0]} on white"


def run_pair(
    pipe: Any, pair: tuple[str, str], seeds: Sequence[int], how: OneStep | None, out: Path
) -> bd.Run:
    """The ambigrams of ``seeds``, with a baseline if ``how`` says one; a killed run goes on where it was."""
    return ambigram(
        pipe, *pair, prompt=prompt_of(pair), seeds=seeds, steps=STEPS, baseline=how, out=out,
        checkpoint_every=5, **CALL,
    )  # fmt: skip


def verdicts(run: bd.Run, success: Success) -> dict[str, dict[str, list[bool]]]:
    """What the judge and the rule say of either sort of pictures."""
    return {"ours": success(run.best.images), "one-step": success(run.tensors("one_step_guidance")["images"])}


def best_settings(pipe: Any, pair: tuple[str, str], success: Success) -> tuple[OneStep, list[dict[str, Any]]]:
    """The settings of one-step guidance with most successes on the tuning seeds (then: the lowest loss), and all."""
    objective = Jittered(Ambigram(*pair), 2.0)
    noise = torch.cat([bd.noise(pipe, seed=1000 * draw + seed) for draw in range(DRAWS) for seed in TUNING])
    rows = []
    for how in SETTINGS:
        with seeded(0, "settings"):
            pictures = guide_one_step(pipe, [prompt_of(pair)] * len(noise), noise, objective, how, **CALL)
            with torch.no_grad():
                loss = objective(pictures).mean().item()
        rows.append({**asdict(how), "successes": sum(success(pictures)["succeeds"]), "loss": loss})
    best = max(range(len(rows)), key=lambda i: (rows[i]["successes"], -rows[i]["loss"]))
    return SETTINGS[best], rows


def tune(pipe: Any, folder: Path) -> dict[str, Any]:
    """Choose the settings of one-step guidance for every pair, and the pair by :data:`RULE`; resumable pair by pair."""
    found = []
    for pair in PAIRS:
        name = "-".join(pair)
        success, file = Success(pipe, pair), folder / f"one-step-{name}.json"
        if not file.exists():
            how, rows = best_settings(pipe, pair, success)
            file.write_text(json.dumps({"one-step": asdict(how), "one-step settings tried": rows}, indent=1))
        tried = json.loads(file.read_text())
        run = run_pair(pipe, pair, TUNING, None, folder / f"tuning-{name}")
        counts = {
            "ours": sum(success(run.best.images)["succeeds"]) / len(TUNING),
            "one-step": max(row["successes"] for row in tried["one-step settings tried"])
            / (DRAWS * len(TUNING)),
        }
        found.append({"pair": pair, "share of successes": counts, **tried})
        print(pair, counts, flush=True)
    chosen = max(found, key=lambda f: (f["share of successes"]["ours"], -f["share of successes"]["one-step"]))
    names = {"chosen": chosen["pair"], "one-step": chosen["one-step"]}
    return {"seeds": list(TUNING), "rule": RULE, **names, "pairs": found}


def measure(pipe: Any, tuned: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The chosen pair on the tested seeds: what goes into ``results/ambigrams.json``."""
    first, second = tuned["chosen"]
    pair, how = (first, second), OneStep(**tuned["one-step"])
    success = Success(pipe, pair)
    run = run_pair(pipe, pair, TESTED, how, folder / f"tested-{first}-{second}")
    found = verdicts(run, success)
    names = {"ours": "gradient through the whole run", "one-step": "one-step guidance, as many network calls"}
    counts = {who: {what: sum(each) for what, each in by.items()} for who, by in found.items()}
    settings = {"pair": pair, "seeds": list(TESTED), "steps": STEPS, "one-step": asdict(how), **CALL}
    return {
        "settings": settings,
        "tuning": tuned,
        "measured": {
            "seeds": found,
            "counts": counts,
            "calls": run.record["figures"][CALLS],
            "tries of one-step guidance": run.record["figures"]["one-step guidance: tries"],
            "limits of clean": dict(zip(NAMES, success.usual.limits.tolist(), strict=True)),
            "seconds of the gradient's descent": run.record["stats"]["seconds"],
        },
        "figures": [
            [
                f"ambigram {first} / {second}, {len(TESTED)} seeds, {names[who]}",
                f"{by['succeeds']} clean and read both ways by a judge in no loss "
                f"({by['reads']} read so, {by['clean']} clean)",
            ]
            for who, by in counts.items()
        ],
    }
