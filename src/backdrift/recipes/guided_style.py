"""Style from one picture (SAG, section 4.1 and appendix B.1).

The loss is the Frobenius norm between Gram matrices of CLIP's third block (:class:`backdrift.losses.GramStyle`).
Judges: the same on CLIP's second block, on the built-in classifier (another network) or none, and the CLIP score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..descent.subject import describe_value
from ..guidance.measured import STRENGTHS
from ..losses import GramStyle
from ..run import Run
from .guiding import Guiding, Sampling, Task, compare
from .judges import clip_score, open_clip, style_of
from .references import centre, open_reference

#: The published settings: guided from t = 70 to 31 of 100, each step once until t = 61, then twice; n = 4.
PAPER = Guiding()


def built_in(model: str, **given: Any) -> Guiding:
    """The settings for the built-in pipeline ``"sd"`` or ``"flow"`` (:meth:`Guiding.built_in`)."""
    return PAPER.built_in(STRENGTHS["style"][model], **given)


def guide_style(
    pipe: Any,
    prompt: str,
    reference: str | Path | Tensor,
    how: Guiding = PAPER,
    sampling: Sampling | None = None,
    *,
    clip: str | None = None,
) -> Run:
    """Sample ``prompt`` in the style of ``reference``: unguided, by one-step and by n-step guidance.

    Args:
        pipe: a diffusers pipeline.
        reference: a picture file, a photograph's name such as ``"skimage/coffee"``, or a tensor (3, H, W) in [0, 1].
        how, sampling: :class:`~.guiding.Guiding` (for the built-in pipelines: :func:`built_in`) and
            :class:`~.guiding.Sampling`.
        clip: folder or hub id of the CLIP that guides and judges; the built-in one for None. The paper's is
            ``"openai/clip-vit-base-patch32"``.

    Returns:
        The run; see :func:`~.guiding.compare`.

    Raises:
        InputError: a setting, the reference or the CLIP cannot be used.
    """
    sampling = sampling or Sampling()
    picture, name = open_reference(reference)
    loss = GramStyle(picture, clip)
    judges = [style_of(picture, clip, 2, "style, CLIP's block 2")]
    if clip is None:
        judges.append(style_of(picture, "built-in:classifier", 2, "style, classifier"))
    judges.append(clip_score(open_clip(clip)))
    task = Task(
        "style",
        f"guide style: {prompt}, like {name}",
        loss,
        tuple(judges),
        {"reference": name, "reference_picture": describe_value(picture), "clip": clip},
        (centre(picture), f"the style to take: {name}"),
    )
    return compare(pipe, prompt, task, how, sampling)
