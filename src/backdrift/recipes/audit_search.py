"""The search for evasions at each tau, its controls, and what is decided on the finished pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..accelerators import doubled
from ..descent import Descent, Example, Options
from ..descent.randomness import generator
from ..progress import progress_bar
from ..record import finite
from ..run import Run
from .audit_filters import Filter
from .audit_judges import Judge, judged
from .audit_noise import NoiseWithin, Signs, random_within
from .audit_pictures import Rendering, eight_bit, psnr, ssim

SEARCH, ONE_STEP, RANDOM = "gradient", "one step", "random"
LEAST = 1e-6  # a score above what counts as done, for pictures that the filter flags by a hair


class Descended(Run):
    """A run whose pictures are all blurred on its page: they show what a filter forbids."""

    def save_picture(self, name: str, images: Tensor, caption: str, *, flagged: bool = True) -> None:
        super().save_picture(name, images, caption, flagged=True)


class Search:
    """An audit at work, writing to its run; what is done is not done again.

    Args:
        samples: examples, and the seeds of their noise.
    """

    def __init__(
        self, run: Run, filter_: Filter, judge: Judge, samples: Sequence[tuple[Example, int]], rendering: Rendering,
        options: Options, *, tries: int, one_step: bool, callback: Callable[[Run, dict[str, Any]], Any] | None,
        progress: bool,
    ) -> None:  # fmt: skip
        self.run, self.filter, self.judge, self.rendering = run, filter_, judge, rendering
        self.examples, self.seeds = [e for e, _ in samples], [s for _, s in samples]
        self.options, self.tries, self.one_step = options, tries, one_step
        self.callback, self.progress = callback, progress

    # -- the start ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make all pictures, ask the filter and the judge."""
        record = self.run.record
        if "audit" not in record:
            every = list(range(len(self.examples)))
            noise = self._starts(every)
            pictures = self._alone(every, noise)
            verdict = self.filter.decide(pictures)
            shown = judged(self.judge, pictures)
            rows = zip(
                every,
                self.seeds,
                verdict.margin.tolist(),
                verdict.flagged.tolist(),
                shown.tolist(),
                strict=True,
            )
            self.run.save_tensors("start", {"noise": noise, "pictures": pictures})
            samples = [
                {
                    "sample": i,
                    "prompt": self.examples[i].prompt,
                    "seed": s,
                    "margin": m,
                    "flagged": f,
                    "shown": j,
                }
                for i, s, m, f, j in rows
            ]
            record["audit"] = {"filter": self.filter.spec, "samples": samples, "searches": []}
            if rates := getattr(self.filter, "rates", None):
                record["audit"]["filter_rates"] = rates
            self.run.save_record()
        self.pictures = self.run.tensors("start")["pictures"]

    @property
    def flagged(self) -> list[int]:
        """Indices of the samples that were flagged at the start: the others are not searched around."""
        return [s["sample"] for s in self.run.record["audit"]["samples"] if s["flagged"]]

    # -- one tau --------------------------------------------------------------------------------------------

    def go(self, tau: float) -> None:
        """The search at one tau and its controls."""
        if not self.flagged:
            return
        for way, find in ((RANDOM, self._random), (ONE_STEP, self._one_step), (SEARCH, self._search)):
            known = [s for s in self.run.record["audit"]["searches"] if (s["tau"], s["way"]) == (tau, way)]
            if known or (way == ONE_STEP and not self.one_step) or (way == RANDOM and not self.tries):
                continue
            noise, costs = find(tau)
            self._decide(tau, way, noise, costs)

    def _decide(self, tau: float, way: str, noise: Tensor, costs: list[dict[str, Any]]) -> None:
        """Render the found noise, each alone, and write down what filter and judge say."""
        flagged = self.flagged
        start = self._starts(flagged)
        pictures, before = self._alone(flagged, noise), self.pictures[flagged]
        verdict, shown = self.filter.decide(pictures), judged(self.judge, pictures)
        moved = (doubled(noise) - doubled(start)).flatten(1)
        columns = {
            "margin": verdict.margin, "passes": verdict.done, "shown": shown, "evades": verdict.done.cpu() & shown,
            "linf": moved.abs().amax(1), "l2": moved.norm(dim=1), "rms": moved.square().mean(1).sqrt(),
            "psnr": psnr(pictures, before), "ssim": ssim(pictures, before),
        }  # fmt: skip
        rows = [
            {
                "sample": i,
                "seed": self.seeds[i],
                **finite({n: c[k].item() for n, c in columns.items()}),
                **costs[k],
            }
            for k, i in enumerate(flagged)
        ]
        name = f"tau-{tau:g}" + ("" if way == SEARCH else f"-{way.replace(' ', '-')}")
        self.run.save_tensors(
            name,
            {
                "samples": torch.tensor(flagged),
                "noise": noise,
                "delta": noise - start.to(noise),
                "pictures": pictures,
            },
        )
        self.run.record["audit"]["searches"].append(
            {"tau": tau, "way": way, "tensors": name, "samples": rows}
        )
        self.run.save_record()

    # -- ways to look for noise -----------------------------------------------------------------------------

    def _search(self, tau: float) -> tuple[Tensor, list[dict[str, Any]]]:
        return self._descend(tau, SEARCH, self.options)

    def _one_step(self, tau: float) -> tuple[Tensor, list[dict[str, Any]]]:
        how = replace(self.options, optimizer=Signs, lr=tau, steps=1, lr_schedule=None)
        return self._descend(tau, ONE_STEP, how)

    def _descend(self, tau: float, way: str, options: Options) -> tuple[Tensor, list[dict[str, Any]]]:
        """The descent over the flagged samples, in parts; the last accepted noise, as the pipeline is handed it."""
        flagged, size = self.flagged, self.rendering.chunk or len(self.flagged)
        found, costs = [], []
        for k, start in enumerate(range(0, len(flagged), size)):
            part = flagged[start : start + size]
            chosen = [self.examples[i] for i in part]
            variable = NoiseWithin(tau)
            settings = options.settings(variable) | {"of": self.run.record["fingerprint"], "part": part}
            sub = Descended.open(
                "audit-descent", settings, title=f"{self.filter.spec}, τ = {tau:g}, {way}, part {k + 1}",
                prompt=[e.prompt for e in chosen], seed=options.seed,
                out=self.run.folder / "descents" / f"tau-{tau:g}-{way.replace(' ', '-')}-{k}",
            )  # fmt: skip
            Descent(
                self.rendering.pipe, variable, chosen, lambda images, _: self.filter(images), options, sub,
                heldout=lambda images, _: self.score(images), scorer=self.filter, progress=self.progress,
                callback=self.callback,
            ).go()  # fmt: skip
            found.append(sub.best.tensors["noise"].to(self.rendering.pipe.dtype))
            costs += _costs(sub.record, len(part))
        return torch.cat(found), costs

    def score(self, images: Tensor) -> Tensor:
        """(n,) 0 for what the filter itself lets pass, as 8-bit pictures; else how far it is from that, positive."""
        verdict = self.filter.decide(eight_bit(images))
        return torch.where(verdict.done, 0.0, verdict.aim.clamp_min(LEAST)).to(images.device, torch.float32)

    def _random(self, tau: float) -> tuple[Tensor, list[dict[str, Any]]]:
        """Random corners of the box until one passes; of a sample that none of :attr:`tries` gets past, the last."""
        flagged, name = self.flagged, f"tau-{tau:g}-random-tries"
        start = self._starts(flagged)
        if name in self.run.record["tensors"]:
            known = self.run.tensors(name)
            noise, tried, done = known["noise"], known["tried"], known["done"]
        else:
            noise, tried = start.clone(), torch.zeros(len(flagged), dtype=torch.int64)
            done = torch.zeros(len(flagged), dtype=torch.bool)
        with progress_bar(self.tries, self.progress, f"random, τ = {tau:g}") as show:
            for k in range(int(tried.max()), self.tries):
                left = (~done).nonzero().flatten().tolist()
                if not left:
                    break
                draws = [generator(self.options.seed, "random", f"{tau:g}", flagged[j], k) for j in left]
                tried_now = random_within(start[left], tau, draws)
                verdict = self.filter.decide(self._rendered([flagged[j] for j in left], tried_now))
                noise[left], tried[left], done[left] = tried_now, k + 1, verdict.done.cpu()
                self.run.save_tensors(name, {"noise": noise, "tried": tried, "done": done})
                self.run.save_record()
                show(k + 1, {"loss": verdict.aim.mean().item()})
        each = self.options.call["num_inference_steps"]
        return noise, [{"tries": int(n), "calls": each * int(n)} for n in tried]

    # -- pictures -------------------------------------------------------------------------------------------

    def _starts(self, chosen: Sequence[int]) -> Tensor:
        return torch.cat([self.examples[i].noise for i in chosen]).cpu().to(self.rendering.pipe.dtype)

    def _rendered(self, chosen: Sequence[int], noise: Tensor) -> Tensor:
        return self.rendering([self.examples[i].prompt for i in chosen], noise, list(chosen))

    def _alone(self, chosen: Sequence[int], noise: Tensor) -> Tensor:
        """Each picture made alone, as whoever reproduces it will: kernels may round otherwise in company."""
        return torch.cat([self._rendered([i], noise[k : k + 1]) for k, i in enumerate(chosen)])

    def tally(self) -> None:
        """Add up what the descents cost, those of earlier processes among them."""
        total = self.run.record["stats"]
        every = [Run.load(f).record["stats"] for f in sorted((self.run.folder / "descents").glob("*/"))]
        for name in ("network_calls", "redone", "vjps", "seconds") if every else ():
            total[name] = sum(stats[name] or 0 for stats in every)
        total["peak_bytes"] = max((stats["peak_bytes"] or 0 for stats in every), default=None)


def _costs(record: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Of each sample: the iteration whose noise was kept, and the network calls until then, forward and back.

    For a sample that never passed: until the end. What the memory plan redid is left out.
    """
    iterations = record["iterations"]
    updates = sum(entry["grad_norm"] is not None for entry in iterations)
    each = record["stats"]["vjps"] // updates if updates else 0
    best = record["best"].get("per_sample") or [{"iteration": record["best"]["iteration"]}] * count
    kept = [entry["iteration"] for entry in best]
    return [
        {"iteration": i, "calls": each * (2 * i + 1), "calls_in_all": each * (2 * updates + 1)} for i in kept
    ]
