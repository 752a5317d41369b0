"""Settings that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from .config import Settings


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Strings = Annotated[list[str], BeforeValidator(_as_list)]
"""In a settings file one string or a list of them; on the command line given once or more often."""


SHOW_FLAGGED: Any = Field(
    False, description="Show what the pipeline's own safety checker flags; else it is blackened or blurred."
)


BUILT_IN = ("sd", "flow")
BUILT_IN_GUIDANCE = 3.0  # what the cards of the built-in pipelines recommend


THROUGH: Any = Field(
    "all",
    description="Which steps of the sampler carry the gradient: all, last:3, random:3, steps:0,5,-1; with options such "
    "as last:3,detach_input,discount=0.9,clip_step=1.",
    json_schema_extra={"complete": ["all", "last:3", "random:3"]},
)


class Sampling(Settings):
    """How pictures are made."""

    panel: ClassVar[str] = "Sampling"

    height: int | None = Field(
        None, gt=0, description="Height in pixels.", json_schema_extra={"default": "the model's"}
    )
    width: int | None = Field(
        None, gt=0, description="Width in pixels.", json_schema_extra={"default": "the model's"}
    )
    num_inference_steps: int = Field(31, ge=1, description="Steps of the sampler.")
    guidance_scale: float | None = Field(
        None,
        description="Scale of classifier-free guidance.",
        json_schema_extra={"default": "the pipeline's; for the built-in ones 3"},
    )
    negative_prompt: str | None = Field(None, description="What the pictures should not show.")
    show_flagged: bool = SHOW_FLAGGED

    @property
    def guidance(self) -> float | None:
        """The scale of guidance; None for the pipeline's own."""
        if self.guidance_scale is None and self.model in BUILT_IN:
            return BUILT_IN_GUIDANCE
        return self.guidance_scale


class Descending(Sampling):
    """How something is optimised; the settings of ``optimize`` and ``invert`` alike."""

    panel: ClassVar[str] = "Descent"

    steps: int = Field(50, ge=0, description="Updates of what is optimised.")
    optimizer: str = Field(
        "adamw",
        description="torch optimizer: adamw, adam, sgd, ...",
        json_schema_extra={"complete": ["adamw", "adam", "sgd"]},
    )
    lr: float | None = Field(
        None, gt=0, description="Learning rate.", json_schema_extra={"default": "by what is optimised"}
    )
    lr_schedule: str | None = Field(
        None,
        description="constant, linear or cosine.",
        json_schema_extra={"complete": ["constant", "linear", "cosine"], "default": "constant"},
    )
    clip_grad: float | None = Field(None, gt=0, description="Largest norm of an update's gradient.")
    patience: int | None = Field(None, ge=1, description="Stop after so many iterations without improvement.")
    minibatch: int | None = Field(None, ge=1, description="Examples per iteration (not over the noise).")
    chunk: int | None = Field(None, ge=1, description="Examples per call of the pipeline.")
    memory: str | int = Field(
        "auto",
        description="Memory plan: auto, min, max, or a budget such as 6GiB.",
        json_schema_extra={"complete": ["auto", "min", "max", "4GiB", "8GiB", "16GiB"]},
    )
    through: str = THROUGH
    clamp: bool = Field(False, description="Clamp pictures to [0, 1] before the loss, which loses gradient.")
    checkpoint_every: int = Field(1, ge=1, description="Iterations between checkpoints.")
    resume: bool = Field(
        True, description="Continue the run that the folder holds, if its settings are the same."
    )
    out: Path | None = Field(
        None, description="Folder of the run.", json_schema_extra={"default": "runs/<command>-<settings>"}
    )
    progress: bool = Field(True, description="Show a bar with the loss and the remaining time.")

    def descent(self) -> dict[str, Any]:
        """The keywords that ``bd.optimize`` and ``bd.invert`` share."""
        names = (
            "height", "width", "num_inference_steps", "steps", "seed", "optimizer", "lr", "lr_schedule",
            "clip_grad", "patience", "minibatch", "chunk", "memory", "clamp", "through", "checkpoint_every", "resume",
            "out", "progress",
        )  # fmt: skip
        more = {"negative_prompt": self.negative_prompt} if self.negative_prompt is not None else None
        return {name: getattr(self, name) for name in names} | {"pipeline_kwargs": more}
