"""How often the first applications succeed on the built-in pipeline.

    python -m benchmarks.applications ambigrams              # 20 seeds, beside one-step guidance for the same seconds
    python -m benchmarks.applications inversion --slots output

Results go to ``results/ambigrams.json`` and ``results/inversion-<slots>.json``; a killed count goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import backdrift as bd
from backdrift.losses import load_classifier
from backdrift.recipes import effect_pairs, load_embedding, measure_effect, successes

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/applications")
EFFECTS = ("in black and white", "blurred")
GUIDANCE = 3.0  # what the built-in pipeline's card recommends
LEARNT = ("a red two on grass", "a blue seven on pink", "a yellow five on blue", "a green nine on white")
COLOURS = ("red", "blue", "green", "purple", "orange")
GROUNDS = ("white", "yellow", "grey", "gravel")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Four pairs at once take the output slots more and smaller updates than the paper's 50 at 0.1 for one picture.
HOW: dict[str, dict[str, Any]] = {
    "tokens": {"steps": 50, "n_slots": 5},
    "output": {"steps": 120, "n_slots": 5, "lr": 0.05},
}

app = typer.Typer(add_completion=False)


def unseen(count: int = 20) -> list[str]:
    """Prompts that the inversion was not shown: digits, colours and backgrounds taken in turn."""
    return [f"a {COLOURS[i % 5]} {DIGITS[i % 10]} on {GROUNDS[(i + i // 5) % 4]}" for i in range(count)]


def write(name: str, data: dict[str, Any]) -> None:
    """Put the results beside the others."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@app.command()
def ambigrams(
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 20,
    steps: Annotated[int, typer.Option(help="Updates of the noise at most.")] = 40,
    num_inference_steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 12,
) -> None:
    """Optimise the noise until the picture reads "two" upright and "seven" upside-down; count how often it does."""
    run = successes(
        bd.load(), seeds=seeds, steps=steps, num_inference_steps=num_inference_steps, out=RUNS / "ambigrams"
    )
    found = run.record["figures"]
    rows = [[f"ambigram two / seven, {name}", str(value)] for name, value in found.items() if "read" in name]
    settings = {"seeds": seeds, "steps": steps, "num_inference_steps": num_inference_steps}
    write("ambigrams", {"settings": settings, "measured": found, "figures": rows})


@app.command()
def inversion(
    slots: Annotated[str, typer.Option(help="output or tokens.")] = "output",
    num_inference_steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 12,
) -> None:
    """Learn each effect from four pairs, then try it on 20 unseen (noise, prompt) pairs."""
    pipe = bd.load()
    if slots not in HOW:
        raise typer.BadParameter(f"--slots {slots}: {' or '.join(HOW)}")
    how = HOW[slots]
    call: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": GUIDANCE}
    measured: dict[str, dict[str, float]] = {}
    rows = []
    for effect in EFFECTS:
        pairs = effect_pairs(pipe, LEARNT, effect, seeds=range(100, 100 + len(LEARNT)), **call)
        out = RUNS / f"inversion-{slots}-{effect.replace(' ', '-')}"
        run = bd.invert(pipe, pairs, slots=slots, out=out, **how, **call)
        first, best = run.record["iterations"][0]["loss"], run.best.loss
        prompts = unseen()
        embedding = load_embedding(run.folder / run.record["files"]["embedding"]["path"])
        found, _ = measure_effect(
            pipe, embedding, effect, prompts, list(range(len(prompts))), classifier=load_classifier(), **call
        )
        measured[effect] = {"loss before": first, "best loss": best, **found}
        measure = "saturation" if effect == "in black and white" else "high-frequency energy"
        plain, words, ours = (f"{found[f'{measure}: {k}']:.3g}" for k in ("plain", "words", "embedding"))
        text = f"loss −{1 - best / first:.1%}; on {len(prompts)} unseen pairs {measure} {plain} → {ours} "
        text += f"(the words: {words}), digit right in {found['right: embedding']:.0%}"
        rows.append([f'"{effect}" inverted into {slots} slots', text])
        print(effect, json.dumps(measured[effect], indent=1))
    settings = {"slots": slots, **how, "prompts": list(LEARNT), **call}
    write(f"inversion-{slots}", {"settings": settings, "measured": measured, "figures": rows})


if __name__ == "__main__":
    app()
