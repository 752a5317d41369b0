"""Pictures, their losses, and the gradient of these with respect to what is optimised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, MissingGradientError, NonFiniteError
from ..losses.in_parts import InParts, scored_in_parts
from ..stats import RunStats
from ..trace import Trace
from .options import Options
from .randomness import generator
from .subject import Example
from .variables import Variable

#: images (n, 3, H, W) and the examples they were made from -> one value per sample (n,)
Objective = Callable[[Tensor, Sequence[Example]], Tensor]


@dataclass
class Measured:
    """What was measured; nothing of it has a graph.

    Attributes:
        images: (n, 3, H, W).
        losses: (n,).
        gradients: by parameter; empty where none was taken.
        flagged: (n,) booleans: what the pipeline's safety checker says; all false without one.
        trace: the gradient on its way through the sampler's steps (:meth:`~backdrift.Trace.as_dict`); None where none
            was taken.
    """

    images: Tensor
    losses: Tensor
    gradients: dict[str, Tensor]
    flagged: Tensor
    trace: dict[str, Any] | None = None


class Measure:
    """Makes pictures of examples and measures them.

    Args:
        scorer: the loss inside the objective, for which a budget leaves room, evaluating it on a few pictures at a time
            if that is what the plan says; None for one that needs none.
        heldout: the loss inside another objective, that scores pictures without a gradient: the same.
        stats: where network calls, redone calls, vector–Jacobian products and the peak are added up.
    """

    def __init__(
        self,
        pipe: Any,
        variable: Variable,
        options: Options,
        scorer: Any,
        stats: dict[str, Any],
        heldout: Any = None,
    ) -> None:
        self.pipe, self.variable, self.options, self.stats = pipe, variable, options, stats
        self.scorer = None if scorer is None else InParts(scorer, heldout=heldout)
        self._divided: list[Objective] = []  # what has been found to have the same values in parts

    def __call__(
        self,
        examples: Sequence[Example],
        batch: Sequence[int],
        objective: Objective,
        *,
        gradient: bool,
        draw: int = 0,
    ) -> Measured:
        """Measure the examples with indices ``batch``, in chunks; ``draw`` is the number of the iteration.

        The gradient is that of the sum of the losses where samples are independent (so that a sample's path
        does not depend on its company), else that of their mean.
        """
        size = self.options.chunk or len(batch)
        images, losses = [], []
        flags: list[bool] = []
        gradients: dict[str, Tensor] = {}
        traces: list[Trace] = []
        share = 1.0 if self.variable.independent else 1.0 / len(batch)
        for start in range(0, len(batch), size):
            part = list(batch[start : start + size])
            chosen = [examples[j] for j in part]
            made, tracked = self._generate(chosen, examples, part, gradient, draw)
            leaf = made.detach().requires_grad_(gradient)
            check_finite(pictures=leaf)
            # The loss has its own graph, freed before the sampler's is walked: their memory does not add up.
            with torch.set_grad_enabled(gradient):
                values = self.score(objective, leaf, chosen)
            check_finite(loss=values)
            if gradient:
                pull = pull_on_pictures(values, leaf)
                check_finite(**{"gradient of the loss": pull})
                self._pull(made, pull * share, gradients)
                traces.append(tracked.trace)
            self._tally(tracked.stats)
            images.append(leaf.detach())
            losses.append(values.detach())
            flags += tracked.flagged or [False] * len(part)
        check_finite(**{f"gradient of {name}": g for name, g in gradients.items()})
        flagged = torch.tensor(flags, device=images[0].device)
        return Measured(torch.cat(images), torch.cat(losses), gradients, flagged, Trace.together(traces))

    def score(
        self, objective: Objective, images: Tensor, chosen: Sequence[Example], name: str = "loss"
    ) -> Tensor:
        """The losses (n,), on as many pictures at a time as the plan of the last call with a gradient says."""

        def score(part: Tensor, rows: slice) -> Tensor:
            wide = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
            return check_values(objective(wide, chosen[rows]), len(part))

        size = None if self.scorer is None else self.scorer.size
        if size is None or size >= len(images):
            return score(images, slice(0, len(images)))
        known = any(objective is one for one in self._divided)
        values = scored_in_parts(score, images, size, check=not known, name=name)
        if not known:
            self._divided.append(objective)
        return values

    def _generate(
        self,
        chosen: Sequence[Example],
        examples: Sequence[Example],
        batch: list[int],
        gradient: bool,
        draw: int,
    ) -> tuple[Tensor, Any]:
        """The pictures (n, 3, H, W), with a graph if ``gradient``, and what ``differentiable`` counted."""
        from ..pipelines.differentiable import differentiable

        options = self.options
        with torch.set_grad_enabled(gradient):
            call = {**options.call, **self.variable.call(self.pipe, examples, batch)}
            if isinstance(call.get("negative_prompt"), str):
                call["negative_prompt"] = [call["negative_prompt"]] * len(batch)
            draws = [
                j if example.draw is None else example.draw for j, example in zip(batch, chosen, strict=True)
            ]
            call["generator"] = [generator(options.seed, "sampler", j) for j in draws]
            train = self.variable.train if gradient else None
            with differentiable(
                self.pipe,
                memory=options.memory,
                train=train,
                clamp=options.clamp,
                through=options.choice.at(draw),
                loss=self.scorer,
            ) as tracked:
                images = self.pipe(**call, output_type="pt").images
        for example, image in zip(chosen, images, strict=True):
            if example.target is not None and example.target.shape != image.shape:
                raise InputError(
                    f"The target of {example.prompt!r} has the shape {tuple(example.target.shape)}, the picture "
                    f"{tuple(image.shape)}; resize the target, or set height= and width=."
                )
        return images, tracked

    def _pull(self, images: Tensor, pull: Tensor, into: dict[str, Tensor]) -> None:
        """Add the vector–Jacobian product of ``pull`` with respect to every parameter to ``into``."""
        names, leaves = zip(*self.variable.parameters.items(), strict=True)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if images.requires_grad:
            found = torch.autograd.grad(images, leaves, pull.to(images.dtype), allow_unused=True)
        lost = [name for name, g in zip(names, found, strict=True) if g is None]
        if lost:
            shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
            raise MissingGradientError(
                f"No gradient reaches {len(lost)} of {len(names)} tensors ({shown}): the pictures do not depend on "
                "them. Leave them out of over=."
            )
        for name, g in zip(names, found, strict=True):
            assert g is not None
            into[name] = into[name] + g if name in into else g

    def _tally(self, stats: RunStats) -> None:
        more = {"network_calls": stats.network_calls, "redone": stats.calls_redone, "vjps": stats.vjps}
        for name, count in more.items():
            self.stats[name] = (self.stats[name] or 0) + count
        self.stats["peak_bytes"] = max(stats.peak_bytes, self.stats["peak_bytes"] or 0)


def check_values(values: Any, batch: int) -> Tensor:
    """The losses as a tensor (batch,).

    Raises:
        InputError: they are something else.
    """
    if isinstance(values, Tensor) and values.shape == (batch,) and values.is_floating_point():
        return values
    got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise InputError(
        f"The loss must return one value per sample, a floating-point tensor of shape ({batch},); it returned {got}. "
        "Reduce over pixels only, for instance with `.flatten(1).mean(1)`."
    )


def check_finite(**tensors: Tensor) -> None:
    """Raise :class:`NonFiniteError` that names the first of ``tensors`` that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor.detach())
        if bad.any():
            rows = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist() if bad.ndim else [0]
            where = (
                f" (row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:5]))})" if bad.ndim else ""
            )
            raise NonFiniteError(f"NaN or infinity in the {name}{where}.")


def pull_on_pictures(values: Tensor, images: Tensor) -> Tensor:
    """The gradient of the sum of ``values`` with respect to ``images``.

    Raises:
        InputError: ``values`` do not depend on ``images``.
    """
    pull = None
    if values.requires_grad:
        (pull,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
    if pull is None:
        raise InputError(
            "The loss does not depend on the pictures (or was cut off from them by detach(), no_grad(), NumPy or PIL): "
            "there is no gradient. Compute it with torch operations on the images it is given."
        )
    return pull
