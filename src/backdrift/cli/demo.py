"""``backdrift demo``: the main job on the built-in pipeline, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import typer
from pydantic import Field

from .command import command
from .config import Settings
from .fields import BUILT_IN_GUIDANCE, SHOW_FLAGGED
from .pipeline import open_pipeline

INTRO = (
    "Three things done with a gradient through a whole sampling run, just now on this machine, with the small "
    "pipeline that ships with backdrift: a picture that reads one digit upright and another upside-down; an "
    "embedding that learned an effect from examples; and the gradient itself, checked."
)


class DemoSettings(Settings):
    """Settings of ``demo``."""

    panel: ClassVar[str] = "Options"

    upright: str = Field("four", description="The ambigram's digit upright.")
    upside_down: str = Field("seven", description="The ambigram's digit upside-down.")
    effect: str = Field("in black and white", description="The effect to learn.")
    num_inference_steps: int = Field(12, ge=1, description="Steps of the sampler.")
    steps: int = Field(40, ge=1, description="Most updates of the ambigram; half as many of the embedding.")
    memory: str | int = Field("auto", description="Memory plan: auto, min, max, or a budget such as 6GiB.")
    show_flagged: bool = SHOW_FLAGGED
    progress: bool = Field(True, description="Show bars with the loss and the remaining time.")
    out: Path = Field(Path("runs/demo"), description="Folder of the demo.")


def demo(settings: DemoSettings) -> None:
    """Make an ambigram, learn an effect and check the gradient, and draw one page about them.

    A few minutes on two cores. An interrupted demo goes on where it was.
    """
    from rich.console import Console

    from ..losses import Ambigram
    from ..recipes import effect_pairs, invert
    from ..recipes.ambigram import ambigram
    from ..recipes.check import check_gradient
    from ..report import write_many
    from ..report.figures import number, seconds

    Ambigram(settings.upright, settings.upside_down)  # a bad name costs no time
    console = Console(highlight=False, soft_wrap=True)
    pipe = open_pipeline(settings)
    shared: dict[str, Any] = {"num_inference_steps": settings.num_inference_steps, "seed": settings.seed}

    console.print(f"[bold]1. An ambigram: {settings.upright} / {settings.upside_down}[/bold]")
    made = ambigram(
        pipe, settings.upright, settings.upside_down, seeds=[settings.seed], steps=settings.steps,
        num_inference_steps=settings.num_inference_steps, memory=settings.memory, out=settings.out / "ambigram",
        progress=settings.progress,
    )  # fmt: skip
    for name, value in made.record["figures"].items():
        if "read both ways" in name:
            console.print(f"   {name}: {value}", markup=False)

    console.print(f"[bold]2. An effect as an embedding: {settings.effect}[/bold]")
    prompts = ["a yellow six on blue", "a blue seven on pink"]
    pairs = effect_pairs(
        pipe, prompts, settings.effect, seeds=[settings.seed, settings.seed + 1],
        num_inference_steps=settings.num_inference_steps, guidance_scale=BUILT_IN_GUIDANCE,
    )  # fmt: skip
    learned = invert(
        pipe, pairs, slots="tokens", n_slots=5, guidance_scale=BUILT_IN_GUIDANCE, **shared,
        steps=max(1, settings.steps // 2), memory=settings.memory,
        out=settings.out / "embedding", progress=settings.progress,
    )  # fmt: skip
    learned.record["title"] = f"an effect as an embedding: {settings.effect}"
    learned.save_record()
    first, best = learned.record["iterations"][0]["loss"], learned.record["best"]["loss"]
    console.print(f"   squared error {number(first, 3)} → {number(best, 3)}")

    console.print("[bold]3. The gradient through the whole run, checked[/bold]")
    prompt = "a red two on grass"
    checked = check_gradient(pipe, prompt, "class:two", **shared, out=settings.out / "gradient")
    figures = checked.record["figures"]
    console.print(
        f"   same bits as plain autograd: {figures['same bits as plain autograd']}; differs from finite differences "
        f"by {number(figures['relative difference to finite differences'], 2)} (relative)"
    )

    runs = [made, learned, checked]
    page = write_many(
        [run.folder for run in runs], settings.out / "report.html",
        title="What a gradient through the whole run can do", intro=INTRO, blur_flagged=not settings.show_flagged,
    )  # fmt: skip
    took = sum(run.record["stats"]["seconds"] or 0.0 for run in runs)
    console.print(f"{seconds(took)} of computing. The page: [bold]{page}[/bold]")


def add_to(app: typer.Typer) -> None:
    command(app, DemoSettings, "backdrift demo --out runs/demo")(demo)
