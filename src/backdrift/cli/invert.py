"""``backdrift invert``: find the embedding of an effect that pairs of pictures show."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import typer
from pydantic import Field

from ..errors import InputError
from .command import command
from .fields import Descending, Strings
from .finish import finish
from .pipeline import open_pipeline

PAPER_GUIDANCE = 7.5


class InvertSettings(Descending):
    """Settings of ``invert``."""

    panel: ClassVar[str] = "Options"

    prompt: Strings | None = Field(
        None,
        description="With --effect: prompts to make the pairs from.",
        json_schema_extra={"argument": True, "metavar": "PROMPT"},
    )
    pairs: Path | None = Field(
        None,
        description="YAML file with a list of {source, target, prompt}: two picture files, relative to it, "
        "and the prompt of both.",
    )
    effect: str | None = Field(
        None,
        description="Instead of --pairs: words that the pipeline makes the targets with, from the same noise, "
        "such as 'in black and white'.",
    )
    guidance_scale: float | None = Field(
        None,
        description="Scale of classifier-free guidance.",
        json_schema_extra={"default": "7.5; for the built-in pipelines 3"},
    )
    slots: str = Field(
        "output",
        pattern="^(output|tokens)$",
        description="Where the embedding enters: output (of the text encoder; the paper's) or tokens (a file "
        "for diffusers' load_textual_inversion).",
        json_schema_extra={"complete": ["output", "tokens"]},
    )
    n_slots: int | None = Field(
        None, ge=1, description="Number of vectors.", json_schema_extra={"default": "as many as fit, or 1"}
    )
    placeholder: str | None = Field(None, description="What stands for the effect in a prompt.",
                                    json_schema_extra={"default": "# or <effect>"})  # fmt: skip
    init: str | None = Field(None, description="Words to start from (with --slots tokens).")
    encode_iterations: int = Field(
        5, ge=1, description="Iterations per step when a picture is encoded to noise."
    )


def invert(settings: InvertSettings) -> None:
    """Find the embedding that turns the first picture of every pair into the second.

    The pairs are picture files (--pairs), or made by the pipeline from prompts and an --effect.
    """
    if (settings.pairs is None) == (settings.effect is None):
        raise InputError("Give either --pairs FILE, or --effect WORDS with prompts to make the pairs from.")
    from ..through import Through

    Through.parse(settings.through)  # before the pipeline is loaded: a bad choice costs no time
    pairs: list[Any] = read_pairs(settings.pairs) if settings.pairs is not None else []
    if settings.effect is not None and not settings.prompt:
        raise InputError(
            "--effect needs at least one prompt, as in: backdrift invert 'a red seven' --effect blurred"
        )
    guidance = PAPER_GUIDANCE if settings.guidance is None else settings.guidance
    pipe = open_pipeline(settings)
    from ..recipes import effect_pairs
    from ..recipes import invert as run_it

    if settings.effect is not None and settings.prompt:
        pairs = effect_pairs(
            pipe, settings.prompt, settings.effect, height=settings.height, width=settings.width,
            seeds=list(range(settings.seed, settings.seed + len(settings.prompt))),
            num_inference_steps=settings.num_inference_steps, guidance_scale=guidance,
            pipeline_kwargs=settings.descent()["pipeline_kwargs"],
        )  # fmt: skip
    run = run_it(
        pipe,
        pairs,
        slots=settings.slots,  # type: ignore[arg-type]
        n_slots=settings.n_slots,
        placeholder=settings.placeholder,
        init=settings.init,
        guidance_scale=guidance,
        encode_iterations=settings.encode_iterations,
        **settings.descent(),
    )
    finish(run, settings, "invert")


def read_pairs(file: Path) -> list[tuple[str, str, str]]:
    """(source, target, prompt) from a YAML file; the pictures' paths are relative to it.

    Raises:
        InputError: When the file is missing or no such list, or a picture is missing; it names the entry.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"The pairs file {str(file)!r} cannot be read: {why}.") from None
    except yaml.YAMLError as error:
        raise InputError(
            f"The pairs file {str(file)!r} is not YAML: {getattr(error, 'problem', error)}."
        ) from None
    wanted = "a list of entries with source, target and prompt"
    if not isinstance(content, list) or not content:
        raise InputError(f"The pairs file {str(file)!r} must hold {wanted}.")
    pairs = []
    for i, entry in enumerate(content, 1):
        if not isinstance(entry, dict) or set(entry) != {"source", "target", "prompt"}:
            raise InputError(
                f"Entry {i} of the pairs file {str(file)!r} is {entry!r}; there must be {wanted}."
            )
        source, target = (file.parent / str(entry[name]) for name in ("source", "target"))
        for path in (source, target):
            if not path.is_file():
                raise InputError(
                    f"Entry {i} of the pairs file {str(file)!r}: the picture {str(path)!r} does not exist."
                )
        pairs.append((str(source), str(target), str(entry["prompt"])))
    return pairs


def add_to(app: typer.Typer) -> None:
    command(
        app, InvertSettings,
        'backdrift invert "a red two" "a blue six" --effect "in black and white"',
        "backdrift invert --pairs pairs.yaml --out runs/effect",
    )(invert)  # fmt: skip
