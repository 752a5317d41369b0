"""``backdrift guide style | aesthetic | object | class``: guided pictures, beside unguided and one-step ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import typer
from pydantic import Field, field_validator

from ..errors import InputError
from .command import command
from .config import Settings
from .fields import BUILT_IN, SHOW_FLAGGED
from .finish import finish
from .pipeline import open_pipeline

#: What judges, and guides a style, where pictures come from a model that is not built in.
CLIP = "openai/clip-vit-base-patch32"


class GuideSettings(Settings):
    """Settings that the four have in common; those left out are the recipe's own."""

    panel: ClassVar[str] = "Guidance"

    prompt: str = Field(description="What the pictures show.",
                        json_schema_extra={"argument": True, "metavar": "PROMPT"})  # fmt: skip
    n: str | int | None = Field(
        None, description="Steps of the estimate of the finished picture: a number, or adaptive.",
        json_schema_extra={"default": 4, "complete": ["4", "adaptive"]},
    )  # fmt: skip
    start: float | None = Field(
        None, description="Guide from this part of the run on.",
        json_schema_extra={"default": "0.3 for style and aesthetic, else 0"},
    )  # fmt: skip
    stop: float | None = Field(
        None, description="Guide until this part of the run.", json_schema_extra={"default": 0.7}
    )
    strength: float | None = Field(
        None, description="How far a step is pulled, relative to classifier-free guidance.",
        json_schema_extra={"default": "0.2; for the built-in models measured ones"},
    )  # fmt: skip
    repeats: str | int | None = Field(
        None, description="How often a guided step is taken: a number, or numbers by parts of the run, 0.3:1,0.4:2.",
        json_schema_extra={"default": "the paper's"},
    )  # fmt: skip
    subgrid: str | None = Field(
        None, pattern="^(paper|uniform|logsnr)$", description="Where the estimate steps: paper, uniform or logsnr.",
        json_schema_extra={"default": "paper", "complete": ["paper", "uniform", "logsnr"]},
    )  # fmt: skip
    num_inference_steps: int | None = Field(
        None,
        ge=1,
        description="Steps of the sampler.",
        json_schema_extra={"default": 100, "short": ["--steps"]},
    )
    guidance_scale: float | None = Field(
        None, description="Scale of classifier-free guidance.",
        json_schema_extra={"default": "7.5; for the built-in models 3"},
    )  # fmt: skip
    one_step: str | float = Field(
        "seconds", description="Tries of one-step guidance: for the same seconds, for the same network calls, or so "
        "many for each of n-step guidance's.", json_schema_extra={"complete": ["seconds", "calls"]},
    )  # fmt: skip
    scheduler: str | None = Field(
        None, description="ddim, dpm, deis, euler, flow, or a diffusers class.",
        json_schema_extra={"default": "the model's own", "complete": ["ddim", "dpm", "deis", "euler", "flow"]},
    )  # fmt: skip
    negative_prompt: str | None = Field(None, description="What the pictures should not show.")
    height: int | None = Field(
        None, gt=0, description="Height in pixels.", json_schema_extra={"default": "the model's"}
    )
    width: int | None = Field(
        None, gt=0, description="Width in pixels.", json_schema_extra={"default": "the model's"}
    )
    samples: int = Field(4, ge=1, description="Pictures, from rows of one noise.")
    strip: int = Field(1, ge=0, description="Show the estimates along the steps for so many samples.")
    memory: str | int | None = Field(
        None, description="Memory plan of the estimate: auto, min, max, or a budget such as 6GiB.",
        json_schema_extra={"default": "the symplectic adjoint, one network call's activations"},
    )  # fmt: skip
    clip: str | None = Field(
        None, description="Folder or hub id of the CLIP that judges, and guides style and object.",
        json_schema_extra={"default": f"the built-in one; with other models {CLIP}"},
    )  # fmt: skip
    show_flagged: bool = SHOW_FLAGGED
    resume: bool = Field(
        True, description="Continue the run that the folder holds, if its settings are the same."
    )
    out: Path | None = Field(
        None, description="Folder of the run.", json_schema_extra={"default": "runs/guide-<task>-<settings>"}
    )
    progress: bool = Field(True, description="Show bars with the loss and the remaining time.")

    @field_validator("one_step", mode="after")
    @classmethod
    def _ratio(cls, value: Any) -> Any:
        """A number as a number; words are checked by the recipe."""
        try:
            return float(value)
        except ValueError:
            return value

    @field_validator("n", "repeats", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """Words that are whole numbers as numbers."""
        return int(value) if isinstance(value, str) and value.strip().lstrip("-").isdigit() else value


class StyleSettings(GuideSettings):
    """Settings of ``guide style``."""

    panel: ClassVar[str] = "Options"

    reference: str = Field(
        description="The picture whose style is taken: a file, or a photograph that an installed scikit-image carries, "
        "such as skimage/coffee.",
        json_schema_extra={"complete": ["skimage/coffee", "skimage/ihc", "skimage/retina", "skimage/rocket"]},
    )  # fmt: skip


class AestheticSettings(GuideSettings):
    """Settings of ``guide aesthetic``."""

    panel: ClassVar[str] = "Options"

    loss: str | None = Field(
        None, description="The loss, or a weighted sum of losses.",
        json_schema_extra={
            "default": "preference; with other models the paper's 0.1*pickscore + 2*hpsv2 + 0.5*aesthetic:v2",
            "complete": "losses",
        },
    )  # fmt: skip
    judge: str | None = Field(
        None, description="A loss that judges and does not guide.", json_schema_extra={"complete": "losses"}
    )


class ObjectSettings(GuideSettings):
    """Settings of ``guide object``."""

    panel: ClassVar[str] = "Options"

    reference: str = Field(
        description="One picture of the subject: a file, a photograph such as skimage/chelsea, or 'made:a red two on "
        "white', which the model makes itself from another seed.",
    )
    judge: str | None = Field(None, description="Another CLIP, which judges and does not guide.")
    also: str | None = Field(
        None, description="A loss that is added to the subject's, such as 0.1*class:two: what a small CLIP misses.",
        json_schema_extra={"complete": "losses"},
    )  # fmt: skip


class ClassSettings(GuideSettings):
    """Settings of ``guide class``."""

    panel: ClassVar[str] = "Options"

    label: str = Field(description="A class of the classifier, or a phrase of several such as 'red seven'.")
    classifier: str | None = Field(
        None, description="Folder or hub id of an image classifier of transformers.",
        json_schema_extra={"default": "the built-in one"},
    )  # fmt: skip


def style(settings: StyleSettings) -> None:
    """Pictures of a prompt in the style of one reference picture (Gram matrices of CLIP's third block)."""
    from ..recipes import guided_style as recipe
    from ..recipes.references import open_reference

    open_reference(settings.reference)  # a missing file costs no time
    how = _how(settings, recipe)
    pipe = open_pipeline(settings)
    run = recipe.guide_style(
        pipe, settings.prompt, settings.reference, how, _sampling(settings), clip=_clip(settings)
    )
    _finish(run, settings, how, "guide style")


def aesthetic(settings: AestheticSettings) -> None:
    """Pictures of a prompt that a model of people's preferences likes."""
    from ..losses import resolve
    from ..recipes import guided_aesthetic as recipe

    loss = settings.loss or (recipe.BUILT_IN_LOSS if _built_in(settings) else recipe.PAPER_LOSS)
    how = _how(settings, recipe)
    objective = resolve(loss)
    pipe = open_pipeline(settings)
    run = recipe.guide_aesthetic(
        pipe, settings.prompt, objective, how, _sampling(settings), clip=_clip(settings), judge=settings.judge
    )
    _finish(run, settings.model_copy(update={"loss": loss}), how, "guide aesthetic")


def object_(settings: ObjectSettings) -> None:
    """Pictures of a prompt with the subject of one reference picture (its angle in CLIP's space)."""
    from ..losses import resolve
    from ..recipes import guided_object as recipe
    from ..recipes.references import MADE, made, open_reference

    also = None if settings.also is None else resolve(settings.also)  # a bad name costs no time
    itself = settings.reference.startswith(MADE)
    if not itself:
        open_reference(settings.reference)
    how = _how(settings, recipe)
    clip = settings.clip or (None if _built_in(settings) else recipe.PAPER_CLIP)
    pipe = open_pipeline(settings)
    reference: Any = settings.reference
    if itself:
        words = settings.reference.removeprefix(MADE).strip()
        if not words:
            raise InputError(
                f"--reference {settings.reference!r} needs a prompt, as in 'made:a red two on white'."
            )
        reference = made(
            pipe, words, seed=settings.seed + 1_000_003, guidance_scale=how.guidance_scale,
            height=settings.height, width=settings.width,
        )  # fmt: skip
    judge = settings.judge or (None if _built_in(settings) else CLIP)
    run = recipe.guide_object(
        pipe,
        settings.prompt,
        reference,
        how,
        _sampling(settings),
        clip=clip,
        judge=judge,
        also=also,
        name=settings.reference,
    )
    _finish(run, settings, how, "guide object")


def class_(settings: ClassSettings) -> None:
    """Pictures of a prompt in which a classifier sees a class."""
    from ..losses import ClassTarget, load_classifier
    from ..recipes import guided_class as recipe

    ClassTarget(settings.label, load_classifier(settings.classifier))  # a wrong label costs no time
    how = _how(settings, recipe)
    pipe = open_pipeline(settings)
    run = recipe.guide_class(
        pipe, settings.prompt, settings.label, how, _sampling(settings), classifier=settings.classifier,
        clip=_clip(settings),
    )  # fmt: skip
    _finish(run, settings, how, "guide class")


def _built_in(settings: GuideSettings) -> bool:
    return settings.model in BUILT_IN


def _clip(settings: GuideSettings) -> str | None:
    return settings.clip or (None if _built_in(settings) else CLIP)


def _how(settings: GuideSettings, recipe: Any) -> Any:
    """The recipe's settings for this sort of model, with those that were given in their place."""
    names = (
        "num_inference_steps",
        "guidance_scale",
        "n",
        "start",
        "stop",
        "strength",
        "subgrid",
        "one_step",
        "scheduler",
    )
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    if settings.repeats is not None:
        given["repeats"] = read_repeats(settings.repeats)
    if _built_in(settings):
        return recipe.built_in(settings.model, **given)
    return replace(recipe.PAPER, **given)


def read_repeats(text: str | int) -> int | tuple[tuple[float, int], ...]:
    """``2``, or ``"0.3:1,0.4:2"`` as ((0.3, 1), (0.4, 2)).

    Raises:
        InputError: it is neither.
    """
    if isinstance(text, int):
        return text
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((float(at), int(count)) for at, count in pairs)
    except ValueError:
        raise InputError(
            f"--repeats {text!r} must be a number, or numbers by parts of the run such as 0.3:1,0.4:2 (once from 0.3 "
            "of the run on, twice from 0.4 on)."
        ) from None


def write_repeats(repeats: int | tuple[tuple[float, int], ...]) -> str | int:
    """What :func:`read_repeats` reads."""
    if isinstance(repeats, int):
        return repeats
    return ",".join(f"{at:g}:{count}" for at, count in repeats)


def _sampling(settings: GuideSettings) -> Any:
    from ..recipes.guiding import Sampling

    names = (
        "samples",
        "seed",
        "height",
        "width",
        "negative_prompt",
        "memory",
        "strip",
        "out",
        "resume",
        "progress",
    )
    return Sampling(**{name: getattr(settings, name) for name in names})


def _finish(run: Any, settings: GuideSettings, how: Any, name: str) -> None:
    """Leave complete settings, draw the page, and print the table."""
    from rich.console import Console
    from rich.table import Table

    from ..report.comparison import comparison

    chosen = {k: v for k, v in vars(how).items() if v is not None} | {"repeats": write_repeats(how.repeats)}
    shown = comparison(run.record)
    table = Table(title=run.record["title"], title_justify="left", title_style="bold")
    table.add_column("")
    for way in shown["ways"]:
        table.add_column(way, justify="right")
    for row in shown["rows"]:
        cells = (f"[bold]{cell['text']}[/bold]" if cell["best"] else cell["text"] for cell in row["cells"])
        table.add_row(row["name"], *cells)
    Console(highlight=False).print(table)
    finish(run, settings.model_copy(update=chosen), name)


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(
        name="guide", no_args_is_help=True,
        help="Guided pictures beside unguided and one-step ones: style, aesthetic, object, class.",
    )  # fmt: skip
    command(
        group, StyleSettings,
        'backdrift guide style "a blue two on fur" --reference painting.jpg --steps 30',
        'backdrift guide style "a cat" --model path/to/sd15 --reference painting.jpg --memory 16GiB',
    )(style)  # fmt: skip
    command(group, AestheticSettings, 'backdrift guide aesthetic "a red seven on grass" --steps 30')(
        aesthetic
    )
    command(
        group, ObjectSettings,
        'backdrift guide object "a red digit on grass" --reference "made:a red two on white" --steps 30',
    )(object_)  # fmt: skip
    command(group, ClassSettings, 'backdrift guide class "a red digit on white" --label seven --steps 30')(
        class_
    )
    app.add_typer(group, name="guide")
