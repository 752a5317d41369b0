"""``backdrift generate``: pictures from prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import typer
from pydantic import Field

from ..errors import InputError
from .command import command
from .config import dump
from .fields import Sampling, Strings
from .folders import check_new
from .pipeline import open_pipeline


class GenerateSettings(Sampling):
    """Settings of ``generate``."""

    panel: ClassVar[str] = "Options"

    prompt: Strings = Field(description="What to show; several prompts give several pictures.",
                            json_schema_extra={"argument": True, "metavar": "PROMPT"})  # fmt: skip
    batch_size: int = Field(1, ge=1, description="Pictures per prompt.")
    embedding: Path | None = Field(
        None, description="File of a learned embedding (from invert), applied to the prompts."
    )
    out: Path | None = Field(
        None, description="Folder for the pictures.", json_schema_extra={"default": "runs/<prompt>-<seed>"}
    )
    overwrite: bool = Field(False, description="Write into a folder that is not empty.")


def generate(settings: GenerateSettings) -> None:
    """Make pictures from prompts.

    The same seed gives the same noise as in `optimize`, so its first pictures are these.
    """
    if not settings.prompt:
        raise InputError("PROMPT is missing: give at least one (it may be empty: '').")
    folder = settings.out or Path("runs") / f"{_slug(settings.prompt[0])}-{settings.seed}"
    check_new(folder, settings.overwrite)
    embedding = None
    if settings.embedding is not None:  # a missing file costs no time
        from ..recipes import load_embedding

        embedding = load_embedding(settings.embedding)
    pipe = open_pipeline(settings)
    images, flags, prompts = _pictures(pipe, settings, embedding)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, flagged, prompt) in enumerate(zip(images, flags, prompts, strict=True)):
        path = folder / f"{i:02d}-{_slug(prompt)}.png"
        image.save(path)
        typer.echo(str(path))
        if flagged:
            done = "shown" if settings.show_flagged else "blackened; --show-flagged shows it"
            typer.echo(f"The pipeline's safety checker flagged {path.name}: {done}.", err=True)
    dump(settings, folder / "run.yaml", "generate")


def _pictures(
    pipe: Any, settings: GenerateSettings, embedding: Any
) -> tuple[list[Any], list[bool], list[str]]:
    """PIL images, which of them the safety checker flagged, and their prompts."""
    import torch

    from ..descent.randomness import generator
    from ..descent.subject import make_examples, picture_size, sampler_call

    prompts = [prompt for prompt in settings.prompt for _ in range(settings.batch_size)]
    height, width = picture_size(pipe, settings.height, settings.width)
    noise = torch.cat(
        [example.noise for example in make_examples(pipe, prompts, height, width, settings.seed)]
    )
    more = (
        {"negative_prompt": [settings.negative_prompt] * len(prompts)} if settings.negative_prompt else None
    )
    call = sampler_call(pipe, height, width, settings.num_inference_steps, settings.guidance, more)
    text: dict[str, Any] = {"prompt": prompts}
    if embedding is not None:
        text = embedding.call(pipe, prompts)
    random = [generator(settings.seed, "sampler", i) for i in range(len(prompts))]
    given = {**text, "latents": noise, "generator": random, **call}
    with torch.no_grad():
        if settings.show_flagged:  # only the differentiable call leaves flagged pictures as they are
            from ..pipelines.differentiable import differentiable

            made = differentiable(pipe, clamp=True)
            made(**given)
            images, flags = made.pil, made.flagged
        else:
            found = pipe(**given, output_type="pil")
            images, flags = list(found.images), getattr(found, "nsfw_content_detected", None)
    return images, flags or [False] * len(images), prompts


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "picture"


def add_to(app: typer.Typer) -> None:
    command(
        app, GenerateSettings,
        'backdrift generate "a red seven on grass"',
        'backdrift generate "a red two" "a blue six" --batch-size 4 --seed 1 --out runs/digits',
    )(generate)  # fmt: skip
