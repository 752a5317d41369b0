"""The three tables: what guides, what judges, and which pictures are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdrift.losses import CLIPImage, GramStyle, Loss, load_classifier, load_picture, measurements, resolve
from backdrift.recipes.judges import (
    Judge,
    clip_score,
    image_likeness,
    measured,
    open_clip,
    read_as,
    style_of,
)

from .setting import Case, clamped, per_reference

CLIP = "CLIP score"


@dataclass(frozen=True)
class Task:
    """One table.

    Attributes:
        name: of the results file.
        loss: of a reference's name, what guides.
        judges: of a case, what else is measured.
        cases: the reported ones.
        trial: those that strengths are settled on: other noises.
        start, stop: the guided part of the run, for the rules that guide a part.
        drop: by how much the mean CLIP score may fall below that of unguided pictures when a strength is chosen.
    """

    name: str
    loss: Callable[[str], Loss]
    judges: Callable[[Case], list[Judge]]
    cases: tuple[Case, ...]
    trial: tuple[Case, ...]
    start: float = 0.3
    stop: float = 0.7
    drop: float = 5.0

    @torch.no_grad()
    def score(self, case: Case, images: Tensor) -> dict[str, list[float]]:
        """The loss and all judges of finished pictures."""
        seen, prompts = clamped(images), [case.prompt] * len(images)
        found = {"loss": self.loss(case.reference)(seen, prompts)}
        found |= {judge.name: judge.score(seen, prompts) for judge in self.judges(case)}
        return {name: [float(v) for v in values] for name, values in found.items()}


STYLES = ("skimage/coffee", "skimage/astronaut", "skimage/ihc", "skimage/rocket", "sklearn/china")
PROMPTS = ("a red seven on white", "a blue two on grey", "a yellow nine on stars", "a green four on bricks")
SUBJECTS = {
    "red two on white": ("red", 2, "white"),
    "blue seven on white": ("blue", 7, "white"),
    "yellow three on black": ("yellow", 3, "black"),
    "green five on pink": ("green", 5, "pink"),
    "purple eight on yellow": ("purple", 8, "yellow"),
}
PLACES = ("grey", "gravel", "fur", "stars")


@cache
def _clip() -> Any:
    return open_clip(None)


@cache
def _classifier() -> Any:
    return load_classifier(None)


def _digit(prompt: str) -> Judge:
    """Whether the classifier reads the digit that a prompt names."""
    wanted = _classifier().find(prompt.split(" on ")[0].removeprefix("a "))
    return read_as(_classifier(), {"digit": wanted["digit"]}, "digit as named")


@cache
def style_loss(name: str) -> Loss:
    return GramStyle(load_picture(name))


@cache
def _style_judge(name: str) -> Judge:
    return style_of(load_picture(name), "built-in:classifier", 2, "style, classifier")


@cache
def preference_loss(name: str) -> Loss:
    return resolve("preference")


@cache
def subject(name: str) -> Tensor:
    """A held-out real digit in a colour on a flat background, (3, 64, 64)."""
    from training.scenes import BACKGROUNDS, COLOURS, Scene, render

    colour, digit, background = SUBJECTS[name]
    scene = Scene((digit,), (list(COLOURS).index(colour),), BACKGROUNDS.index(background))
    return render([scene], np.random.default_rng(digit), held_out=True)[0]


@cache
def subject_loss(name: str) -> Loss:
    return CLIPImage(subject(name))


def _subject_judges(case: Case) -> list[Judge]:
    digit = SUBJECTS[case.reference][1]
    return [
        image_likeness(subject(case.reference), None, "CLIP-I"),
        clip_score(_clip(), CLIP),
        read_as(_classifier(), {"digit": digit}, "digit as in the reference"),
    ]


def _subject_cases(first: int, chosen: tuple[str, ...], places: tuple[str, ...]) -> tuple[Case, ...]:
    return tuple(
        Case(name, f"a {SUBJECTS[name][0]} digit on {place}", first + k)
        for name in chosen
        for k, place in enumerate(places)
    )


STYLE = Task(
    "style",
    style_loss,
    lambda case: [clip_score(_clip(), CLIP), _style_judge(case.reference), _digit(case.prompt)],
    per_reference(STYLES, PROMPTS, range(7000, 7004)),
    (
        Case("skimage/coffee", "a purple three on white", 9000),
        Case("sklearn/china", "a white five on gravel", 9001),
    ),
)
AESTHETIC = Task(
    "aesthetic",
    preference_loss,
    lambda case: [
        clip_score(_clip(), CLIP),
        measured("colourfulness", measurements.mean_chroma),
        measured("contrast", measurements.contrast),
        _digit(case.prompt),
    ],
    tuple(
        Case(f"noises {block}", p, 7100 + 10 * k + block) for block in range(5) for k, p in enumerate(PROMPTS)
    ),
    (Case("noises", "a purple three on white", 9100), Case("noises", "a white five on gravel", 9101)),
)
OBJECT = Task(
    "object",
    subject_loss,
    _subject_judges,
    _subject_cases(7200, tuple(SUBJECTS), PLACES),
    _subject_cases(9200, ("red two on white",), ("black",))
    + _subject_cases(9201, ("green five on pink",), ("bricks",)),
    start=0.0,
)
TASKS = {task.name: task for task in (STYLE, AESTHETIC, OBJECT)}
