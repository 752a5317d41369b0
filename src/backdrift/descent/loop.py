"""The one optimisation loop.

Iteration i makes the pictures with the values it has (0: before any update), measures them, keeps them if
they are the best so far, and updates. The last one, number ``steps``, only measures. All randomness of an
iteration (the loss's, dropout's) is seeded from (seed, i), and the sampler's own noise from (seed, example),
so an iteration depends on nothing but the values at its start: a run that was killed goes on with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NonFiniteError
from ..progress import progress_bar
from ..run import Run
from ..through import Random
from .best import BestSoFar
from .measure import Measure, Measured, Objective, check_finite
from .optimizers import make_optimizer, make_schedule
from .options import Options
from .randomness import generator, seeded
from .subject import Example
from .variables import Variable, total_norm


class Descent:
    """One descent: pipeline, variable, examples and objective, writing to a :class:`~backdrift.run.Run`.

    Args:
        objective: what is differentiated.
        heldout: what decides which pictures are best and when to stop, without a gradient; lower is better.
        heldout_examples: the examples on which ``heldout`` (default: the objective) is measured; default the
            pictures of the iteration.
        callback: called after each update as ``callback(run, entry)``.
        progress: show a bar.
        figures: further rows of the record's table.
        judge: what is said of the best pictures (n, 3, H, W), as further rows of the table.
        scorer: the loss inside ``objective``, for which a memory budget leaves room.
        heldout_scorer: the same inside ``heldout``.
    """

    def __init__(
        self,
        pipe: Any,
        variable: Variable,
        examples: Sequence[Example],
        objective: Objective,
        options: Options,
        run: Run,
        *,
        heldout: Objective | None = None,
        heldout_examples: Sequence[Example] | None = None,
        callback: Callable[[Run, dict[str, Any]], Any] | None = None,
        progress: bool = True,
        figures: dict[str, Any] | None = None,
        judge: Callable[[Tensor], dict[str, Any]] | None = None,
        scorer: Any = None,
        heldout_scorer: Any = None,
    ) -> None:
        self.pipe, self.variable, self.examples, self.objective = pipe, variable, list(examples), objective
        self.options, self.run, self.callback, self.progress = options, run, callback, progress
        self.heldout, self.heldout_examples = heldout, heldout_examples
        self.figures, self.judge = figures or {}, judge
        self.scorer, self.heldout_scorer = scorer, heldout_scorer
        self.best = BestSoFar(options.enough)

    def go(self) -> Run:
        """Descend to the end, from the last checkpoint if there is one; a finished run is returned as it is."""
        if self.run.finished:
            return self.run
        with self.run.writing(), ExitStack() as stack:
            with seeded(self.options.seed, "start"):  # a new LoRA is drawn at random
                stack.enter_context(self.variable.on(self.pipe, self.examples))
            start = self._begin()
            reason = ""
            with progress_bar(self.options.steps, self.progress) as show:
                for i in range(start, self.options.steps + 1):
                    with seeded(self.options.seed, "iteration", i):
                        reason = self._iteration(i)
                    if reason or i == self.options.steps:
                        break
                    if (i + 1) % self.options.checkpoint_every == 0:
                        self._save(i + 1)
                    show(i + 1, self.run.record["iterations"][-1])
                    if self.callback is not None:
                        self.callback(self.run, self.run.record["iterations"][-1])
            self._finish(reason)
        return self.run

    def _begin(self) -> int:
        """Optimizer, schedule and the last checkpoint; returns the iteration to start with."""
        options, values = self.options, list(self.variable.parameters.values())
        if self.variable.independent and options.minibatch:
            raise InputError(
                "minibatch= makes no sense for samples that are optimised each by itself; use chunk=."
            )
        if options.noise_prior and self.variable.prior([0]) is None:
            raise InputError(
                f"noise_prior= is for over='noise'; {self.variable.name!r} has no prior. Leave it at 0."
            )
        rate, arguments = options.rate(self.variable), options.arguments(self.variable)
        self.optimizer = make_optimizer(options.optimizer, values, rate, arguments)
        self.schedule = make_schedule(options.lr_schedule, self.optimizer, options.steps)
        state = self.run.load_checkpoint()
        if state is None:
            self.run.clear()
        else:
            self._set(state["values"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
            self.best.load_state_dict(state["best"], like=values[0])
        self.measure = Measure(
            self.pipe, self.variable, options, self.scorer, self.run.record["stats"], self.heldout_scorer
        )
        return 0 if state is None else int(state["next"])

    def _iteration(self, i: int) -> str:
        """Measure and, but for the last, update. Returns why to stop, or ``""``."""
        began = time.perf_counter()
        batch, last = self._batch(i), i == self.options.steps
        try:
            found = self.measure(self.examples, batch, self.objective, gradient=not last, draw=i)
            prior = self._add_prior(batch, found.gradients)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"Iteration {i}: {error} What was done before is in {str(self.run.folder)!r}; try a smaller lr, "
                "clip_grad, or a wider dtype."
            ) from error
        if i == 0 and not last and not any(bool(g.any()) for g in found.gradients.values()):
            raise InputError(
                "The gradient is exactly zero at the first iteration: the loss does not change with the pictures "
                "(rounding? a threshold? a clamp?), or it is at its minimum already."
            )
        self._enter(i, batch, found, prior)
        if i == 0:
            self._before(found)
        scores = self._judge(i, batch, found, prior)
        reason = self._reason()
        if not reason and not last:
            self._update(found.gradients, scores)
        entry = self.run.record["iterations"][-1]
        entry["seconds"] = time.perf_counter() - began
        stats = self.run.record["stats"]
        stats["seconds"] = (stats["seconds"] or 0.0) + entry["seconds"]
        return reason

    def _reason(self) -> str:
        """Why to stop early, or ``""``."""
        patience, enough = self.options.patience, self.options.enough
        if enough is not None and bool((self.best.scores <= enough).all()):
            return f"the score reached {enough}"
        if patience is not None and self.best.stale >= patience:
            return f"no improvement in {self.best.stale} iterations"
        return ""

    def _enter(self, i: int, batch: list[int], found: Measured, prior: Tensor | None) -> None:
        """The iteration's line in the record."""
        entry = {
            "iteration": i,
            "loss": found.losses.mean().item(),
            "per_sample": found.losses.tolist(),
            "examples": batch,
            "grad_norm": total_norm(found.gradients) if found.gradients else None,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        if prior is not None:
            entry["prior"] = prior.mean().item()
        if found.trace is not None:
            self.run.record["trace"] = {"iteration": i, **found.trace}
            if isinstance(self.options.choice, Random):
                entry["through"] = found.trace["steps"]
            if found.trace["exploding"]:
                entry["exploding"] = True
        self.run.record["iterations"].append(entry)

    def _update(self, gradients: dict[str, Tensor], scores: Tensor) -> None:
        if self.options.clip_grad is not None:
            gradients = self.variable.clip(gradients, self.options.clip_grad)
        for name, parameter in self.variable.parameters.items():
            parameter.grad = gradients[name].to(parameter.dtype)
        self.optimizer.step()
        self.variable.project()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(scores.mean().item())
        elif self.schedule is not None:
            self.schedule.step()

    def _batch(self, i: int) -> list[int]:
        """This iteration's examples: all, or the next ones of the epoch's own shuffling."""
        n, size = len(self.examples), self.options.minibatch
        if size is None or size >= n:
            return list(range(n))
        epoch, k = divmod(i, -(-n // size))
        order = torch.randperm(n, generator=generator(self.options.seed, "epoch", epoch)).tolist()
        return order[k * size : (k + 1) * size]

    def _add_prior(self, batch: list[int], gradients: dict[str, Tensor]) -> Tensor | None:
        """Add the prior's gradient; returns its values (n,) or ``None``."""
        if not self.options.noise_prior:
            return None
        with torch.enable_grad():
            prior = self.variable.prior(batch)
        assert prior is not None  # checked at the start
        check_finite(prior=prior)
        for name in gradients:
            (more,) = torch.autograd.grad(prior.sum(), self.variable.parameters[name], retain_graph=True)
            gradients[name] = gradients[name] + self.options.noise_prior * more
        return prior.detach()

    def _judge(self, i: int, batch: list[int], found: Measured, prior: Tensor | None) -> Tensor:
        """Score the iteration and offer it as the best; returns the scores."""
        entry = self.run.record["iterations"][-1]
        losses, held = found.losses, None
        scores = losses if prior is None else losses + self.options.noise_prior * prior
        if self.heldout_examples is not None:
            everything = list(range(len(self.heldout_examples)))
            held = self.measure(
                self.heldout_examples, everything, self.heldout or self.objective, gradient=False
            ).losses
        elif self.heldout is not None:
            with torch.no_grad():
                chosen = [self.examples[j] for j in batch]
                held = self.measure.score(self.heldout, found.images, chosen, "held-out loss")
        if held is not None:
            entry["heldout"] = held.mean().item()
            scores = held
        if not self.variable.independent or len(scores) != len(losses):
            losses, scores = losses.mean().reshape(1), scores.mean().reshape(1)
            if len(batch) < len(self.examples) and held is None:
                # The batches differ, so the losses of one epoch are compared with those of another.
                epoch = -(-len(self.examples) // len(batch))
                recent = [e["loss"] for e in self.run.record["iterations"][-epoch:]]
                scores = scores.new_tensor([sum(recent) / len(recent)])
        values = {k: v.detach() for k, v in self.variable.parameters.items()}
        self.best.offer(i, values, found, losses, scores)
        self.run.record["best"] = self.best.record(held is not None)
        return scores

    # -- what is written --------------------------------------------------------------------------------

    def _everything(self) -> Measured:
        return self.measure(self.examples, range(len(self.examples)), self.objective, gradient=False)

    def _before(self, found: Measured) -> None:
        if len(found.images) < len(self.examples):
            found = self._everything()
        self.run.record["figures"]["loss before"] = found.losses.mean().item()
        self.run.save_picture("before", found.images, "before", flagged=bool(found.flagged.any()))
        targets = [e.target for e in self.examples if e.target is not None]
        if len(targets) == len(self.examples):
            self.run.save_picture("target", torch.stack(targets), "target")

    def _save(self, following: int) -> None:
        self._save_best()
        self.run.save_checkpoint(
            {
                "next": following,
                "values": {k: v.detach() for k, v in self.variable.parameters.items()},
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "best": self.best.state_dict(),
            }
        )
        self.run.save_record()

    def _save_best(self) -> None:
        self.run.save_tensors("best", self.best.values)
        self.run.save_tensors("best_images", {"images": self.best.images})
        caption = f"after: iteration {self.best.iteration}, loss {self.best.loss:.4g}"
        self.run.save_picture("after", self.best.images, caption, flagged=bool(self.best.flagged.any()))

    def _finish(self, reason: str) -> None:
        """Leave the variable at its best, write that down, and close the run."""
        self._set(self.best.values)
        if len(self.best.images) < len(self.examples):
            with seeded(self.options.seed, "iteration", self.best.iteration):
                found = self._everything()
            self.best.images, self.best.flagged = found.images, found.flagged
            self.best.losses = found.losses.mean().reshape(1)
            self.run.record["best"]["loss"] = self.best.loss
        self._save_best()
        self.run.record["figures"] |= self.figures | {
            "best loss": self.best.loss,
            "best iteration": self.best.iteration,
        }
        if self.judge is not None:
            self.run.record["figures"] |= self.judge(self.best.images)
        self.variable.export(self.pipe, self.run)
        self.run.finish("stopped early" if reason else "finished", reason)

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.variable.parameters.items():
                parameter.copy_(values[name])
