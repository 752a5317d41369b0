"""``verify``: how good each gradient method is on one's own model, prompt and loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..budget import parse_size
from ..denoiser import Denoiser
from ..descent.subject import check_prompts, describe_pipeline
from ..errors import InputError
from ..files import write_atomically
from ..grids import TimeGrid
from ..losses import resolve
from ..pipelines.assets import PIPELINES
from ..pipelines.load import load
from ..record import fingerprint, finite, machine, now, versions
from ..report.certificate import FORMAT, write
from ..solvers import RK4, Solver
from .flow import FlowGradient, flow_gradient
from .menu import entries, solver_named
from .problem import Over, Problem, of_denoiser, of_pipeline, own_guidance
from .progress import announced
from .recommendation import Recommendation, recommend
from .rows import Row, Target
from .sampler import Sampler, grid_with
from .table import Tables, as_text
from .verdicts import judge, judge_series, rounding_limit
from .work import Work, with_flow

#: What the built-in pipelines are asked when nothing is said; the guidance is what their cards recommend.
PROMPT, LOSS, GUIDANCE = "a red seven", "class:two", 3.0


@dataclass
class Certificate:
    """What was measured, and what follows.

    ``str()`` is the table; ``print(certificate)`` in a terminal shows it.

    Attributes:
        rows: one per method, solver and number of steps, the yardsticks (plain autograd) among them.
        flow: the true flow's gradient, without the gradient itself: its solver, steps and uncertainty.
        recommendation: for the target that was asked for; the other one's is in ``recommendations``.
        recommendations: by target.
        record: all of it as JSON values; ``record.json`` in the folder.
        report: the page ``report.html``; None until :meth:`save`.
    """

    rows: list[Row]
    flow: FlowGradient
    recommendations: dict[Target, Recommendation]
    record: dict[str, Any]
    report: Path | None = field(default=None)

    @property
    def recommendation(self) -> Recommendation:
        """For the target that was asked for."""
        return self.recommendations[self.record["settings"]["target"]]

    def __str__(self) -> str:
        return as_text(self.record)

    def __rich__(self) -> Any:
        return Tables(self.record)

    def save(self, folder: str | Path) -> Path:
        """Write ``record.json`` and ``report.html`` into a folder; returns the page's path.

        Raises:
            InputError: the folder holds something else than a certificate.
        """
        folder = Path(folder)
        check_folder(folder)
        text = json.dumps(self.record, ensure_ascii=False, indent=1, allow_nan=False)
        write_atomically(folder / "record.json", lambda f: f.write(text.encode()))
        self.report = write(folder)
        return self.report


def verify(
    model: Any = None,
    prompt: str | None = None,
    loss: Any = None,
    *,
    x_T: Tensor | None = None,
    cond: Any = None,
    over: Over = "noise",
    methods: Any = None,
    solver: Any = "euler",
    steps: int | Sequence[int] = 10,
    grid: TimeGrid | str | None = None,
    form: str | None = None,
    target: Target = "sampler",
    tolerance: float = 1e-2,
    memory: str | int | None = None,
    directions: int = 3,
    reference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Certificate:
    """Measure gradient methods on one's own model, prompt and loss, beside references that do not rely on them.

    Of each method at each number of steps: the relative error and cosine to the sampler's own gradient (plain
    autograd's) and to the true flow's gradient; at the most steps also a finite-difference check in float64 and the
    growth of the adjoint from step to step; network calls, vector–Jacobian products, seconds, and the most bytes of
    tensors held.

    Args:
        model: a pipeline that :func:`~backdrift.as_denoiser` takes, a :class:`~backdrift.Denoiser`, or the name of a
            built-in pipeline; the built-in ``"sd"`` if None.
        prompt: for a pipeline: one text.
        loss: for a pipeline anything that :func:`~backdrift.losses.resolve` takes, on pictures (1, 3, H, W) that are
            not clamped; for a denoiser a function of the sample x0 (B, …) that returns one value per sample, or one.
            The built-in pipelines have a prompt and a loss of their own to be tried with.
        x_T, cond: for a denoiser: where the run starts, (B, …), and its conditioning.
        over: by what is differentiated: ``"noise"`` (x_T), ``"cond"`` (all floating tensors of the conditioning),
            ``"weights"`` (all of the denoising network), ``"lora"``, or names or patterns of weights as ``train=`` of
            :func:`~backdrift.differentiable` takes them. Weights have to require grad; none is changed, and their
            ``grad`` stays as it is.
        methods: names (``backdrift.verification.menu.METHODS``), gradient methods, or a mapping from names to methods;
            a selection of all kinds if None.
        solver: a name, a solver, or several. A reversible method runs on the solver's McCallum–Foster coupling.
        steps: the steps asked about; the work–precision curves take a half and a quarter of them as well. Or all of
            them, the last of which is asked about.
        grid: the rule of the times, or a TimeGrid whose rule and ends are kept; equal steps in log-SNR from the
            noisiest to the cleanest trained time if None (equal steps in t where log-SNR is infinite).
        form: of the run; the default of :func:`~backdrift.sample` if None.
        target: which gradient the recommendation is about: ``"sampler"``, of the steps as taken, or ``"flow"``.
        tolerance: the relative error that will do.
        memory: bytes or a size such as ``"6GiB"`` that may be held.
        directions: random directions of the finite differences; 0 for none.
        reference_steps: the most steps of the true flow's reference, by RK4; twice the steps asked about if None, and
            at least 32.
        guidance_scale, negative_prompt, height, width: for a pipeline, as diffusers spells them; its own by default,
            and guidance 3 for the built-in ones.
        seed: of the noise and the directions.
        out: a folder for ``record.json`` and ``report.html``; nothing is written if None.
        progress: show what is being measured.

    Returns:
        The certificate.

    Raises:
        InputError: a setting cannot be used.
        UnsupportedError: the pipeline has no ``Denoiser`` view.
        NonFiniteError: the sampler's own gradient is not finite.
    """
    _check(target, tolerance, directions, over)
    if not isinstance(over, str) and len(over) == 1:
        over = over[0]
    limit = None if memory is None else parse_size(memory)
    counts = _counts(steps)
    solvers = [solver_named(s) for s in (solver if isinstance(solver, list | tuple) else [solver])]
    if out is not None:
        check_folder(Path(out))
    problem, about = _problem(
        model, prompt, loss, x_T, cond, over,
        {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "height": height, "width": width},
        seed,
    )  # fmt: skip

    def sampler(solver: Solver, steps: int) -> Sampler:
        return Sampler(solver, form, grid_with(grid, problem.model.schedule, steps))

    samplers = [[sampler(solver, n) for n in counts] for solver in solvers]
    for group in samplers:
        group[0].plan(problem.model)  # settings that do not go together are refused before anything runs
    work = Work(
        problem, samplers, entries(methods, samplers[0][0].plan(problem.model).form), directions, seed
    )
    most = reference_steps if reference_steps is not None else max(32, 2 * counts[-1])
    flow = _measured(work, lambda n: sampler(RK4(), n), most, tolerance, progress)
    dtype = problem.dtype
    return _certificate(
        work, flow, dtype, target, tolerance, limit,
        about | {
            "over": over if isinstance(over, str) else list(over),
            "steps": counts, "solver": [repr(s) for s in solvers], "grid": repr(samplers[0][-1].grid),
            "form": work.rows[0].form, "seed": seed, "directions": directions, "reference_steps": most,
            "methods": [entry.name for entry in work.entries], "weights": len(problem.weights),
        }, out,
    )  # fmt: skip


def check_folder(folder: Path) -> None:
    """Raise if a certificate cannot be written there without losing something else.

    Raises:
        InputError: it is a file, or holds something that is no certificate.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out={str(folder)!r} is a file; give the name of a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        held = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise InputError(f"out={str(folder)!r} holds something that is no certificate; give another folder.")


