"""Pictures that people prefer, by a model of their preferences (SAG, section 4.2 and appendix B.2).

The paper adds PickScore, HPSv2 and LAION's aesthetic score with the weights 10, 2 and 0.5. Its table has sums of about
10, so the first two are cosines there: our PickScore carries its logit scale of about 100, hence its weight 0.1 in
:data:`PAPER_LOSS`. On the built-in pipelines a small preference model takes their place, trained on a rule that can be
read (light, colour, contrast and crispness); measurements of colour and contrast judge it, and the CLIP score.
"""

from __future__ import annotations

from typing import Any

from ..guidance.measured import STRENGTHS
from ..losses import measurements, resolve
from ..run import Run
from .guiding import Guiding, Sampling, Task, compare
from .judges import by_loss, clip_score, measured, open_clip

#: The paper's sum; each term by the model's own published checkpoint, for each picture's prompt.
PAPER_LOSS = "0.1*pickscore + 2*hpsv2 + 0.5*aesthetic:v2"
#: The built-in preference model.
BUILT_IN_LOSS = "preference"
#: Each guided step twice, then once (B.2); where it changes is that of FreeDoM's code, t = 40 of 100.
PAPER = Guiding(repeats=((0.3, 2), (0.6, 1)))


def built_in(model: str, **given: Any) -> Guiding:
    """The settings for the built-in pipeline ``"sd"`` or ``"flow"`` (:meth:`Guiding.built_in`)."""
    return PAPER.built_in(STRENGTHS["aesthetic"][model], **given)


def guide_aesthetic(
    pipe: Any,
    prompt: str,
    loss: Any = BUILT_IN_LOSS,
    how: Guiding = PAPER,
    sampling: Sampling | None = None,
    *,
    clip: str | None = None,
    judge: str | None = None,
) -> Run:
    """Sample ``prompt`` so that it is liked: unguided, by one-step and by n-step guidance.

    Args:
        pipe: a diffusers pipeline.
        loss: any loss, lower is better: :data:`BUILT_IN_LOSS`, :data:`PAPER_LOSS`, or weights of one's own.
        how, sampling: :class:`~.guiding.Guiding` (for the built-in pipelines: :func:`built_in`) and
            :class:`~.guiding.Sampling`.
        clip: folder or hub id of the CLIP that judges; the built-in one for None.
        judge: a further loss that judges, such as ``"imagereward"``.

    Returns:
        The run; see :func:`~.guiding.compare`.

    Raises:
        InputError: a setting or a loss cannot be used.
    """
    objective = resolve(loss)
    judges = [
        measured("colourfulness", measurements.mean_chroma),
        measured("contrast", measurements.contrast),
        clip_score(open_clip(clip)),
    ]
    if judge is not None:
        judges.insert(0, by_loss(judge, resolve(judge)))
    task = Task(
        "aesthetic",
        f"guide aesthetic: {prompt}",
        objective,
        tuple(judges),
        {"clip": clip, "judge": judge},
    )
    return compare(pipe, prompt, task, how, sampling or Sampling())
