"""Makes cells: one way's pictures of one case, scored and counted."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import backdrift as bd
from backdrift.guidance import Guidance

from .costs import Counts
from .doodl import Doodl
from .results import Cell, Results
from .setting import Case, Setting, picture
from .tasks import Task
from .ways import DOODL, Moves, Scales, Way, mean_scales


class Bench:
    """Measures cells of one task.

    Args:
        task: what guides and judges.
        setting: what is sampled.
        results: where the cells are kept.
        pictures: a folder for the pictures; none are kept if None.
    """

    def __init__(self, task: Task, setting: Setting, results: Results, pictures: Path | None = None) -> None:
        self.task, self.setting, self.results, self.pictures = task, setting, results, pictures

    @cached_property
    def scales(self) -> Scales:
        """The units of Universal Guidance's and TFG's strengths, from unguided runs of the trial's cases."""
        cells = [
            self.results.ensure({"scales": case.key}, lambda c=case: {"found": list(self._scales(c))})
            for case in self.task.trial
        ]
        return mean_scales([Scales(*cell["found"]) for cell in cells])

    def _scales(self, case: Case) -> Scales:
        moves, total = Moves(), self.setting.steps
        self.setting.guide(case, Guidance(moves, self.task.loss(case.reference), start=0.0, stop=1.0))
        return moves.scales([i for i in range(total) if self.task.start <= i / total < self.task.stop])

    def cell(self, way: Way, case: Case) -> Cell:
        """The scores of one way's pictures of one case; made now if they have not been."""
        key = {"way": way.key, "case": case.key}
        known = self.results.find(key) is not None
        cell = self.results.ensure(key, lambda: self._cell(way, case))
        if not known:
            means = {k: f"{sum(v) / len(v):.4g}" for k, v in cell["scores"].items()}
            print(
                f"{self.task.name}: {way.key} {case.reference} | {case.prompt}: {means} {cell['seconds']:.1f} s",
                flush=True,
            )
        return cell

    def _cell(self, way: Way, case: Case) -> Cell:
        scales = self.scales  # measured before the clock starts
        begun = time.perf_counter()
        images, counts, losses = self._sample(way, case, scales)
        seconds = time.perf_counter() - begun
        if self.pictures is not None:
            path = picture_file(self.pictures, self.task.name, way, case)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(picture(images), path)
        return {
            "scores": {k: [_short(v) for v in values] for k, values in self.task.score(case, images).items()},
            "counts": counts._asdict(),
            "seconds": round(seconds, 2),
            "along": [[i, _short(sum(v) / len(v))] for i, v in losses],
        }

    def _sample(
        self, way: Way, case: Case, scales: Scales
    ) -> tuple[Tensor, Counts, list[tuple[int, list[float]]]]:
        if way.rule == DOODL:
            return self._optimise(way, case)
        loss = self.task.loss(case.reference)
        guidance = way.guidance(loss, self.setting.steps, case.seed, scales)
        made = self.setting.guide(case, guidance)
        calls, trace = made.trace.calls, made.trace
        counts = Counts(calls.forward, calls.redone, calls.vjps, trace.decodes)
        return made.images, counts, [(e.index, e.loss) for e in trace.last_attempts if e.loss]

    def _optimise(self, way: Way, case: Case) -> tuple[Tensor, Counts, list[tuple[int, list[float]]]]:
        pipe = self.setting.pipe
        view = bd.as_denoiser(pipe, case.prompt, self.setting.guidance_scale)
        found = Doodl(
            view.model,
            view.cond,
            bd.pipeline_grid(pipe, way.n),
            lambda latents: decoded(pipe, latents),
            self.task.loss(case.reference),
            way.w,
            way.attempts,
            case.seed,
        )(self.setting.noise(case))
        calls = found.calls
        counts = Counts(calls.forward, calls.redone, calls.vjps, found.decodes)
        return found.images, counts, list(enumerate(found.losses))


def picture_file(folder: Path, task: str, way: Way, case: Case) -> Path:
    """Where a cell's pictures are kept, uint8 (batch, 3, H, W)."""
    name = "-".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in way.key.values())
    where = f"{case.reference}-{case.prompt}-{case.seed}".replace("/", "-").replace(" ", "-")
    return folder / task / name / f"{where}.pt"


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures in [0, 1], not clamped, of a Stable Diffusion pipeline's clean latents; differentiable."""
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5


def _short(value: float) -> float:
    return float(f"{value:.6g}")