def _check(target: str, tolerance: float, directions: int, over: Over) -> None:
    if target not in ("sampler", "flow"):
        raise InputError(f"target is 'sampler' (of the steps as taken) or 'flow'; got {target!r}")
    names = [over] if isinstance(over, str) else list(over) if isinstance(over, list | tuple) else []
    mixed = len(names) > 1 and bool({"noise", "cond"} & set(names))
    if not names or not all(isinstance(name, str) and name for name in names) or mixed:
        raise InputError(
            "over is one of 'noise', 'cond', 'weights' and 'lora', or names of weights such as 'unet.*attn2*'; "
            f"got {over!r}"
        )
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise InputError(f"tolerance must be a positive number; got {tolerance!r}")
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 0:
        raise InputError(f"directions must be a whole number, at least 0; got {directions!r}")


def _counts(steps: int | Sequence[int]) -> list[int]:
    """The numbers of steps, the one asked about last."""
    given: list[Any] = list(steps) if isinstance(steps, list | tuple) else [steps]
    if not given or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in given):
        raise InputError(f"steps must be whole numbers of at least 2; got {steps!r}")
    if len(given) == 1:
        return sorted({max(2, given[0] // 4), max(2, given[0] // 2), given[0]})
    if len(set(given)) < len(given):
        raise InputError(f"steps names a number twice; got {given}")
    return given


def _problem(
    model: Any, prompt: Any, loss: Any, x_T: Any, cond: Any, over: Over, picture: dict[str, Any], seed: int
) -> tuple[Problem, dict[str, Any]]:
    """What is differentiated, and how a record describes it."""
    if isinstance(model, Denoiser):
        given = [name for name, value in {"prompt": prompt, **picture}.items() if value is not None]
        if given:
            raise InputError(f"{given[0]} belongs to a pipeline; a Denoiser takes x_T and cond")
        problem = of_denoiser(model, x_T, cond, loss, over)
        named = getattr(loss, "__qualname__", type(loss).__name__)
        return problem, {"model": repr(model), "prompt": None, "loss": named}
    if x_T is not None or cond is not None:
        raise InputError("x_T and cond belong to a Denoiser; a pipeline takes a prompt and a seed")
    name = "sd" if model is None else model
    built_in = isinstance(name, str)
    if built_in and name not in PIPELINES:
        raise InputError(
            f"model must be a pipeline, a Denoiser, or one of {', '.join(PIPELINES)}; got {model!r}"
        )
    if not built_in and (prompt is None or loss is None):
        missing = "a prompt" if prompt is None else "a loss"
        raise InputError(
            f"a certificate of your own pipeline needs {missing}: verify(pipe, 'a red seven', 'brightness'), say"
        )
    pipe = load(name) if built_in else model
    if built_in and picture["guidance_scale"] is None:
        picture = picture | {"guidance_scale": GUIDANCE}
    prompt, objective = PROMPT if prompt is None else prompt, resolve(LOSS if loss is None else loss)
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be one text; got {prompt!r}")
    check_prompts(pipe, [prompt])
    problem = of_pipeline(pipe, prompt, objective, over=over, seed=seed, **picture)
    guidance = picture["guidance_scale"]
    return problem, {
        "model": describe_pipeline(pipe),
        "prompt": prompt,
        "loss": objective.spec or type(objective).__name__,
        **picture,
        "guidance_scale": own_guidance(pipe) if guidance is None else guidance,
    }


def _measured(work: Work, reference: Any, most: int, tolerance: float, progress: bool) -> FlowGradient:
    """All rows, and the flow's gradient they are compared with."""
    first = max(2, most // 4)
    flow: FlowGradient | None = None
    with announced(work.parts + 4, progress) as say:
        for part in work.steps():
            say(part)
        for found in flow_gradient(work.problem, reference, first, most, tolerance / 5):
            if isinstance(found, str):
                say(found)
            else:
                flow = found
    assert flow is not None
    with_flow(work.rows, work.pulled, flow)
    return flow


def _certificate(
    work: Work,
    flow: FlowGradient,
    dtype: torch.dtype,
    target: Target,
    tolerance: float,
    memory: int | None,
    settings: dict[str, Any],
    out: str | Path | None,
) -> Certificate:
    methods = {entry.name: entry.method for entry in work.entries}
    limits: dict[str, float] = {}
    for row in work.rows:
        same = [s for (name, _), s in work.sampled.items() if name == row.solver and s.rounding is not None]
        limits[row.solver] = rounding_limit(dtype, max((s.rounding or 0.0 for s in same), default=None))
        if row.name in methods:
            judge(row, methods[row.name], limits[row.solver], target, tolerance)
    for name in methods:
        for solver in {row.solver for row in work.rows}:
            judge_series([r for r in work.rows if (r.name, r.solver) == (name, solver)], tolerance)
    found: dict[Target, Recommendation] = {
        "sampler": recommend(work.rows, "sampler", tolerance, memory),
        "flow": recommend(work.rows, "flow", tolerance, memory),
    }
    settings = settings | {"target": target, "tolerance": tolerance, "memory": memory}
    references = [
        {
            "solver": s.sampler.solver.__repr__(),
            "steps": s.sampler.steps,
            "yardstick": "Plain()" if s.plain else "Exact(memory='min')",
            "rounding": s.rounding,
            "differences": s.checked,
            "directions": None if s.slopes is None else len(s.slopes.slopes),
        }
        for s in work.sampled.values()
    ]
    record = {
        "format": FORMAT,
        "kind": "verify",
        "title": _title(settings),
        "created": now(),
        "settings": settings,
        "fingerprint": fingerprint(settings),
        "versions": versions(),
        "machine": machine(work.problem.device),
        "dtype": str(dtype).removeprefix("torch."),
        "rounding": limits,
        "flow": flow.as_dict(),
        "references": references,
        "recommendations": {name: one.as_dict() for name, one in found.items()},
        "rows": [row.as_dict() for row in work.rows],
        "notes": work.notes,
    }
    certificate = Certificate(work.rows, flow, found, finite(record))
    if out is not None:
        certificate.save(out)
    return certificate


def _title(settings: dict[str, Any]) -> str:
    model = settings["model"]
    what = model["class"] if isinstance(model, dict) else str(model).split("(")[0]
    about = f": {settings['prompt']}" if settings["prompt"] else ""
    return f"gradients of {what}{about}"
