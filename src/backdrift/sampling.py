"""``sample``: from noise to data with a chosen solver, grid, form and gradient."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .conditioning import PerStep, check_steps
from .denoiser import Denoiser
from .errors import InputError, MissingGradientError, NonFiniteError, UnsupportedError
from .gradients import Exact, GradientMethod, Job
from .gradients.base import search
from .grids import TimeGrid
from .integrate import Plan
from .nests import tensors
from .noises import Brownian, GivenNoise, Noise
from .schedules import Flow
from .solvers import AdaptiveDormandPrince, Euler, Pair, ReversibleSolver, Solver, State
from .stats import RunStats
from .through import All, Chosen, Through
from .trace import Trace, Watch

Grid = TimeGrid | Sequence[float] | Tensor | None


class Guided(Protocol):
    """What takes a run's steps in place of the solver alone: :class:`backdrift.guidance.Guidance`."""

    def states(self, job: Job) -> Iterable[State]:
        """The states at the nodes after the first, one by one."""


@dataclass(frozen=True)
class Solution:
    """What :func:`sample` returns.

    Attributes:
        x0: state at the last time, (B, …). At sigma = 0 it is the sample; elsewhere the state there.
        times: the grid's nodes (N + 1,), float64, falling; with their graph, where the grid was given by tensors that
            require grad.
        trajectory: the states at all nodes, ``x_T`` first and ``x0`` last, or None if not asked for. Each lies on the
            path to ``x0``, so ``torch.autograd.grad(loss(x0), trajectory[i])`` is the gradient from that
            latent on; a multistep solver's earlier evaluations count as given there.
        nfe: network calls of the forward run.
        stats: calls, redone calls, bytes and seconds; goes on counting during backward passes.
        pair: a reversible solver's last pair, whose first member is ``x0``: what :func:`~backdrift.encode` leads back
            to ``x_T`` without error; else None.
        pairs: a reversible solver's pairs at all nodes, if the trajectory was asked for. A latent on the way is
            then a pair: its gradient is that by both members of ``pairs[i]``.
        trace: the gradient on its way back, filled by ``backward()``; None where the gradient method acts on the whole
            run, the solver is reversible, gradients are off, or inside ``torch.func`` transforms.
    """

    x0: Tensor
    times: Tensor
    trajectory: tuple[Tensor, ...] | None
    nfe: int
    stats: RunStats
    pair: Pair | None = None
    pairs: tuple[Pair, ...] | None = None
    trace: Trace | None = None


