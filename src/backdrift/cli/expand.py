"""``backdrift expand``: pictures of a kind for which the pipeline has no word, by a classifier; or a word for it."""

from __future__ import annotations

from typing import Any, ClassVar

import typer
from pydantic import Field

from ..errors import InputError
from .command import command
from .fields import Descending, Strings
from .finish import finish
from .pipeline import open_pipeline

PAPER_GUIDANCE = 7.5


class ExpandSettings(Descending):
    """Settings of ``expand``."""

    panel: ClassVar[str] = "Options"

    prompt: Strings = Field(
        description="What the pictures show; with --over word it may hold the new word, as in 'a red <kind> one'.",
        json_schema_extra={"argument": True, "metavar": "PROMPT"},
    )
    target: str = Field(description="The wanted class of the classifier, by name or number.")
    classifier: str = Field(
        "kinds",
        description="kinds or digits (built in), a folder or hub id of an image classifier of transformers, or your "
        "own, file.py:function.",
        json_schema_extra={"complete": ["kinds", "digits"]},
    )
    over: str = Field(
        "noise",
        pattern="^(noise|word)$",
        description="What is found: noise (pictures of the kind) or word (an embedding that makes them from then on).",
        json_schema_extra={"complete": ["noise", "word"]},
    )
    steps: int = Field(30, ge=0, description="Updates of what is optimised.")
    guidance_scale: float | None = Field(
        None,
        description="Scale of classifier-free guidance.",
        json_schema_extra={"default": "7.5; for the built-in pipelines 3"},
    )
    batch_size: int = Field(1, ge=1, description="Noises per prompt.")
    keep: str | None = Field(
        None, description="A loss that keeps what the prompt said, with its weight, such as 0.05*class:seven."
    )
    judges: Strings | None = Field(
        None,
        description="Losses of a class that are only asked whether they see it, such as class:seven.",
        json_schema_extra={"flag": "--judge"},
    )
    scale: float = Field(0.05, gt=0, description="Weight of the class's loss.")
    cutouts: int = Field(16, ge=0, description="Random crops it is the mean over; 0: the picture as it is.")
    cut_power: float = Field(0.3, gt=0, description="Of the crops' sizes; small ones favour large crops.")
    cut_least: float = Field(
        0.5, gt=0, le=1, description="The smallest crop's side, as a part of the picture's."
    )
    noise_prior: float = Field(0.0, ge=0, description="Weight of the Gaussian prior, with --over noise.")
    enough: float | None = Field(
        None, description="A picture whose loss is at most this is kept as it is then."
    )
    slots: str = Field(
        "tokens",
        pattern="^(output|tokens)$",
        description="Where the word enters: tokens (a file for diffusers' load_textual_inversion) or output (of the "
        "text encoder).",
        json_schema_extra={"complete": ["tokens", "output"]},
    )
    n_slots: int | None = Field(
        None, ge=1, description="Number of the word's vectors.", json_schema_extra={"default": "1"}
    )
    placeholder: str | None = Field(
        None, description="The word itself.", json_schema_extra={"default": "<kind>"}
    )
    init: str | None = Field(None, description="Words it starts from (with --slots tokens).")
    unseen: int = Field(8, ge=0, description="Further noises per prompt on which the word is tried.")
    unseen_prompts: Strings | None = Field(
        None, description="Prompts it is tried on.", json_schema_extra={"default": "the same"}
    )
    labels: Strings | None = Field(None, description="Names of the classes of your own classifier, in order.")
    size: int | None = Field(None, ge=1, description="Side in pixels that your own classifier wants.")
    mean: str | None = Field(
        None, description="Its normalisation of pictures in [0, 1]: three numbers, as in 0.485,0.456,0.406."
    )
    std: str | None = Field(None, description="Its normalisation: three numbers.")


def expand(settings: ExpandSettings) -> None:
    """Make pictures of a kind that a classifier knows and the pipeline has no word for; or learn a word for it.

    The classifier's score of the finished picture is descended through the whole sampling run. Says in how many
    pictures it, and the judges, see the kind: before, after, and for a word on noise it was not learnt from.
    """
    from ..losses import ClassTarget
    from ..recipes.expand import expand as run_it
    from ..recipes.expand_target import classifier_of, judges_of
    from ..through import Through

    Through.parse(settings.through)  # before the pipeline is loaded: a bad choice costs no time
    numbers = {name: _three(name, getattr(settings, name)) for name in ("mean", "std")}
    preparation = {"labels": settings.labels, "size": settings.size} | numbers
    classifier = classifier_of(_own(settings.classifier), **preparation)
    ClassTarget(settings.target, classifier)  # a bad name costs no time either
    judges = judges_of(settings.judges)
    names = ("over", "keep", "batch_size", "scale", "cutouts", "cut_power", "cut_least", "noise_prior", "enough",
             "slots", "n_slots", "placeholder", "init", "unseen", "unseen_prompts")  # fmt: skip
    pipe = open_pipeline(settings)
    run = run_it(
        pipe,
        settings.prompt,
        classifier,
        settings.target,
        judges=judges,
        guidance_scale=PAPER_GUIDANCE if settings.guidance is None else settings.guidance,
        **{name: getattr(settings, name) for name in names},
        **settings.descent(),
    )
    for name, value in run.record["figures"].items():
        if ": seen by " in name:
            typer.echo(f"{name}: {value}")
    finish(run, settings, "expand")


def _three(name: str, text: str | None) -> list[float] | None:
    """Three numbers with commas between them."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != 3:
        raise InputError(
            f"--{name} takes three numbers, one for each colour, as in 0.5,0.5,0.5; got {text!r}."
        )
    return found


def _own(text: str) -> Any:
    """A function of the user's own file, or the text as it is."""
    from pathlib import Path

    from ..losses import FunctionLoss
    from ..losses.spec import from_file

    file, _, function = text.rpartition(":")
    if not file.endswith(".py"):
        return text
    found = from_file(Path(file), function)
    return found.function if isinstance(found, FunctionLoss) else found


def add_to(app: typer.Typer) -> None:
    command(
        app, ExpandSettings,
        'backdrift expand "a blue seven on white" --target "plain seven" --batch-size 4',
        'backdrift expand "a blue <kind> on white" --target "plain seven" --over word --init seven --batch-size 48 '
        '--minibatch 6 --steps 50 --keep "0.05*class:a blue seven on white" --judge class:seven',
        "backdrift expand 'a Cairn terrier' --model path/to/sd --classifier path/to/dogs --target 41",
    )(expand)  # fmt: skip
