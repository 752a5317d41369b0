"""How well an embedding learnt from a few pairs stands for an effect, on noise and prompts that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backdrift as bd
from backdrift.losses import load_classifier
from backdrift.recipes import effect_pairs, load_embedding, measure_effect

EFFECTS = {"in black and white": "saturation", "blurred": "high-frequency energy"}
CALL: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 3.0}
LEARNT = (
    "a red two on grass", "a blue seven on pink", "a yellow five on blue", "a green nine on white",
    "a purple four on white", "a black three on grey", "a white six on red", "a orange zero on yellow",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "purple", "orange")
GROUNDS = ("white", "yellow", "grey", "gravel")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNSEEN = tuple(f"a {COLOURS[i % 5]} {DIGITS[i % 10]} on {GROUNDS[(i + i // 5) % 4]}" for i in range(20))
WITHIN, RIGHT, LEFT = 0.2, 0.9, 0.1

# The paper inverts one pair with 50 updates at a constant 0.1 over all free slots. That is the default of
# bd.invert, and fits one pair; asked for the effect on other noise and prompts, it learns the pair by heart. So
# here eight pairs are shown, four at a time, with a rate that ends at 0, and as few slots as the words take.
HOW: dict[str, dict[str, Any]] = {
    "output": {"n_slots": 5, "steps": 120, "lr": 0.05, "lr_schedule": "cosine", "minibatch": 4},
    "tokens": {"n_slots": 5, "steps": 60, "minibatch": 4},
}


def invert_effect(pipe: Any, slots: str, effect: str, folder: Path) -> dict[str, float]:
    """Learn ``effect`` from :data:`LEARNT` and measure it on :data:`UNSEEN`; a killed run goes on where it was."""
    pairs = effect_pairs(pipe, LEARNT, effect, seeds=range(100, 100 + len(LEARNT)), **CALL)
    out = folder / f"{slots}-{effect.replace(' ', '-')}"
    run = bd.invert(pipe, pairs, slots=slots, out=out, checkpoint_every=10, **HOW[slots], **CALL)  # type: ignore[arg-type]
    embedding = load_embedding(run.folder / run.record["files"]["embedding"]["path"])
    found, _ = measure_effect(
        pipe, embedding, effect, UNSEEN, range(len(UNSEEN)), classifier=load_classifier(), **CALL
    )
    return {name: run.record["figures"][name] for name in ("loss before", "best loss")} | found


def met(effect: str, found: dict[str, float]) -> dict[str, bool]:
    """Which of the aims are met."""
    return {
        "loss falls by 90 %": found["best loss"] <= LEFT * found["loss before"],
        "effect within 20 % of the words'": abs(found[f"{EFFECTS[effect]}: embedding / words"] - 1) <= WITHIN,
        "digit right in 90 %": found["right: embedding"] >= RIGHT,
    }


def row(slots: str, effect: str, found: dict[str, float]) -> list[str]:
    """The line of the README's table."""
    measure = EFFECTS[effect]
    plain, words, ours = (f"{found[f'{measure}: {k}']:.3g}" for k in ("plain", "words", "embedding"))
    fall = 1 - found["best loss"] / found["loss before"]
    text = f"loss −{fall:.1%}; on {len(UNSEEN)} unseen pairs {measure} {plain} → {ours} "
    text += f"(the words: {words}), digit right in {found['right: embedding']:.0%}"
    return [f'"{effect}" inverted into {slots} slots', text]


def measure(pipe: Any, slots: str, folder: Path) -> dict[str, Any]:
    """Both effects with one kind of slots: what goes into ``results/inversion-<slots>.json``."""
    found = {effect: invert_effect(pipe, slots, effect, folder) for effect in EFFECTS}
    return {
        "settings": {"slots": slots, **HOW[slots], "prompts": list(LEARNT), **CALL},
        "measured": found,
        "met": {effect: met(effect, each) for effect, each in found.items()},
        "figures": [row(slots, effect, each) for effect, each in found.items()],
    }
