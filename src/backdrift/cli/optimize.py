"""``backdrift optimize``: make a loss on the finished pictures small."""

from __future__ import annotations

from typing import ClassVar

import typer
from pydantic import Field

import backdrift

from .command import command
from .fields import Descending, Strings
from .finish import finish
from .pipeline import open_pipeline


class OptimizeSettings(Descending):
    """Settings of ``optimize``."""

    panel: ClassVar[str] = "Options"

    prompt: Strings = Field(description="What the pictures show; several prompts give several pictures.",
                            json_schema_extra={"argument": True, "metavar": "PROMPT"})  # fmt: skip
    loss: str = Field(
        description="What to make small: a name such as class:seven, mse:target.png, clip:a blue two; a sum "
        "such as 0.5*clip:two + class:two; or your own, file.py:function. `backdrift info` lists the names.",
        json_schema_extra={"complete": "losses"},
    )
    over: Strings = Field(
        ["noise"],
        description="What to change: noise, prompt_embeds, lora, a component (unet), or patterns of weights.",
        json_schema_extra={"complete": ["noise", "prompt_embeds", "lora", "unet", "transformer"]},
    )
    batch_size: int = Field(1, ge=1, description="Pictures per prompt.")
    rank: int | None = Field(None, ge=1, description="Rank of a new LoRA, with --over lora.")
    noise_prior: float = Field(0.0, ge=0, description="Weight of the Gaussian prior on the noise.")
    enough: float | None = Field(None, description="Stop when the score is at most this.")
    heldout: str | None = Field(
        None, description="A loss that is not optimised and decides which pictures are best."
    )
    heldout_prompts: Strings | None = Field(
        None, description="Further prompts to measure the held-out loss on (not over the noise)."
    )


def optimize(settings: OptimizeSettings) -> None:
    """Make a loss on the finished pictures small, by gradients through the whole sampling run.

    Writes a folder with the record, pictures, tensors and report.html. The same command continues a run
    that was interrupted.
    """
    from ..losses import resolve
    from ..through import Through

    loss = resolve(settings.loss)  # before the pipeline is loaded: a bad name costs no time
    Through.parse(settings.through)
    heldout = None if settings.heldout is None else resolve(settings.heldout)
    pipe = open_pipeline(settings)
    run = backdrift.optimize(
        pipe,
        settings.prompt,
        loss,
        over=settings.over[0] if len(settings.over) == 1 else settings.over,
        batch_size=settings.batch_size,
        rank=settings.rank,
        guidance_scale=settings.guidance,
        noise_prior=settings.noise_prior,
        enough=settings.enough,
        heldout=heldout,
        heldout_prompts=settings.heldout_prompts,
        **settings.descent(),
    )
    finish(run, settings, "optimize")


def add_to(app: typer.Typer) -> None:
    command(
        app, OptimizeSettings,
        'backdrift optimize "a red digit on white" --loss class:seven',
        'backdrift optimize "a red two" --loss "clip:a blue two + 0.1*brightness:0.8" --over prompt_embeds --steps 30',
        'backdrift optimize "a fox" --model path/to/sdxl --loss my_losses.py:warm --over lora --memory 16GiB',
    )(optimize)  # fmt: skip
