"""A class of a classifier, by its cross-entropy. Not in the paper; the settings are those of its styles.

A classifier is easily pleased, so it does not judge: a zero-shot CLIP does, by the probability of the wanted class
among the classifier's others.
"""

from __future__ import annotations

from typing import Any

from ..guidance.measured import STRENGTHS
from ..losses import ClassTarget, load_classifier
from ..run import Run
from .guiding import Guiding, Sampling, Task, compare
from .judges import Judge, clip_score, open_clip, read_as, zero_shot

#: As for styles, but from the first step on and twice: what is shown is decided early (SAG, section 4.5).
PAPER = Guiding(start=0.0, repeats=2)
#: More classes than that are not put to a zero-shot CLIP.
MOST_CLASSES = 100


def built_in(model: str, **given: Any) -> Guiding:
    """The settings for the built-in pipeline ``"sd"`` or ``"flow"`` (:meth:`Guiding.built_in`)."""
    return PAPER.built_in(STRENGTHS["class"][model], **given)


def guide_class(
    pipe: Any,
    prompt: str,
    label: str | int,
    how: Guiding = PAPER,
    sampling: Sampling | None = None,
    *,
    classifier: str | None = None,
    clip: str | None = None,
) -> Run:
    """Sample ``prompt`` so that a classifier sees ``label``: unguided, by one-step and by n-step guidance.

    Args:
        pipe: a diffusers pipeline.
        label: a class, or a phrase of several, as in ``"seven"`` or ``"red seven on grass"``.
        how, sampling: :class:`~.guiding.Guiding` (for the built-in pipelines: :func:`built_in`) and
            :class:`~.guiding.Sampling`.
        classifier: folder or hub id of an image classifier of transformers; the built-in one for None.
        clip: folder or hub id of the CLIP that judges; the built-in one for None.

    Returns:
        The run; see :func:`~.guiding.compare`.

    Raises:
        InputError: a setting cannot be used, or the classifier does not know the label.
    """
    network = load_classifier(classifier)
    loss = ClassTarget(label, network)
    whole = open_clip(clip)
    judges: list[Judge] = []
    for head, index in loss.target.items():
        names = list(network.labels[head]) if network.labels else []
        if 2 <= len(names) <= MOST_CLASSES:
            texts = [_caption(prompt, head, name) for name in names]
            judges.append(zero_shot(whole, texts, index, f"p({names[index]}) by CLIP"))
    judges.append(clip_score(whole))
    judges.append(read_as(network, loss.target, f"read as {label} by the guiding classifier"))
    task = Task(
        "class",
        f"guide class: {prompt}, seen as {label}",
        loss,
        tuple(judges),
        {"label": str(label), "classifier": classifier, "clip": clip},
    )
    return compare(pipe, prompt, task, how, sampling or Sampling())


def _caption(prompt: str, head: str, name: str) -> str:
    """What a zero-shot CLIP is asked: the prompt with the head's word made precise, or "a <name>"."""
    return prompt.replace(head, name) if head in prompt.split() else f"a {name}"
