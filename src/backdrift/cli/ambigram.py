"""``backdrift ambigram``: pictures that read one way upright and another way upside-down."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import typer
from pydantic import Field

from .command import command
from .config import Settings
from .fields import SHOW_FLAGGED
from .finish import finish
from .pipeline import open_pipeline


class AmbigramSettings(Settings):
    """Settings of ``ambigram``."""

    panel: ClassVar[str] = "Options"

    upright: str = Field("four", description="What it reads upright, by the built-in classifier (default: four).",
                         json_schema_extra={"argument": True, "metavar": "UPRIGHT"})  # fmt: skip
    upside_down: str = Field("seven", description="What it reads upside-down (default: seven).",
                             json_schema_extra={"argument": True, "metavar": "UPSIDE_DOWN"})  # fmt: skip
    seeds: int = Field(1, ge=1, description="How many pictures: from the seeds --seed, --seed + 1, …")
    prompt: str | None = Field(
        None,
        description="What the sampler is told.",
        json_schema_extra={"default": "a red <upright> on white"},
    )
    steps: int = Field(40, ge=0, description="Updates of the noise, at most.")
    lr: float = Field(0.05, gt=0, description="Learning rate.")
    noise_prior: float = Field(0.01, ge=0, description="Weight of the Gaussian prior on the noise.")
    baseline: bool = Field(True, description="Also spend as many network calls on one-step guidance.")
    num_inference_steps: int = Field(12, ge=1, description="Steps of the sampler.")
    guidance_scale: float = Field(2.0, description="Scale of classifier-free guidance.")
    chunk: int | None = Field(None, ge=1, description="Pictures per call of the pipeline.")
    memory: str | int = Field("auto", description="Memory plan: auto, min, max, or a budget such as 6GiB.")
    show_flagged: bool = SHOW_FLAGGED
    resume: bool = Field(
        True, description="Continue the run that the folder holds, if its settings are the same."
    )
    out: Path | None = Field(
        None, description="Folder of the run.", json_schema_extra={"default": "runs/ambigram-<settings>"}
    )
    progress: bool = Field(True, description="Show a bar with the loss and the remaining time.")


def ambigram(settings: AmbigramSettings) -> None:
    """Optimise the noise until the finished picture reads one way upright and another way upside-down.

    Counts how many of the pictures do, beside one-step guidance with as many network calls.
    """
    from ..losses import Ambigram
    from ..recipes.ambigram import BASELINE
    from ..recipes.ambigram import ambigram as run_it

    loss = Ambigram(settings.upright, settings.upside_down)  # a bad name costs no time
    pipe = open_pipeline(settings)
    names = ("prompt", "steps", "lr", "noise_prior", "num_inference_steps", "guidance_scale", "chunk", "memory",
             "resume", "out", "progress")  # fmt: skip
    run = run_it(
        pipe,
        settings.upright,
        settings.upside_down,
        loss=loss,
        seeds=range(settings.seed, settings.seed + settings.seeds),
        baseline=BASELINE if settings.baseline else None,
        **{name: getattr(settings, name) for name in names},
    )
    for name, value in run.record["figures"].items():
        if "read both ways" in name:
            typer.echo(f"{name}: {value}")
    finish(run, settings, "ambigram")


def add_to(app: typer.Typer) -> None:
    command(
        app, AmbigramSettings,
        "backdrift ambigram four seven",
        "backdrift ambigram three five --seeds 20 --no-baseline --out runs/ambigrams",
    )(ambigram)  # fmt: skip
