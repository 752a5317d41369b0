"""``backdrift audit``: how easily is a moderation filter evaded?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import typer
from pydantic import Field, field_validator

from ..errors import InputError
from .command import command
from .fields import BUILT_IN, THROUGH, Sampling, Strings
from .finish import finish
from .pipeline import open_pipeline


class AuditSettings(Sampling):
    """Settings of ``audit``."""

    panel: ClassVar[str] = "Options"

    prompt: Strings = Field(description="What asks for the concept that the filter forbids.",
                            json_schema_extra={"argument": True, "metavar": "PROMPT"})  # fmt: skip
    filter: str = Field(
        description="What is audited: safety (the model's own checker), stand-in:four (a real checker on the built-in "
        "CLIP that forbids a harmless concept), class:four or class:four|nine[@model] (a classifier), or "
        "file.py:function (a score, with --threshold).",
        json_schema_extra={"complete": ["safety", "stand-in:four", "class:four"]},
    )
    judge: str | None = Field(
        None,
        description="Is the concept still shown? class:four, or clip:a four/a nine with the concept's text first; "
        "@ names another network. It should not be the filter's own network.",
        json_schema_extra={
            "default": "for the built-in filters: the one of classifier and CLIP that they are not"
        },
    )
    target: str | None = Field(None, description="With class: the class that the search wants.")
    threshold: float | None = Field(None, description="With file.py:function: scores above it are flagged.")
    form: str = Field(
        "margin",
        pattern="^(margin|cross_entropy)$",
        description="With class: descend the margin of the logits or the cross-entropy.",
        json_schema_extra={"complete": ["margin", "cross_entropy"]},
    )
    tau: list[float] = Field(
        [0.1, 0.8, 0.9],
        description="How far each coordinate of the noise may move; given more than once, each begins anew.",
    )
    seeds: int = Field(4, ge=1, description="Pictures for each prompt: from the seeds --seed, --seed + 1, …")
    steps: int = Field(30, ge=1, description="Updates of the noise, at most.")
    update: str = Field(
        "normalized",
        pattern="^(normalized|adamw|sign)$",
        description="How the noise is updated: normalized, adamw or sign.",
        json_schema_extra={"complete": ["normalized", "adamw", "sign"]},
    )
    random_tries: int | None = Field(
        None,
        ge=0,
        description="Random changes of each noise, as a control.",
        json_schema_extra={"default": "--steps"},
    )
    one_step: bool = Field(True, description="Also try a single step by the gradient's signs.")
    num_inference_steps: int = Field(12, ge=1, description="Steps of the sampler.")
    lr: float | None = Field(
        None, gt=0, description="How far an update moves.", json_schema_extra={"default": "0.15 tau"}
    )
    chunk: int | None = Field(None, ge=1, description="Pictures per call of the pipeline, and per search.")
    memory: str | int = Field("auto", description="Memory plan: auto, min, max, or a budget such as 6GiB.")
    through: str = THROUGH
    clamp: bool = Field(False, description="Clamp what the search sees to [0, 1], which loses gradient.")
    checkpoint_every: int = Field(1, ge=1, description="Iterations between checkpoints.")
    resume: bool = Field(
        True, description="Continue the run that the folder holds, if its settings are the same."
    )
    out: Path | None = Field(
        None, description="Folder of the run.", json_schema_extra={"default": "runs/audit-<settings>"}
    )
    progress: bool = Field(True, description="Show a bar with the loss and the remaining time.")

    @field_validator("tau", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float | str) else value

    @field_validator("tau")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if not value or min(value) <= 0:
            raise ValueError("must be positive numbers")
        return value


def audit(settings: AuditSettings) -> None:
    """Search, near noises whose pictures a filter flags, for noises whose pictures pass and still show the concept.

    Tells how often that succeeds, beside random changes of the same size, and which small changes of the pictures
    would catch what was found. Flagged and found pictures are blurred on the page.
    """
    from ..recipes.audit import audit as run_it
    from ..recipes.audit_judges import as_judge
    from ..recipes.audit_specs import filter_of, filter_with
    from ..through import Through

    Through.parse(settings.through)  # what is wrong with the settings is said before the pipeline is loaded
    options = {"target": settings.target, "threshold": settings.threshold, "form": settings.form}
    what = filter_of(settings.filter, **options)  # type: ignore[arg-type]
    judge = as_judge(settings.judge or _other(settings.filter, settings.model))
    pipe = open_pipeline(settings)
    more = None if settings.negative_prompt is None else {"negative_prompt": settings.negative_prompt}
    sampling = {k: getattr(settings, k) for k in ("height", "width", "num_inference_steps")}
    sampling["guidance_scale"] = settings.guidance
    if what is None:
        call = {k: v for k, v in sampling.items() if v is not None} | (more or {})
        what = filter_with(settings.filter, pipe, call)
    names = ("steps", "update", "lr", "random_tries", "one_step", "chunk", "memory", "clamp", "through",
             "checkpoint_every", "resume", "out", "progress")  # fmt: skip
    run = run_it(
        pipe,
        settings.prompt,
        what,
        judge=judge,
        tau=settings.tau,
        seeds=range(settings.seed, settings.seed + settings.seeds),
        pipeline_kwargs=more,
        **sampling,
        **{name: getattr(settings, name) for name in names},
    )
    for name, value in run.record["figures"].items():
        typer.echo(f"{name}: {value}")
    finish(run, settings, "audit")


def _other(filter_: str, model: str) -> str:
    """A judge for the built-in filters that is not the filter's own network."""
    kind, _, concept = filter_.partition(":")
    if model in BUILT_IN and "@" not in filter_ and concept.isalpha():
        if kind == "stand-in":
            return f"class:{concept}"
        if kind == "class":
            return f"clip:{_texts(concept)}"
    raise InputError(
        "Give a --judge, which says whether the concept is still shown, and is not the filter's own network: for "
        "instance --judge class:four, or --judge 'clip:a four/a nine' with the concept's text first."
    )


def _texts(concept: str) -> str:
    """The concept among its kind, as captions of the built-in CLIP."""
    from ..losses import load_classifier

    kinds = load_classifier().labels.values()
    names = next((names for names in kinds if concept in names), [concept])
    return "/".join(f"a {name}" for name in (concept, *(n for n in names if n != concept)))


def add_to(app: typer.Typer) -> None:
    command(
        app, AuditSettings,
        'backdrift audit "a red four on white" --filter stand-in:four',
        'backdrift audit "a red four on white" "a blue four on grey" --filter class:four --tau 0.8 --seeds 8',
        'backdrift audit "a red four on white" --filter class:four --target nine --out runs/four-to-nine',
    )(audit)  # fmt: skip
