"""``backdrift verify``: how good each gradient method is on a model, a prompt and a loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from pydantic import BeforeValidator, Field

from .command import command
from .config import Settings, dump
from .fields import Strings
from .pipeline import open_pipeline

METHODS: list[Any] = [
    "plain", "exact", "exact:max", "exact:min", "symplectic", "symplectic:stored", "reversible", "continuous",
    "continuous:recompute", "continuous:original", "continuous:exponential", "continuous:data", "continuous:heun",
    "continuous:rk4", "continuous:ab4", "continuous:adaptive", "deis1", "deis2m", "deis2s",
]  # fmt: skip
SOLVERS: list[Any] = [
    "euler", "ddim", "midpoint", "heun", "ralston", "bogacki-shampine", "rk4", "three-eighths", "dormand-prince",
    "ab2", "ab3", "ab4", "ab4:rising", "deis2", "deis3", "deis4", "dpm2", "dpm3", "dpm++2m", "reversible-heun", "edict",
]  # fmt: skip
Counts = Annotated[list[int], BeforeValidator(lambda value: [value] if isinstance(value, int) else value)]


class VerifySettings(Settings):
    """Settings of ``verify``."""

    panel: ClassVar[str] = "Options"

    prompt: str | None = Field(
        None,
        description="What the picture shows.",
        json_schema_extra={"default": "for the built-in: a red seven"},
    )
    loss: str | None = Field(
        None, description="The loss whose gradient is taken, as for optimize.",
        json_schema_extra={"complete": "losses", "default": "for the built-in: class:two"},
    )  # fmt: skip
    over: Strings = Field(
        ["noise"],
        description="By what is differentiated: noise, cond (the prompt's embedding), weights, lora, or patterns.",
        json_schema_extra={"complete": ["noise", "cond", "weights", "lora"]},
    )
    methods: Strings | None = Field(
        None, description="Gradient methods, each with a flag of its own: exact:min, symplectic, continuous, ...",
        json_schema_extra={"complete": METHODS, "default": "one of each kind"},
    )  # fmt: skip
    solver: Strings = Field(
        ["euler"], description="Solver, or several: euler (DDIM), heun, rk4, ab4, dpm++2m, ...",
        json_schema_extra={"complete": SOLVERS},
    )  # fmt: skip
    steps: Counts = Field(
        [10],
        description="Steps asked about (curves: a half and a quarter too); or all, the last one asked about.",
    )
    grid: str | None = Field(
        None, description="Rule of the times: uniform, logsnr, quadratic, karras.",
        json_schema_extra={"complete": ["uniform", "logsnr", "quadratic", "karras"], "default": "logsnr where finite"},
    )  # fmt: skip
    form: str | None = Field(
        None, description="Form of the ODE: original, exponential, data.",
        json_schema_extra={"complete": ["original", "exponential", "data"], "default": "the solver's or model's"},
    )  # fmt: skip
    target: str = Field(
        "sampler",
        pattern="^(sampler|flow)$",
        description="Which gradient is wanted: the sampler's own, or the true flow's.",
        json_schema_extra={"complete": ["sampler", "flow"]},
    )
    tolerance: float = Field(1e-2, gt=0, description="The relative error that will do.")
    memory: str | int | None = Field(
        None, description="What may be held, such as 6GiB.", json_schema_extra={"default": "any"}
    )
    directions: int = Field(3, ge=0, description="Random directions of the finite-difference check.")
    reference_steps: int | None = Field(
        None, ge=8, description="Most steps of the true flow's reference.",
        json_schema_extra={"default": "twice --steps, at least 32"},
    )  # fmt: skip
    guidance_scale: float | None = Field(
        None,
        description="Scale of classifier-free guidance.",
        json_schema_extra={"default": "the pipeline's; 3 for the built-in"},
    )
    negative_prompt: str | None = Field(None, description="What the picture should not show.")
    height: int | None = Field(
        None, gt=0, description="Height in pixels.", json_schema_extra={"default": "the model's"}
    )
    width: int | None = Field(
        None, gt=0, description="Width in pixels.", json_schema_extra={"default": "the model's"}
    )
    out: Path = Field(Path("runs/verify"), description="Folder for the record and the page.")
    json_output: bool = Field(
        False, description="Print the record instead of tables.", json_schema_extra={"flag": "--json"}
    )
    progress: bool = Field(True, description="Show what is being measured.")


def verify(settings: VerifySettings) -> None:
    """Measure gradient methods on a model, a prompt and a loss, and say which one to use.

    Each beside plain autograd, finite differences and the true flow's gradient. On the built-in pipeline about a
    minute on two cores. Writes record.json and report.html with work-precision curves.
    """
    from rich.console import Console

    from ..pipelines.assets import PIPELINES
    from ..report.again import CONFIG
    from ..verification.certificate import GUIDANCE, LOSS, PROMPT
    from ..verification.certificate import verify as measure

    built_in = settings.model in PIPELINES
    names = (
        "methods", "solver", "steps", "grid", "form", "target", "tolerance", "memory", "directions",
        "reference_steps", "negative_prompt", "height", "width", "seed", "out", "progress",
    )  # fmt: skip
    made = measure(
        open_pipeline(settings),
        PROMPT if settings.prompt is None and built_in else settings.prompt,
        LOSS if settings.loss is None and built_in else settings.loss,
        guidance_scale=GUIDANCE if settings.guidance_scale is None and built_in else settings.guidance_scale,
        over=settings.over[0] if len(settings.over) == 1 else settings.over,
        **{name: getattr(settings, name) for name in names},
    )
    dump(settings, settings.out / CONFIG, "verify")
    page = made.save(settings.out)
    if settings.json_output:
        typer.echo(json.dumps(made.record, indent=1, ensure_ascii=False))
        return
    Console(highlight=False).print(made)
    Console(highlight=False, soft_wrap=True).print(f"report: {page}", markup=False)


def add_to(app: typer.Typer) -> None:
    command(
        app, VerifySettings,
        "backdrift verify",
        'backdrift verify --model path/to/pipeline --prompt "a red fox" --loss brightness --steps 32 --out runs/fox',
        "backdrift verify --solver heun --solver ab4 --target flow --tolerance 0.05",
    )(verify)  # fmt: skip
