"""How exact the reversible solvers are: round trips and gradients from rebuilt states, in float64 and float32.

    python -m benchmarks.reversible mixture     # 50 and 200 steps on a Gaussian mixture
    python -m benchmarks.reversible pipeline    # 50 steps on the built-in pipeline's own latents, guided
    python -m benchmarks.reversible table       # print the page's tables from the results; --write puts them there

Results go to ``results/reversible-<problem>.json``. Nothing is timed.
"""

from __future__ import annotations

import copy
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

import backdrift as bd
from backdrift import nests
from backdrift.solvers import ReversibleSolver

from .marked import rewritten

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "reversible.md"
SOLVERS: dict[str, ReversibleSolver] = {
    "McCallumFoster(Euler())": bd.McCallumFoster(bd.Euler()),
    "McCallumFoster(Heun())": bd.McCallumFoster(),
    "McCallumFoster(Midpoint())": bd.McCallumFoster(bd.Midpoint()),
    "McCallumFoster(RK4())": bd.McCallumFoster(bd.RK4()),
    "ReversibleHeun()": bd.ReversibleHeun(),
    "EDICT()": bd.EDICT(),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}

app = typer.Typer(add_completion=False)


class Case(NamedTuple):
    """One run: the model in one dtype, noise to start from, a clean picture, conditioning, and the grid."""

    model: bd.Denoiser
    noise: Tensor
    picture: Tensor
    cond: Any
    grid: bd.TimeGrid


