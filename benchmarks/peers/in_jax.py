"""diffrax on the mixture, which is written once more in jax: RecursiveCheckpointAdjoint and BacksolveAdjoint.

The clocks are those of :mod:`benchmarks.peers.equation`. Calls and products are counted by callbacks from inside the
compiled program, in a run of its own; the timed program has none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from .method import Counts, Job, Method
from .problems import FLOAT64, Metric, mixture
from .work import Work

MAX_STEPS = 4096
CHECKPOINTS = 512  # more than any run here has steps, so that none is gone over twice
BETA0, BETA1 = 0.1, 20.0
# name -> class of diffrax; those with an error estimate can choose their own steps.
FIXED = ("Heun", "Tsit5", "Dopri8")
ADAPTIVE = ("Tsit5", "Dopri5", "Dopri8")
CLOCKED = (
    ("time", "original form, uniform t"),
    ("rho", "exponential form"),
    ("lam", "exponential form in log-SNR"),
)


class _Tally:
    """Counted by the program while it runs. Both give a zero that is added to what is counted: the compiler drops what
    nobody needs, and then neither it nor its counting is done."""

    def __init__(self) -> None:
        self.calls = self.products = 0

    def call(self, _: Any) -> Any:
        self.calls += 1
        return np.zeros(())

    def product(self, _: Any) -> Any:
        self.products += 1
        return np.zeros(())


def _log_alpha(t: Any) -> Any:
    return -(BETA1 - BETA0) / 4 * t**2 - BETA0 / 2 * t


def _time_from_lam(lam: Any) -> Any:
    import jax.numpy as jnp

    log_alpha = -jnp.logaddexp(0.0, -2 * lam) / 2
    return -2 * log_alpha / (BETA0 / 2 + jnp.sqrt(BETA0**2 / 4 - (BETA1 - BETA0) * log_alpha))


def _network(tally: _Tally | None) -> Callable[..., Any]:
    """eps(x, t, means, cond) of the mixture, with its own backward rule where it is counted."""
    import jax
    import jax.numpy as jnp

    def plain(x: Any, t: Any, means: Any, cond: Any) -> Any:
        log_alpha = _log_alpha(t)
        alpha, variance = jnp.exp(log_alpha), -jnp.expm1(2 * log_alpha)
        total = (0.4 * alpha) ** 2 + variance
        centred = x[:, None] - alpha * (means + cond[:, None])
        share = jax.nn.softmax(-(centred**2).sum(-1) / (2 * total), axis=1)[..., None]
        return jnp.sqrt(variance) / total * (share * centred).sum(1)

    if tally is None:
        return plain

    def zero(note: Callable[[Any], Any], after: Any) -> Any:
        asked = jax.ShapeDtypeStruct((), jnp.float64)
        found = jax.custom_jvp(lambda v: jax.pure_callback(note, asked, v, vmap_method="sequential"))
        # BacksolveAdjoint takes the tangent of a product and drops the product: what is done is the tangent.
        found.defjvp(lambda values, tangents: (found(*values), found(*tangents)))
        return found(after.ravel()[0])

    @jax.custom_vjp
    def counted(x: Any, t: Any, means: Any, cond: Any) -> Any:
        return plain(x, t, means, cond) + zero(tally.call, x)

    def forward(*inputs: Any) -> Any:
        out, pull = jax.vjp(plain, *inputs)
        return out + zero(tally.call, inputs[0]), pull

    def backward(pull: Any, g: Any) -> Any:
        return pull(g + zero(tally.product, g))

    counted.defvjp(forward, backward)
    return counted


def _ends(clock: str) -> tuple[float, float]:
    work = mixture()
    if clock == "time":
        return -work.start, -work.end
    scale = work.schedule.lam if clock == "lam" else lambda t: -work.schedule.rho(t)
    return float(scale(work.start)), float(scale(work.end))


def _field(clock: str, eps: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    """dy/ds for diffrax: ``field(s, y, (means, cond))``."""
    import jax.numpy as jnp

    def field(s: Any, y: Any, shared: Any) -> Any:
        if clock == "time":
            t = -s
            slope = -(BETA1 - BETA0) / 2 * t - BETA0 / 2
            sigma = jnp.sqrt(-jnp.expm1(2 * _log_alpha(t)))
            return -slope * y + slope / sigma * eps(y, t, *shared)
        lam = s if clock == "lam" else -jnp.log(-s)
        t = _time_from_lam(lam)
        found = -eps(y * jnp.exp(_log_alpha(t)), t, *shared)
        return found * jnp.exp(-lam) if clock == "lam" else found

    return field


@cache
def _program(solver: str, clock: str, adjoint: str, adaptive: bool, counted: bool) -> tuple[Any, _Tally]:
    """The compiled gradient, ``program(knob, x_T, means, cond)``, and what counts in it."""
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    tally, work, (first, last) = _Tally(), mixture(), _ends(clock)
    field = _field(clock, _network(tally if counted else None))
    weights = jnp.asarray(Metric(work.x_T.detach()).weights.numpy())
    start, end = (1.0 if clock == "time" else float(work.schedule.alpha(t)) for t in (work.start, work.end))

    def loss(x: Any, means: Any, cond: Any, knob: Any) -> Any:
        controller: Any = diffrax.PIDController(knob, knob) if adaptive else diffrax.ConstantStepSize()
        way: Any = diffrax.RecursiveCheckpointAdjoint(CHECKPOINTS)
        if (
            adjoint == "BacksolveAdjoint"
        ):  # adaptive: errors of the shared tensors' sums are left out, as is advised
            norm = diffrax.adjoint_rms_seminorm
            back = {"stepsize_controller": diffrax.PIDController(knob, knob, norm=norm)} if adaptive else {}
            way = diffrax.BacksolveAdjoint(**back)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            getattr(diffrax, solver)(),
            first,
            last,
            None if adaptive else (last - first) / knob,
            x / start,
            (means, cond),
            stepsize_controller=controller,
            adjoint=way,
            max_steps=MAX_STEPS,
        )
        x0 = end * solution.ys[-1]
        return (weights * x0 + 0.3 * x0**2).sum() / len(x0)

    program = jax.jit(jax.grad(lambda leaves, knob: loss(*leaves, knob)))
    return program, tally


def prepare(solver: str, clock: str, adjoint: str, adaptive: bool) -> Callable[[Work, float], Job]:
    """Makes jobs of the method; only for the mixture in float64."""

    def job_of(work: Work, value: float) -> Job:
        import jax
        import jax.numpy as jnp

        if work.name != "mixture" or work.x_T.dtype != FLOAT64:
            raise ValueError("diffrax runs on the mixture in float64 only")
        jax.config.update("jax_enable_x64", True)
        how = (solver, clock, adjoint, adaptive)
        leaves = tuple(
            jnp.asarray(v.detach().numpy()) for v in (work.x_T, *work.network.parameters(), work.cond)
        )
        knob = jnp.asarray(float(value))
        found: list[Any] = []
        made: list[Counts] = []

        def differentiate() -> None:
            found[:] = jax.block_until_ready(_program(*how, False)[0](leaves, knob))

        def counted() -> None:
            program, tally = _program(*how, True)
            tally.calls = tally.products = 0
            found[:] = jax.block_until_ready(program(leaves, knob))
            made[:] = [Counts(tally.calls, tally.products)]

        def gradients() -> dict[str, torch.Tensor]:
            x, means, cond = (torch.from_numpy(np.array(v)).flatten() for v in found)
            return {"x_T": x, "cond": cond, "weights": means}

        def counts() -> Counts:
            if not made:
                counted()
            return made[0]

        def peak_bytes() -> int:
            memory = _program(*how, False)[0].lower(leaves, knob).compile().memory_analysis()
            return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)

        return Job(differentiate, gradients, counts, counted, peak_bytes)

    return job_of


def methods() -> list[Method]:
    """All settings."""
    found = []
    for adjoint in ("RecursiveCheckpointAdjoint", "BacksolveAdjoint"):
        for clock, shown in CLOCKED:
            for solver in FIXED if clock != "rho" else ():  # equal steps in rho are no grid for this flow
                found.append(
                    Method("diffrax", adjoint, f"{solver}, {shown}", prepare(solver, clock, adjoint, False))
                )
            for solver in ADAPTIVE:
                found.append(
                    Method(
                        "diffrax", adjoint, f"{solver} adaptive, {shown}",
                        prepare(solver, clock, adjoint, True), knob="tolerance",
                    )
                )  # fmt: skip
    return found
