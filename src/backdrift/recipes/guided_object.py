"""A subject from one picture of it (SAG, section 4.3 and appendix B.3).

The loss is half the squared angle between CLIP embeddings (:class:`backdrift.losses.CLIPImage`; the paper's CLIP is a
ViT-H/14). CLIP-I is its cosine, so it is no judge of its own: the built-in classifier is, which says whether the
picture shows what it reads in the reference; so is another CLIP, where one is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..descent.subject import describe_value
from ..guidance.measured import STRENGTHS
from ..losses import CLIPImage, Loss, load_classifier, resize, resolve
from ..run import Run
from .guiding import Guiding, Sampling, Task, compare
from .judges import Judge, clip_score, image_likeness, open_clip, read_as
from .references import centre, open_reference

#: The CLIP of the paper's object guidance.
PAPER_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
#: Every guided step is taken twice (B.3), from the first on: "personalization … at the chaotic stage" (section 4.5).
PAPER = Guiding(start=0.0, repeats=2)


def built_in(model: str, **given: Any) -> Guiding:
    """The settings for the built-in pipeline ``"sd"`` or ``"flow"`` (:meth:`Guiding.built_in`)."""
    return PAPER.built_in(STRENGTHS["object"][model], **given)


def guide_object(
    pipe: Any,
    prompt: str,
    reference: str | Path | Tensor,
    how: Guiding = PAPER,
    sampling: Sampling | None = None,
    *,
    clip: str | None = None,
    judge: str | None = None,
    also: Any = None,
    name: str | None = None,
) -> Run:
    """Sample ``prompt`` with the subject of ``reference``: unguided, by one-step and by n-step guidance.

    Args:
        pipe: a diffusers pipeline.
        reference: a picture file, a photograph's name such as ``"skimage/chelsea"``, or a tensor (3, H, W) in [0, 1].
        how, sampling: :class:`~.guiding.Guiding` (for the built-in pipelines: :func:`built_in`) and
            :class:`~.guiding.Sampling`.
        clip: folder or hub id of the CLIP that guides (:data:`PAPER_CLIP`); the built-in one for None.
        judge: another CLIP, which judges likeness to the reference and to the prompt; default the guiding one.
        also: a loss that is added to the subject's, such as ``"0.1*class:two"``: what the CLIP alone misses. What it
            looks at judges no longer.
        name: what to call the reference; default the file's.

    Returns:
        The run; see :func:`~.guiding.compare`.

    Raises:
        InputError: a setting, the reference or a CLIP cannot be used.
    """
    sampling = sampling or Sampling()
    picture, found = open_reference(reference)
    name = name or found
    loss: Loss = CLIPImage(picture, clip)
    if also is not None:
        loss = resolve([(1.0, loss), (1.0, also)])
    whole = open_clip(judge if judge is not None else clip)
    judges = [image_likeness(picture, clip, "CLIP-I")]
    if judge is not None:
        judges.append(image_likeness(picture, judge, "CLIP-I, other CLIP"))
    judges.append(clip_score(whole, "CLIP-T (×100)"))
    if clip is None:
        judges += _reading(picture)
    task = Task(
        "object",
        f"guide object: {prompt}, as in {name}",
        loss,
        tuple(judges),
        {"reference": name, "reference_picture": describe_value(picture), "clip": clip, "judge": judge}
        | ({} if also is None else {"also": resolve(also).spec}),
        (centre(picture), f"the subject: {name}"),
    )
    return compare(pipe, prompt, task, how, sampling)


@torch.no_grad()
def _reading(picture: Tensor) -> list[Judge]:
    """Whether the built-in classifier reads the reference's digit, and its colour, in a picture."""
    classifier = load_classifier()
    seen = {
        head: int(logits.argmax(1))
        for head, logits in classifier(resize(centre(picture), (64, 64))[None]).items()
    }
    return [
        read_as(classifier, {head: seen[head]}, f"{head} read as {classifier.labels[head][seen[head]]}")
        for head in ("digit", "colour")
    ]