def sample(
    model: Denoiser,
    x_T: Tensor | Pair,
    cond: Any = None,
    *,
    solver: Solver | None = None,
    grid: Grid = None,
    form: str | None = None,
    gradient: GradientMethod | None = None,
    noise: Noise | Sequence[Tensor] | Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    trajectory: bool = False,
    check_finite: bool = True,
    through: Through | str = "all",
    guidance: Guided | None = None,
) -> Solution:
    """Solve the probability-flow ODE of ``model`` from ``x_T``; the diffusion SDE with a stochastic solver.

    Args:
        model: network, schedule, prediction and guidance.
        x_T: state at the grid's first time, (B, …): ``alpha * x0 + sigma * noise`` there, so plain noise for
            variance-preserving schedules and flows, ``sigma(T) * noise`` for EDM. A half-precision ``x_T`` is raised to
            float32; whatever the network's dtype, the state keeps its own. With a reversible solver also a
            :class:`~backdrift.Pair`, such as :func:`~backdrift.encode` returns; a tensor stands for it twice.
        cond: the network's conditioning, any nest of tensors; or one for each step
            (:class:`~backdrift.conditioning.PerStep`), or a function ``cond(t)``.
        solver: :class:`~backdrift.solvers.Euler` (DDIM) if None.
        grid: a :class:`TimeGrid`, or falling times; if None 20 uniform steps, and a single interval for an adaptive
            solver, which keeps the nodes given and puts more between them. Times that require grad (the grid's
            ``start`` and ``end``, or the times themselves) get gradients: those between the ends move by the grid's
            rule, or each has its own (docs/gradient-methods.md).
        form: ``"original"``, ``"exponential"`` or ``"data"``; if None, the solver's own, else ``"original"`` for
            rectified flow (dx/dt = u) and ``"exponential"`` otherwise. Beside an end where the form is singular
            one step is taken on a form that is regular there.
        gradient: ``Exact("auto")`` if None. Gradients flow when ``x_T``, ``cond`` or weights require them.
        noise: what a stochastic solver adds: a :class:`~backdrift.noises.Brownian` path, or one tensor of x_T's shape
            per step (gradients reach those that require grad).
        seed: short for ``noise=Brownian(seed)``.
        trajectory: keep the states at all nodes.
        check_finite: look for NaN and infinity in the states (one synchronisation, at the end; not under ``vmap``).
        through: which steps carry the gradient: ``All()``, ``Last(K)``, ``Random(K)``, ``Steps([...])`` or their text
            (:mod:`backdrift.through` has the equations). Step i is interval i of the grid, with all evaluations that
            the solver makes for it (of an adaptive solver, the i-th accepted step); in the others the network is
            called once, without a graph, and its output is a constant. Needs ``Exact`` or ``Plain``.
        guidance: pulls the states by a loss on the finished sample, such as
            :class:`~backdrift.SymplecticAdjointGuidance`; the run has no graph then, and takes no ``gradient`` or
            ``through`` of its own.

    Raises:
        InputError: an argument cannot be used, or no regular form leads over an interval.
        BudgetError: the gradient's memory budget is too small.
        MissingGradientError: the network uses a tensor whose gradient would be lost, or ``through`` leaves out all the
            steps that ``x_T``, a noise or an entry of ``PerStep`` with ``requires_grad`` has a part in.
        UnsupportedError: the gradient method or the solver cannot leave steps out.
        NonFiniteError: a state is not finite; names the first step.

    Example:
        >>> model = Denoiser(network, VP.linear())
        >>> solution = sample(model, x_T, solver=AdamsBashforth(4), grid=TimeGrid("logsnr", steps=20))
        >>> loss(solution.x0).backward()
    """
    if guidance is not None and (gradient is not None or Through.parse(through) != All()):
        raise InputError(
            "a guided run is not differentiated: leave out gradient= and through= (the guidance has a gradient= of its "
            "own)"
        )
    solver, gradient, through = solver or Euler(), gradient or Exact(), Through.parse(through)
    check_arguments(model, solver, gradient)
    plan = plan_for(model, solver, grid, form, _noise(noise, seed))
    check_asked(gradient, plan)
    check_through(through, gradient, plan)
    state = state_for(plan, x_T, gradient, "x_T")
    pair, x = (state, state.first) if isinstance(state, Pair) else (None, state)

    stats, start, before = RunStats(), time.perf_counter(), model.nfe
    job, found = _settled(Job(plan, model, x, cond, stats, trajectory, check_finite, pair), gradient)
    check_steps((cond, model.uncond), len(job.plan.intervals))
    watch = None if guidance is not None else _watch(through, job, gradient)
    job = replace(job, watch=watch)
    states: Iterable[State]
    if guidance is not None:
        states = guidance.states(job)
    else:
        states = gradient.run(job) if found is None else found
    path = [state]
    for state in finite(states, job.plan.times) if check_finite else states:
        path[0 if not trajectory else len(path) :] = [state]
    stats.seconds_forward += time.perf_counter() - start
    graph = job.plan.graph
    times = torch.tensor(job.plan.times, dtype=torch.float64) if graph is None else graph
    nfe = model.nfe - before if guidance is None else stats.calls_forward
    solution = _solution(path, times, trajectory, nfe, stats)
    return solution if watch is None else replace(solution, trace=watch.trace)


def _watch(through: Through, job: Job, gradient: GradientMethod) -> Watch | None:
    """What follows the gradient through the run, its steps chosen; None where it cannot be, or there is none."""
    chosen = through.choose(len(job.plan.intervals))
    # A user's no_grad is meant: nothing is lost that could be had.
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return None
    if not gradient.by_calls or isinstance(job.plan.solver, ReversibleSolver):
        return None
    _check_reached(through, chosen, job)
    watch = Watch(Trace(through))
    watch.begin(chosen)
    return watch


