"""One-step methods for the diffusion SDE: its drift and the noise of a step.

The SDE with noise level eta, in falling time, and in the variables of the exponential form:

    dx = [f x + (1 + eta²)/2 g²/sigma eps] dt + eta g dw,      dy = (1 + eta²) eps drho + eta dB(rho²),   y = x/alpha

(Song et al. 2021; eta = 1 is the reverse of the forward process, eta = 0 the probability-flow ODE). All have the same
marginals. A step's noise is standard normal; a :class:`~backdrift.noises.Brownian` path makes it the same along
every grid, and then each method is of *strong* order 1: it converges to the SDE's solution along that path.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor

from ..errors import InputError
from ..forms import Form, Node
from .base import Solver, Stepper, rescaled


class StochasticStepper(Stepper):
    """One run of a stochastic solver, whose steps are ``mean + std * noise``."""

    @abstractmethod
    def moments(self, form: Form, x: Tensor, a: Node, b: Node) -> tuple[Tensor, float]:
        """Mean and standard deviation of the state at ``b`` given the state ``x`` at ``a``."""

    def step(self, form: Form, x: Tensor, a: Node, b: Node) -> Tensor:
        mean, std = self.moments(form, x, a, b)
        return mean if std == 0 else mean.add(form.noise(mean, std, a, b), alpha=std)


class StochasticSolver(Solver):
    """A method for the diffusion SDE, one evaluation a step.

    Attributes:
        order: the strong order, 1: along a given path, for the state and for its gradient.
        eta: the noise level.
    """

    order = 1

    def __init__(self, eta: float = 1.0) -> None:
        if isinstance(eta, bool) or not isinstance(eta, int | float) or not (eta >= 0 and math.isfinite(eta)):
            raise InputError(f"the noise level eta is a number >= 0 (0: the ODE, 1: the SDE); got {eta!r}")
        self.eta = float(eta)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(eta={self.eta:g})"

    @abstractmethod
    def begin(self) -> StochasticStepper: ...

    def evaluations(self, index: int) -> int:
        return 1

    @property
    def aside(self) -> StochasticSolver:
        return Ancestral(min(self.eta, 1.0))


class _OneStep(StochasticSolver, StochasticStepper):
    """A method that remembers nothing, so it is its own stepper."""

    def begin(self) -> StochasticStepper:
        return self


class Ancestral(_OneStep):
    """Ancestral sampling: DDPM (Ho et al. 2020) at ``eta=1``, DDIM (Song et al. 2021, Eq. 12) at ``eta=0``, and what
    lies between (their Eq. 16), on any schedule:

        x_b = alpha_b x0 + sqrt(sigma_b² - s²) eps + s noise,     s = eta sigma_b sqrt(1 - rho_b²/rho_a²).

    At ``eta=1`` it is SDE-DPM-Solver++ of first order. It is regular at both ends, alpha = 0 and sigma = 0; a step
    to sigma = 0 adds no noise.

    Args:
        eta: noise level, 0 to 1.
        variance: at ``eta=1``, whose variance a step has: ``"small"``, the posterior's (s² above), or ``"large"``, the
            forward step's sigma_a² - (alpha_a/alpha_b)² sigma_b² (DDPM's two choices; diffusers' ``fixed_small`` and
            ``fixed_large``).

    Raises:
        InputError: ``eta`` outside [0, 1], another ``variance``, or ``"large"`` with another ``eta`` than 1.
    """

    forms = ("data",)
    default_form = "data"

    def __init__(self, eta: float = 1.0, variance: str = "small") -> None:
        super().__init__(eta)
        if eta > 1:
            raise InputError(f"Ancestral has noise levels eta from 0 to 1; got {eta!r}")
        if variance not in ("small", "large") or (variance == "large" and eta != 1):
            raise InputError(
                f"variance is 'small', or 'large' with eta=1; got variance={variance!r} with eta={eta!r}"
            )
        self.variance = variance

    def __repr__(self) -> str:
        return f"Ancestral(eta={self.eta:g}{', variance=large' if self.variance == 'large' else ''})"

    def moments(self, form: Form, x: Tensor, a: Node, b: Node) -> tuple[Tensor, float]:
        (alpha_a, sigma_a), (alpha_b, sigma_b) = form.scales(a.t), form.scales(b.t)
        shrink = decay(form, a, b)
        fresh = math.sqrt(1 - shrink**2)
        on_x = sigma_b * math.sqrt(1 - (self.eta * fresh) ** 2) / sigma_a
        mean = rescaled(form.denoised(x, a.t), alpha_b - alpha_a * on_x).add(x, alpha=on_x)
        last = sigma_b == 0
        return mean, 0.0 if last else self.eta * fresh * (sigma_a if self.variance == "large" else sigma_b)


class EulerMaruyama(_OneStep):
    """Euler–Maruyama on the SDE in time: x + h [f x + (1 + eta²)/2 g²/sigma eps] + eta g sqrt(|h|) noise, all at the
    step's start. Where alpha = 0 (there f and g are infinite) the step is :class:`Ancestral`'s.

    Args:
        eta: noise level >= 0.
    """

    forms = ("original",)
    default_form = "original"

    def moments(self, form: Form, x: Tensor, a: Node, b: Node) -> tuple[Tensor, float]:
        if form.scales(a.t)[0] == 0:
            return Ancestral(min(self.eta, 1.0)).moments(form, x, a, b)
        h, level = b.t - a.t, self.eta**2
        mean = x.add(form.drift(x, a.t), alpha=h * (1 + level))
        if level == 0:
            return mean, 0.0
        mean = mean.add(x, alpha=-h * level * float(form.schedule.f(a.t)))
        return mean, self.eta * math.sqrt(-h * float(form.schedule.g2(a.t)))


class ExponentialEuler(_OneStep):
    """Euler's method on the SDE in (y, rho), the linear part and the noise's variance exact:

        y_b = y_a + (1 + eta²) (rho_b - rho_a) eps + eta sqrt(rho_a² - rho_b²) noise.

    With ``eta=1`` it is SDE-DPM-Solver-1 and AdjointDEIS's forward solver; with ``eta=0``, DDIM. A step to sigma = 0
    does add noise: end at sigma > 0, or use :class:`Ancestral`.

    Args:
        eta: noise level >= 0.
    """

    forms = ("exponential",)
    default_form = "exponential"

    def moments(self, form: Form, x: Tensor, a: Node, b: Node) -> tuple[Tensor, float]:
        y = rescaled(x, 1 / form.scale(a.t)).add(form.drift(x, a.t), alpha=(b.s - a.s) * (1 + self.eta**2))
        scale = form.scale(b.t)
        return rescaled(y, scale), scale * self.eta * math.sqrt((a.s - b.s) * (a.s + b.s))


def decay(form: Form, a: Node, b: Node) -> float:
    """rho_b / rho_a = e^-h, from 0 (alpha = 0 at ``a`` or sigma = 0 at ``b``) to 1."""
    (alpha_a, sigma_a), (alpha_b, sigma_b) = form.scales(a.t), form.scales(b.t)
    return (alpha_a / sigma_a) * (sigma_b / alpha_b)
