"""``backdrift plan``: what a gradient needs, and how it fits a budget, before anything runs."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import typer
from pydantic import Field

from .command import command
from .config import Bare
from .fields import THROUGH
from .pipeline import quiet


class PlanSettings(Bare):
    """Settings of ``plan``."""

    panel: ClassVar[str] = "Options"

    model: str = Field(
        description="sd15, sdxl, sd3-medium, flux-dev, sd, flow, one of their hub ids, or a folder (weights unread).",
        json_schema_extra={"argument": True, "complete": ["sd15", "sdxl", "sd3-medium", "flux-dev", "sd", "flow"]},
    )  # fmt: skip
    size: int | None = Field(
        None, gt=0, description="Height and width in pixels.", json_schema_extra={"default": "the model's"}
    )
    height: int | None = Field(None, gt=0, description="Height in pixels, if it is not --size.")
    width: int | None = Field(None, gt=0, description="Width in pixels, if it is not --size.")
    steps: int = Field(30, ge=1, description="Steps of the sampler.")
    budget: str | None = Field(
        None, description="Memory of everything on the device, such as 16GiB.",
        json_schema_extra={"default": "no limit"},
    )  # fmt: skip
    loss: str | None = Field(
        None, description="What scores the pictures: clip-vit-base-patch32, clip-vit-large-patch14, or any loss.",
        json_schema_extra={"default": "one that needs no network"},
    )  # fmt: skip
    train: str | None = Field(None, description="Weights that get gradients: lora, a component, a pattern.")
    through: str = THROUGH
    rank: int = Field(16, ge=1, description="Rank of the LoRA that --train lora adds.")
    optimizer: str = Field("adamw", description="Optimizer of trained weights: adamw, adam, sgd, ...")
    batch: int = Field(1, ge=1, description="Pictures per call.")
    guidance: bool = Field(
        True, description="Guidance, which doubles the batch where the pipeline does that."
    )
    dtype: str = Field(
        "bfloat16",
        pattern="^(float32|float16|bfloat16)$",
        description="Precision of the pipeline: float32, float16 or bfloat16.",
        json_schema_extra={"complete": ["float32", "float16", "bfloat16"]},
    )
    tiles: bool = Field(False, description="Consider decoding in tiles, which changes the pictures slightly.")
    offload: bool = Field(True, description="Consider moving latents and weights to the CPU while they wait.")
    json_output: bool = Field(
        False, description="Print JSON instead of tables.", json_schema_extra={"flag": "--json"}
    )


def plan(settings: PlanSettings) -> None:
    """What a gradient through a sampling run needs, and the fastest way to run it within a budget.

    Answers from configuration files: no GPU, no weights, nothing is computed.
    """
    quiet()
    from ..pipelines.planned import plan as make

    made = make(
        settings.model, settings.height or settings.size, settings.width or settings.size, settings.steps,
        memory=settings.budget, loss=settings.loss, train=settings.train, through=settings.through,
        rank=settings.rank, optimizer=settings.optimizer, batch=settings.batch, guidance=settings.guidance,
        dtype=settings.dtype, tiles=settings.tiles, offload=settings.offload,
    )  # fmt: skip
    if settings.json_output:
        typer.echo(json.dumps(made.as_dict(), indent=2))
    else:
        _tables(made)


def _tables(made: Any) -> None:
    from ..report.figures import size
    from .info import _table

    parts = [[name, size(nbytes)] for name, nbytes in made.needs.items()]
    _table(f"{made.job.name}: what it needs, each by itself", ["part", "bytes"], parts)
    rows = [_row(made, option) for option in made.options]
    _table("Ways to run it, the fastest first", ["way", "peak", "fits", "network calls", "time"], rows)
    _table("Chosen", ["phase", "peak"], [[phase, size(n)] for phase, n in made.chosen.needs.phases.items()])
    for line in made.why:
        typer.echo(line)


def _row(made: Any, option: Any) -> list[str]:
    from ..report.figures import size

    row = made.row(option)
    kept = option.choices.keep
    way = [
        "keep all calls" if kept is None else f"keep {kept or 'no'} call{'' if kept == 1 else 's'}",
        *row["words"],
    ]
    fits = "yes" if row["fits"] else "no"
    return ["; ".join(way), size(row["peak"]), fits, str(row["network_calls"]), f"{row['time']:.2f}x"]


def add_to(app: typer.Typer) -> None:
    command(
        app, PlanSettings,
        "backdrift plan sdxl --size 1024 --steps 30 --budget 16GiB",
        "backdrift plan path/to/pipeline --train lora --loss clip-vit-large-patch14 --json",
    )(plan)  # fmt: skip