class Mixture(nn.Module):
    """eps for three equal Gaussians N(mean_k, 0.4² I) in three dimensions, in closed form."""

    def __init__(self, schedule: bd.Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        means = [[1.5, 0.0, -0.5], [-1.0, 1.0, 0.5], [0.0, -1.5, 1.0]]
        self.means = nn.Parameter(torch.tensor(means, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        alpha, sigma = (scale(t)[:, None].to(x) for scale in (self.schedule.alpha, self.schedule.sigma))
        total = (0.4 * alpha) ** 2 + sigma**2
        centred = x[:, None] - alpha[..., None] * (self.means + cond[:, None])
        share = torch.softmax(-(centred**2).sum(-1) / (2 * total), dim=1)[..., None]
        return sigma / total * (share * centred).sum(1)


def mixture_case(steps: int, dtype: torch.dtype) -> Case:
    """Between rho = 152 and 0.01 on equal steps of log-SNR; the picture lies between the mixture's centres."""
    schedule = bd.VP.linear()
    network = Mixture(schedule).to(dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 3, generator=generator, dtype=torch.float64).to(dtype)
    picture = (0.7 * network.means[torch.arange(16) % 3] + 0.2 * noise).detach()
    grid = bd.TimeGrid("logsnr", steps, start=1.0, end=float(schedule.t_from_rho(0.01)))
    return Case(bd.Denoiser(network, schedule), noise, picture, 0.1 * noise.flip(0), grid)


def pipeline_case(steps: int, dtype: torch.dtype) -> Case:
    """The built-in pipeline through its view, with guidance; the picture is one of its own."""
    pipe = bd.load()
    view = bd.as_denoiser(pipe, "a red seven", 3.0)
    model, noise = view.model, bd.noise(pipe, seed=0)
    with torch.no_grad():
        picture = bd.sample(model, noise, view.cond, solver=bd.Heun(), grid=bd.TimeGrid("uniform", 12)).x0
    model = copy.copy(model)
    model.network = copy.deepcopy(model.network).to(dtype)  # type: ignore[union-attr]
    model.uncond, cond = (nests.transform(lambda v: v.to(dtype), c) for c in (view.model.uncond, view.cond))
    return Case(model, noise.to(dtype), picture.to(dtype), cond, bd.TimeGrid("uniform", steps))


def distance(found: Any, known: Any) -> float:
    """The largest relative distance of two lists of tensors, each by its norm."""
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in zip(found, known, strict=True))


def round_trips(case: Case, solver: ReversibleSolver) -> dict[str, float]:
    """Both ways, of the worse of the two members; and what the encoded pair looks like."""
    how: dict[str, Any] = {"solver": solver, "grid": case.grid}
    with torch.no_grad():
        pair = bd.encode(case.model, case.picture, case.cond, **how)
        decoded = bd.sample(case.model, pair, case.cond, **how).pair
        sampled = bd.sample(case.model, case.noise, case.cond, **how).pair
        encoded = bd.encode(case.model, sampled, case.cond, **how)  # type: ignore[arg-type]
    return {
        "encode, decode": distance(decoded, (case.picture, case.picture)),
        "decode, encode": distance(encoded, (case.noise, case.noise)),
        "RMS of first": float(pair.first.pow(2).mean().sqrt()),
        "RMS of second": float(pair.second.pow(2).mean().sqrt()),
    }


def gradients(
    case: Case, solver: ReversibleSolver, method: bd.gradients.GradientMethod
) -> tuple[list[Tensor], Any]:
    """By the noise, the conditioning and the weights."""
    x = case.noise.clone().requires_grad_()
    cond = nests.transform(lambda c: c.detach().clone().requires_grad_(), case.cond)
    weights = [p.requires_grad_() for p in case.model.network.parameters()]  # type: ignore[union-attr]
    solution = bd.sample(case.model, x, cond, solver=solver, grid=case.grid, gradient=method)
    loss = ((solution.x0 - case.picture) ** 2).mean()
    found = torch.autograd.grad(loss, [x, *nests.tensors(cond), *weights], allow_unused=True)
    flat = torch.cat([g.flatten() for g in found[2:] if g is not None])
    return [found[0], found[1], flat], solution.stats  # type: ignore[list-item]


def drift(case: Case, solver: ReversibleSolver) -> dict[str, Any]:
    """Reversible() against the gradient of the same run from stored states, without and with checkpoints."""
    known, _ = gradients(case, solver, bd.Exact("min"))
    found: dict[str, Any] = {}
    for checkpoints in (0, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grads, stats = gradients(case, solver, bd.Reversible(1e300, checkpoints=checkpoints))
        found[f"state drift, {checkpoints} checkpoints"] = stats.drift
        found[f"gradient, {checkpoints} checkpoints"] = distance(grads, known)
    return found


def measure(name: str, make: Callable[[int, torch.dtype], Case], counts: tuple[int, ...]) -> None:
    """All solvers and dtypes; written after each, so that a killed run leaves what it had."""
    path, cells = RESULTS / f"reversible-{name}.json", []
    machine = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    for steps in counts:
        for label, solver in sorted(SOLVERS.items(), key=lambda item: item[1].evaluations(1)):
            for kind, dtype in DTYPES.items():
                case = make(steps, dtype)
                cell = {"solver": label, "steps": steps, "dtype": kind}
                cells.append(cell | round_trips(case, solver) | drift(case, solver))
                print(json.dumps(cells[-1]), flush=True)
                text = json.dumps({"machine": machine, "cells": cells}, indent=1)
                path.write_text(text + "\n")


@app.command()
def mixture() -> None:
    """50 and 200 steps on the Gaussian mixture."""
    measure("mixture", mixture_case, (50, 200))


@app.command()
def pipeline(steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 50) -> None:
    """The built-in pipeline. Half an hour on two cores."""
    measure("pipeline", pipeline_case, (steps,))


def rows(name: str) -> str:
    """The table of a results file."""
    columns = ("encode, decode", "decode, encode", "gradient, 0 checkpoints", "gradient, 3 checkpoints")
    lines = ["| solver | N | dtype | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    cells = json.loads((RESULTS / f"reversible-{name}.json").read_text())["cells"]
    for cell in sorted(cells, key=lambda c: (c["steps"], list(SOLVERS).index(c["solver"]))):
        values = " | ".join(f"{cell[c]:.0e}".replace("e-0", "e-").replace("e+0", "e+") for c in columns)
        lines.append(f"| `{cell['solver']}` | {cell['steps']} | {cell['dtype']} | {values} |")
    return "\n".join(lines) + "\n"


@app.command()
def table(write: Annotated[bool, typer.Option("--write", help="Into the page.")] = False) -> None:
    """The page's tables."""
    measured = (name for name in ("mixture", "pipeline") if (RESULTS / f"reversible-{name}.json").exists())
    blocks = {name: rows(name) for name in measured}
    if write:
        PAGE.write_text(rewritten(PAGE.read_text(), blocks))
    else:
        print("\n".join(blocks.values()))


if __name__ == "__main__":
    app()
