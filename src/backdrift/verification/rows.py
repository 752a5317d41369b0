"""The rows of a certificate: one per method, solver and number of steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .menu import Claim
from .pull import Difference

Verdict = Literal["yardstick", "exact", "within", "off", "failed", "refused"]
Target = Literal["sampler", "flow"]


@dataclass
class Row:
    """What was measured of one method at one number of steps; None is what is not known.

    Attributes:
        name: of the method.
        method: its representation, ``Exact(memory='max')``.
        claim: what the method claims to give.
        solver: the representation of the solver it ran on.
        form: of the run.
        steps: of the run.
        asked: whether these are the steps that the certificate is asked about; the others make the curves.
        loss: the loss's value.
        own: to the sampler's own gradient.
        flow: to the true flow's gradient.
        flow_uncertainty: how far the latter is itself to be trusted, relative.
        differences: relative mismatch with finite differences along random directions.
        growth: how many times as large the adjoint becomes in a step, the geometric mean over the run.
        largest_growth: the most in any one step.
        norms: ‖dL/dx‖ at the nodes, noise first.
        calls_forward, calls_redone: network calls of sampling and of the way back.
        vjps: vector–Jacobian products with the network.
        seconds: of sampling, loss and way back together, once.
        peak_bytes: the most tensors held meanwhile.
        run_bytes: of it, what the run alone holds (without the loss and a decoder).
        drift: of rebuilt states, by a reversible method.
        verdict: see :mod:`backdrift.verification.verdicts`.
        reason: why it failed or was refused.
    """

    name: str
    method: str
    claim: Claim
    solver: str
    form: str
    steps: int
    asked: bool
    loss: float | None = None
    own: Difference | None = None
    flow: Difference | None = None
    flow_uncertainty: float | None = None
    differences: float | None = None
    growth: float | None = None
    largest_growth: float | None = None
    norms: list[float] | None = None
    calls_forward: int | None = None
    calls_redone: int | None = None
    vjps: int | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    run_bytes: int | None = None
    drift: float | None = None
    verdict: Verdict = "off"
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int | None:
        """Network calls, first and redone."""
        if self.calls_forward is None:
            return None
        return self.calls_forward + (self.calls_redone or 0)

    def error(self, target: Target) -> float | None:
        """The relative error to that gradient; to the flow's, the most it can be: measured plus uncertainty."""
        if target == "sampler":
            return None if self.own is None else self.own.relative
        if self.flow is None or self.flow_uncertainty is None:
            return None
        return self.flow.relative + self.flow_uncertainty

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self) | {"calls": self.calls}
