"""Does vocabulary expansion work: kinds of digits that captions never name, seen by a judge that is in no loss.

    python -m benchmarks.expand            # both kinds; goes on where it was killed; writes docs/expand.md's table
    python -m benchmarks.expand KIND       # one of them: "plain seven", "one with a foot"

Each of these makes pictures of a prompt whose words do not say the kind:

- the prompt alone;
- the best of many: as many plain samples as the noise's descent has network calls, of which the loss picks the lowest;
- one-step guidance by the same loss, on as many calls: the best of the tries that fit;
- the noise optimised through the whole run;
- a word learnt through the whole run, on noise it was not learnt from, where it costs no more than the prompt.

The judge (``training/kinds.py``: the nearest real shapes, from digits that the loss's classifier did not learn from)
says whether the kind is there, the built-in classifier whether the digit is. Settings were chosen on seed 0; measured
is another.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from training.judge import ink
from training.kinds import drawn, judge

import backdrift as bd
from backdrift.descent.randomness import seeded
from backdrift.descent.subject import describe_pipeline
from backdrift.losses import Classifier, ClassTarget
from backdrift.losses.digit_kinds import KINDS, load_kinds
from backdrift.pictures import side_by_side, to_pil
from backdrift.recipes.expand_target import pull_of, sees
from backdrift.recipes.one_step import OneStep, calls_of, guide_one_step

from .frechet import Moments, with_error
from .marked import rewritten

RESULTS = Path(__file__).parent / "results" / "expand.json"
PAGE = Path(__file__).parent.parent / "docs" / "expand.md"
PICTURE = PAGE.parent / "images" / "expand.png"
RUNS = Path("runs/expand")
SEED, STEPS, NOISES, UNSEEN = 7, 20, 8, 48
CALL: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 3.0}
CROPS: dict[str, Any] = {"cutouts": 4, "cut_least": 0.8}
WORD: dict[str, Any] = {
    "batch_size": 48, "minibatch": 6, "steps": 50, "lr": 0.003, "lr_schedule": "cosine", "unseen": UNSEEN,
}  # fmt: skip
GUIDED = OneStep(0.5, 0.0, 1.0)
"""What was best for ambigrams on seeds of their own; not tuned again here."""
#: Weights of what the prompt said: as much as the class's own, and four times as much.
KEEP, HELD = 0.05, 0.2
#: kind -> (colour, digit)
TASKS = {"plain seven": ("blue", "seven"), "one with a foot": ("red", "one")}
WAYS = {
    "plain": "the prompt alone",
    "best": "the prompt alone, the best of {tries}",
    "one-step": "one-step guidance, the best of {guided}",
    "noise": "noise, through the whole run",
    "word": "a word, on noise it was not learnt from",
    "held": "a word learnt with four times the weight on what the prompt said",
}


class Referees:
    """Who says what of pictures of one kind."""

    def __init__(self, kind: str, digit: str) -> None:
        self.kind, self.digit = ClassTarget(kind, Classifier(judge(), KINDS)), ClassTarget(digit)
        number = torch.full((400,), KINDS.index(kind))
        self.real = Moments.of(shapes(drawn(number, "B", np.random.default_rng(31), flat=True)))
        self.other = drawn(number[:UNSEEN], "A", np.random.default_rng(32), flat=True)

    def __call__(self, pictures: Tensor) -> dict[str, Any]:
        kind, digit = sees(self.kind, pictures), sees(self.digit, pictures)
        found: dict[str, Any] = {
            "n": len(pictures), "kind": int(kind.sum()), "digit": int(digit.sum()), "both": int((kind & digit).sum()),
        }  # fmt: skip
        if len(pictures) >= UNSEEN:
            found["frechet"], found["frechet error"] = with_error(self.real, shapes(pictures))
        return found


def shapes(pictures: Tensor) -> Tensor:
    """The ink of pictures on a grid of 8×8: (n, 64)."""
    whole = ink(pictures.float().clamp(0, 1)).unflatten(1, (1, 16, 16))
    return F.avg_pool2d(whole, 2).flatten(1)


@torch.no_grad()
def sampled(pipe: Any, prompt: str, noise: Tensor) -> Tensor:
    """Pictures of the prompt from the noise."""
    parts = [pipe([prompt] * len(x), latents=x, output_type="pt", **CALL).images for x in noise.split(16)]
    return torch.cat(parts)


def lowest(loss: Any, tries: list[Tensor]) -> Tensor:
    """Of each sample that try whose loss is lowest: tries of (n, 3, H, W) -> (n, 3, H, W)."""
    with torch.no_grad():
        values = torch.stack([loss(pictures) for pictures in tries])
    return torch.stack(tries)[values.argmin(0), torch.arange(values.shape[1])]


def measure(pipe: Any, kind: str, folder: Path) -> dict[str, Any]:
    """All ways to one kind; the two descents go on where they were killed."""
    colour, digit = TASKS[kind]
    prompt, referees = f"a {colour} {digit} on white", Referees(kind, digit)
    keep = f"{KEEP}*class:{prompt}"
    loss = pull_of(ClassTarget(kind, load_kinds()), scale=0.05, cut_power=0.3, keep=keep, **CROPS)
    name = kind.replace(" ", "-")

    def learnt(weight: float, out: str) -> bd.Run:
        return bd.expand(
            pipe, f"a {colour} <kind> on white", "kinds", kind, over="word", init=digit, seed=SEED,
            keep=f"{weight}*class:{prompt}", out=folder / out, checkpoint_every=5, progress=False,
            **WORD, **CROPS, **CALL,
        )  # fmt: skip

    word, held = learnt(KEEP, f"word-{name}"), learnt(HELD, f"word-held-{name}")
    unseen = word.tensors("unseen")
    found = {"plain": referees(unseen["plain"].float()), "word": referees(unseen["word"].float())}
    found["held"] = referees(held.tensors("unseen")["word"].float())
    print(kind, found, flush=True)
    run = bd.expand(
        pipe, prompt, "kinds", kind, keep=keep, seed=SEED, batch_size=NOISES, steps=STEPS,
        out=folder / f"noise-{name}", checkpoint_every=5, progress=False, **CROPS, **CALL,
    )  # fmt: skip
    found["noise"] = referees(run.best.images)
    calls = CALL["num_inference_steps"] * (2 * STEPS + 1)
    tries, guided = (
        calls // CALL["num_inference_steps"],
        -(-calls // calls_of(GUIDED, CALL["num_inference_steps"])),
    )
    draws = [bd.noise(pipe, seed=SEED + 1000 * k, batch_size=NOISES) for k in range(tries)]
    found["best"] = referees(lowest(loss, [sampled(pipe, prompt, x) for x in draws]))
    print(kind, found, flush=True)
    pictures = []
    for k in range(guided):
        with seeded(SEED, "one-step guidance", k):
            pictures.append(guide_one_step(pipe, [prompt] * NOISES, draws[k], loss, GUIDED, **CALL).detach())
    found["one-step"] = referees(lowest(loss, pictures))
    real, error = with_error(referees.real, shapes(referees.other))
    return {
        "prompt": prompt, "calls": calls, "tries": tries, "guided": guided, "ways": found,
        "frechet of as many real digits of the other half": [real, error],
        "seconds": {"word": word.record["stats"]["seconds"], "noise": run.record["stats"]["seconds"]},
    }  # fmt: skip


def interval(k: int, n: int) -> str:
    """Wilson's 95 % interval of a share, in percent."""
    z, p = 1.959964, k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{low:.0f}–{high:.0f} %"