def _check_reached(through: Through, chosen: Chosen, job: Job) -> None:
    """Raise if something that requires grad has a part only in steps that are left out.

    Raises:
        MissingGradientError: naming it.
    """
    lost = [] if not (chosen.cut and job.x.requires_grad) else ["x_T"]
    if isinstance(job.plan.noise, GivenNoise):
        before = job.plan.noise.noises[: chosen.cut]
        lost += [f"the noise of step {i}" for i, noise in enumerate(before) if noise.requires_grad]
    for name, cond in (("cond", job.cond), ("uncond", job.model.uncond)):
        if isinstance(cond, PerStep):
            used = {id(tensor) for i in chosen.steps for tensor in tensors(cond[i])}
            lost += [
                f"{name} of step {i}"
                for i in range(len(cond))
                if any(tensor.requires_grad and id(tensor) not in used for tensor in tensors(cond[i]))
            ]
    if lost:
        raise MissingGradientError(
            f"{lost[0]} requires grad, but with through={through.spec!r} no gradient would reach it: "
            + ("the state is cut" if chosen.cut else "its step is left out")
            + f" (steps that carry it: {', '.join(map(str, chosen.steps))} of {chosen.total}). Choose others"
            + (f", Steps(range({chosen.cut}, {chosen.total})) to keep the state's path" if chosen.cut else "")
            + ", or pass it detached"
        )


def check_through(through: Through, gradient: GradientMethod, plan: Plan) -> None:
    """Raise if steps are to be left out, or the gradient changed, where that cannot be done.

    Raises:
        UnsupportedError: the gradient method acts on the whole run, the solver is reversible, the times require grad,
            or a ``torch.func`` transform is active.
    """
    if through.exact:
        return
    asked = f"through={through.spec!r}"
    if not gradient.by_calls:
        raise UnsupportedError(
            f"{gradient!r} differentiates the run as a whole and cannot do {asked}: use gradient=Exact() or Plain(), "
            "or through=All()"
        )
    if isinstance(plan.solver, ReversibleSolver):
        raise UnsupportedError(
            f"{plan.solver!r} carries a pair of states, for which {asked} has no meaning: use another solver, or "
            "through=All()"
        )
    if plan.graph is not None:
        raise UnsupportedError(
            f"{asked} does not go with times that require grad, which have a part in every step: detach them, or use "
            "through=All()"
        )
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            f"{asked} does not work inside torch.func transforms: use torch.autograd, or through=All()"
        )


def _solution(path: list[State], times: Tensor, trajectory: bool, nfe: int, stats: RunStats) -> Solution:
    pairs = tuple(state for state in path if isinstance(state, Pair))
    firsts = tuple(state.first if isinstance(state, Pair) else state for state in path)
    # A method that knows nothing of pairs starts from one and goes on with first members.
    complete = len(pairs) == len(path)
    return Solution(
        firsts[-1],
        times,
        firsts if trajectory else None,
        nfe,
        stats,
        pairs[-1] if complete else None,
        pairs if complete and trajectory else None,
    )


def _settled(job: Job, gradient: GradientMethod) -> tuple[Job, list[Tensor] | None]:
    """The job on the steps that its adaptive solver accepts; and, where no gradient can be asked for, the states found
    with them."""
    if not isinstance(job.plan.solver, AdaptiveDormandPrince):
        return job, None
    if torch.is_grad_enabled():
        return gradient.settled(job), None
    return search(job)


def check_arguments(model: Denoiser, solver: Solver, gradient: GradientMethod) -> None:
    """Raise if one of the three is something else.

    Raises:
        InputError: it is.
    """
    wanted = ((model, Denoiser, "model"), (solver, Solver, "solver"), (gradient, GradientMethod, "gradient"))
    for value, kind, name in wanted:
        if not isinstance(value, kind):
            hint = " (an instance, so with brackets)" if isinstance(value, type) else ""
            raise InputError(f"{name} must be a {kind.__name__}{hint}; got {value!r}")


