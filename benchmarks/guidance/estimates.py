"""How good the n-step estimate of the finished picture is, and its gradient, along a run; and where the loss saturates.

The reference is the same ODE solved from the same state in as many steps as the run has left: the finished
picture, but for the order of the run's own scheduler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backdrift.guidance import Attempt
from backdrift.guidance.estimate import Calls, Estimator
from backdrift.losses import load_picture

from .bench import decoded
from .probe import at_step
from .setting import Case, Setting, clamped
from .tasks import STYLES, Task

STEPS = (1, 2, 3, 4, 5, 6, 8, 10)


def along(task: Task, setting: Setting, case: Case, index: int) -> dict[str, Any]:
    """At one step of an unguided run, for each n, means over the batch.

    Returns:
        ``"cells"``: for each n ``pixels``, RMS distance of the estimate's picture from the finished one, clamped;
        ``loss``, of the estimate's picture; ``gap``, |its loss - the finished picture's|; ``cosine``, of the pull and
        the one through all remaining steps; ``size``, the quotient of their norms. And ``"finished loss"``, ``"left"``.
    """

    def look(attempt: Attempt) -> dict[str, Any]:
        host, left = attempt.host, attempt.host.total - attempt.host.index

        def estimate(n: int) -> tuple[Tensor, Tensor, Tensor]:
            found = Estimator().pulled(host, attempt.evaluation, n, attempt.score, Calls())
            return clamped(host.decode(found.x0)), found.values, found.pull.flatten(1)

        picture, loss, pull = estimate(left)
        cells = []
        for n in (n for n in STEPS if n < left):
            a, b, c = estimate(n)
            cells.append(
                {
                    "n": n,
                    "pixels": _mean((a - picture).square().flatten(1).mean(1).sqrt()),
                    "loss": _mean(b),
                    "gap": _mean((b - loss).abs()),
                    "cosine": _mean(torch.cosine_similarity(c, pull)),
                    "size": _mean(c.norm(dim=1) / pull.norm(dim=1)),
                }
            )
        return {"left": left, "cells": cells, "finished loss": _mean(loss)}

    return at_step(setting, case, task.loss(case.reference), index, look)


@torch.no_grad()
def saturation(task: Task, setting: Setting) -> dict[str, Any]:
    """What the style loss says of pictures that are as much in the style as can be, for each reference.

    Returns:
        For each reference the loss of: itself, itself through the autoencoder at the model's size, itself mirrored,
        nine other crops of it (mean), and the other references (mean).
    """
    from backdrift.losses import prepare

    found: dict[str, Any] = {}
    side = setting.pipe.vae_scale_factor * setting.pipe.unet.config.sample_size
    zero, one = torch.zeros(3), torch.ones(3)
    for name in STYLES:
        picture, loss = load_picture(name), task.loss(name)
        small = prepare(picture[None], side, zero, one)
        latents = (
            setting.pipe.vae.encode(2 * small - 1).latent_dist.mean * setting.pipe.vae.config.scaling_factor
        )
        height, width = picture.shape[1:]
        cut = 2 * min(height, width) // 3
        tops = [round(k * (height - cut) / 2) for k in range(3)]
        lefts = [round(k * (width - cut) / 2) for k in range(3)]
        crops = [
            prepare(picture[None, :, t : t + cut, s : s + cut], side, zero, one) for t in tops for s in lefts
        ]
        others = [prepare(load_picture(o)[None], side, zero, one) for o in STYLES if o != name]
        found[name] = {
            "itself": _mean(loss(picture[None])),
            "itself, decoded from its latents": _mean(loss(clamped(decoded(setting.pipe, latents)))),
            "mirrored": _mean(loss(picture[None].flip(-1))),
            "other crops": _mean(loss(torch.cat(crops))),
            "other references": _mean(loss(torch.cat(others))),
        }
    return found


def _mean(values: Tensor) -> float:
    return float(f"{float(values.detach().double().mean()):.6g}")
