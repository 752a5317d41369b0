"""A whole job: the calls of one sampling run with its loss and backward pass, and what surrounds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..blocks import Level
from .profile import Profile

Role = Literal["network", "decoder", "other"]


@dataclass(frozen=True)
class Component:
    """A part of the pipeline that has weights.

    Attributes:
        weights: bytes of its parameters and buffers, each storage once.
        trained: bytes of the weights that get gradients.
        stays: whether it stays on the device where others of the pipeline are offloaded.
    """

    name: str
    weights: int
    trained: int = 0
    stays: bool = False


@dataclass(eq=False)
class Kind:
    """Calls that are alike: the same method of the same component on arguments of the same shapes.

    Attributes:
        component: name of the component.
        role: ``"network"`` (denoising, control), ``"decoder"`` (decoder, encoder of pictures) or ``"other"``.
        rows: length of the leading dimension that arguments and outputs share: 2 for one picture with guidance.
        converted: bytes of weights that the pipeline has converted for this call (an upcast decoder).
        measure: one call's profile at a level; decoded in tiles or not.
        tiles: whether it can be made in tiles.
    """

    component: str
    role: Role
    rows: int
    converted: int
    measure: Callable[[Level, bool], Profile]
    tiles: bool = False
    known: dict[tuple[Level, bool], Profile] = field(default_factory=dict)

    def profile(self, level: Level = "whole", tiled: bool = False) -> Profile:
        """Measured once, when first asked for."""
        if (level, tiled) not in self.known:
            self.known[level, tiled] = self.measure(level, tiled)
        return self.known[level, tiled]


@dataclass(frozen=True)
class Moment:
    """One call, as it is made or as the backward pass comes to it.

    Attributes:
        call: its place among the job's calls.
        before: the most bytes the pipeline's own arithmetic held since the call before (latents, arguments that wait
            to be redone, embeddings, gradients of latents).
        during: what it holds when the call begins.
    """

    call: int
    before: int
    during: int


@dataclass(frozen=True)
class Loss:
    """What scores the pictures.

    Attributes:
        name: for messages.
        weights: bytes of its own network.
        rows: pictures.
        profile: of one evaluation of all pictures.
        pull: bytes of the gradient by the pictures, which stays while they are scored in parts.
    """

    name: str
    weights: int
    rows: int
    profile: Profile
    pull: int = 0


@dataclass(frozen=True)
class Job:
    """What the planner is given.

    Attributes:
        name: of the pipeline.
        components: all parts with weights.
        calls: in the order in which they are made.
        forward: a moment for each.
        backward: a moment for each that the backward pass comes to, in that order.
        pictures: bytes held between the last call and the backward pass (pictures and latents).
        own: per call, bytes of arguments that are held for it alone.
        loss: None for one that needs nothing beyond the pictures.
        state: bytes of optimizer state.
        notes: what could not be counted, and what else is to be said of the plan.
        heldout: what else scores the pictures, without a gradient.
    """

    name: str
    components: tuple[Component, ...]
    calls: tuple[Kind, ...]
    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    pictures: int
    own: tuple[int, ...] = ()
    loss: Loss | None = None
    state: int = 0
    notes: tuple[str, ...] = ()
    heldout: Loss | None = None

    @property
    def weights(self) -> int:
        """Bytes of all weights, the losses' own included."""
        return sum(c.weights for c in self.components) + self.loss_weights

    @property
    def loss_weights(self) -> int:
        """Bytes of the losses' own weights."""
        return sum(loss.weights for loss in (self.loss, self.heldout) if loss is not None)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of trained weights."""
        return sum(c.trained for c in self.components)

    @property
    def latents(self) -> int:
        """Bytes of arguments that wait for the backward pass, over the whole run."""
        return sum(self.own)

    @property
    def network_calls(self) -> int:
        """How many calls of denoising networks the run makes."""
        return sum(kind.role == "network" for kind in self.calls)

    @property
    def graded_calls(self) -> int:
        """How many of them a backward pass comes to: in the others' steps no gradient is carried."""
        reached = {moment.call for moment in self.backward}
        return sum(kind.role == "network" and i in reached for i, kind in enumerate(self.calls))

    def kinds(self, role: Role) -> list[Kind]:
        """The kinds of a role, each once."""
        return list(dict.fromkeys(kind for kind in self.calls if kind.role == role))