def check_asked(gradient: GradientMethod, plan: Plan) -> None:
    """Raise if more is asked of the gradient method than it can give.

    Raises:
        UnsupportedError: the times require grad, or a ``torch.func`` transform is active.
    """
    if plan.graph is not None and not gradient.by_times:
        raise UnsupportedError(
            f"{gradient!r} gives no gradient by the grid's times, which require grad: detach them, or use Plain(), "
            "Exact(), SymplecticAdjoint(), ContinuousAdjoint() or AdjointDEIS()"
        )
    if torch._C._are_functorch_transforms_active() and not gradient.transforms:
        raise UnsupportedError(
            f"{gradient!r} does not work inside torch.func transforms (grad, vjp, jacrev, vmap, …): use "
            "torch.autograd, or gradient=Plain()"
        )


def plan_for(
    model: Denoiser, solver: Solver, grid: Grid, form: str | None, noise: Noise | None = None
) -> Plan:
    """The plan of a run with the defaults of :func:`sample`.

    Raises:
        InputError: the settings do not go together.
    """
    if not isinstance(grid, TimeGrid):
        steps = 1 if isinstance(solver, AdaptiveDormandPrince) else 20
        grid = TimeGrid("uniform", steps) if grid is None else TimeGrid(grid)
    if form is None:
        form = solver.default_form or ("original" if isinstance(model.schedule, Flow) else "exponential")
    nodes = grid.nodes(model.schedule)
    graph = nodes if nodes.requires_grad and torch.is_grad_enabled() else None
    return Plan(solver, form, model.schedule, model.prediction, nodes.tolist(), noise, graph)


def state_for(plan: Plan, start: Tensor | Pair, gradient: GradientMethod, name: str) -> State:
    """The state that a run starts from, in float32 or more: a pair for a reversible solver, else a tensor.

    Args:
        plan: of the run.
        start: what the user gave.
        gradient: the run's gradient method.
        name: what the user calls ``start``.

    Raises:
        InputError: it is no batch of states, or a pair that the solver or the method has no use for.
    """
    for x in start if isinstance(start, Pair) else (start,):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0 or not len(x):
            shown = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"{name} must be a floating tensor (B, …) with B >= 1; got {shown}")
    reversible = isinstance(plan.solver, ReversibleSolver)
    if not isinstance(start, Pair):
        x = start if start.dtype in (torch.float32, torch.float64) else start.float()
        return Pair(x, x) if reversible else x
    kinds = [(x.shape, x.dtype, x.device) for x in start]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"the two of a Pair are alike in shape, dtype and device; got {kinds[0]} and {kinds[1]}"
        )
    if not reversible:
        raise InputError(
            f"{name} is a Pair, the state of a reversible solver; {plan.solver!r} steps from one tensor: pass "
            f"{name}.first, or use the solver that encoded it"
        )
    if not gradient.takes_pairs:
        raise InputError(
            f"{gradient!r} starts from one tensor, not from a Pair: use gradient=Reversible(), Exact() or Plain()"
        )
    return start if start.first.dtype in (torch.float32, torch.float64) else Pair(*(x.float() for x in start))


def finite(states: Iterable[State], times: Sequence[float]) -> Iterator[State]:
    """The states, as they come; when they have ended, raise if one of them was not finite (one synchronisation).

    Raises:
        NonFiniteError: naming the first step.
    """
    flags = []
    for state in states:
        parts = [x.detach().isfinite().all() for x in (state if isinstance(state, Pair) else (state,))]
        flags.append(parts[0] if len(parts) == 1 else parts[0] & parts[1])
        yield state
    # Under vmap nothing can be decided by a value.
    if not flags or any(map(torch._C._functorch.is_batchedtensor, flags)) or bool(torch.stack(flags).all()):
        return
    step = [bool(ok) for ok in flags].index(False)
    raise NonFiniteError(
        f"the state became NaN or infinite in step {step + 1} of {len(flags)}, from t = {times[step]:g} to "
        f"{times[step + 1]:g}: the network's output or x_T is not finite, or the step is far too large"
    )


def _noise(noise: Noise | Sequence[Tensor] | Tensor | None, seed: int | Sequence[int] | None) -> Noise | None:
    if noise is not None and seed is not None:
        raise InputError(f"seed={seed!r} is short for noise=Brownian({seed!r}): give one of noise and seed")
    if seed is not None:
        return Brownian(seed)
    return noise if noise is None or isinstance(noise, Noise) else GivenNoise(noise)
