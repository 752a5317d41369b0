"""Strengths that suit the built-in pipelines in 100 steps at guidance scale 3; docs/guiding.md says how chosen.

The paper's 0.2 is relative to what classifier-free guidance adds, and that is another thing in a small network. Each
attempt pulls equally far, so half the steps want twice the strength.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..losses import Aesthetic, ClassTarget, CLIPImage, GramStyle, Loss, Preference, VGGStyle
from ..pipelines.assets import built_in
from ..pipelines.refusals import plain_class

STEPS, SCALE = 100, 3.0
#: By what pictures are guided to, then by pipeline.
STRENGTHS = {
    "style": {"sd": 0.06, "flow": 0.03},
    "aesthetic": {"sd": 0.12, "flow": 0.05},
    "object": {"sd": 0.05, "flow": 0.05},
    "class": {"sd": 0.05, "flow": 0.05},
}
KINDS: tuple[tuple[tuple[type[Loss], ...], str], ...] = (
    ((GramStyle, VGGStyle), "style"),
    ((Preference, Aesthetic), "aesthetic"),
    ((CLIPImage,), "object"),
    ((ClassTarget,), "class"),
)
PUBLISHED = 0.2


def usual_strength(pipe: Any, loss: Loss, steps: int, call: Mapping[str, Any]) -> float:
    """The strength for a loss alone: the measured one on a built-in pipeline, else the paper's.

    Args:
        steps: of the run.
        call: the pipeline's arguments; its ``guidance_scale`` counts, since the strength is relative to it.
    """
    name = built_in(pipe)
    if name is None:
        return PUBLISHED
    kinds = [kind for types, kind in KINDS if isinstance(loss, types)]
    of_kind = [STRENGTHS[kind][name] for kind in kinds or STRENGTHS]
    own = inspect.signature(plain_class(type(pipe)).__call__).parameters["guidance_scale"].default
    scale = call.get("guidance_scale", own)
    return min(of_kind) * STEPS / steps * (SCALE / scale if scale > 1 else 1.0)