def table(data: dict[str, Any]) -> str:
    """The page's table."""
    lines = [
        "| kind | how | judge sees the kind | digit right | both | Fréchet distance of the ink |",
        "|---|---|---|---|---|---|",
    ]
    for kind, of in data["measured"].items():
        for way, words in WAYS.items():
            row, how = of["ways"][way], words.format(**of)
            distance = f"{row['frechet']:.2f} ± {row['frechet error']:.2f}" if "frechet" in row else "—"
            seen = f"{row['kind']} of {row['n']} ({interval(row['kind'], row['n'])})"
            lines.append(
                f"| {kind} | {how} | {seen} | {row['digit']} of {row['n']} | {row['both']} | {distance} |"
            )
        real, error = of["frechet of as many real digits of the other half"]
        lines.append(
            f"| {kind} | {UNSEEN} drawings of real digits of the other half | | | | {real:.2f} ± {error:.2f} |"
        )
    return "\n".join(lines) + "\n"


def figures(data: dict[str, Any]) -> list[list[str]]:
    """The README's rows."""
    rows = []
    for kind, of in data["measured"].items():
        plain, word = (of["ways"][way] for way in ("plain", "word"))
        text = f"seen by a judge in no loss in {word['kind']} of {word['n']} pictures from unseen noise "
        text += f"(the prompt alone: {plain['kind']}), the digit right in {word['digit']}"
        rows.append([f'a word learnt for "{kind}"', text])
    return rows


def draw(folder: Path) -> None:
    """docs/images/expand.png: for each kind twelve unseen noises, with the prompt alone and with the word."""
    rows = []
    for kind in TASKS:
        run = bd.Run.load(folder / f"word-{kind.replace(' ', '-')}")
        rows += [side_by_side(run.tensors("unseen")[way][:12]) for way in ("plain", "word")]
    to_pil(torch.cat(rows, -2)).save(PICTURE, optimize=True)


def main(kinds: list[str] = typer.Argument(None)) -> None:  # noqa: B008
    """Measure, write the results and the page's table."""
    pipe = bd.load()
    folder = RUNS / describe_pipeline(pipe)["weights"]
    for kind in kinds or list(TASKS):
        found = measure(pipe, kind, folder)
        data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"measured": {}}
        measured = {k: v for k, v in (data["measured"] | {kind: found}).items() if k in TASKS}
        settings = {
            "seed": SEED,
            "noises": NOISES,
            "steps": STEPS,
            "word": WORD,
            "guided": vars(GUIDED),
            **CROPS,
            **CALL,
        }
        data = {"settings": settings, "measured": {k: measured[k] for k in TASKS if k in measured}}
        data["figures"] = figures(data)
        RESULTS.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        print(table(data), flush=True)
        PAGE.write_text(rewritten(PAGE.read_text(), {"expand": table(data)}))
        if len(data["measured"]) == len(TASKS):
            draw(folder)


if __name__ == "__main__":
    typer.run(main)
