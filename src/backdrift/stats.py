"""What a run did: calls, redone calls, vector–Jacobian products, bytes and seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class RunStats:
    """Counts of one run; they grow while it samples and again while it differentiates.

    A *network call* is one call of a denoising network (with whatever helps it, such as a control network);
    decoder and encoder calls are counted apart, under ``decodes``.

    Attributes:
        calls_forward: network calls while sampling.
        calls_redone: network calls run a second time by a backward pass.
        calls_kept: network calls whose activations were still held when the last call had ended.
        vjps: network calls that a backward pass went through (each is one vector–Jacobian product).
        decodes: decoder and encoder calls while sampling.
        decodes_redone: the same, run a second time by a backward pass.
        peak_bytes: most bytes of activations held at once. Under ``memory="max"`` one call of each kind is
            measured and the others are taken to be like it.
        drift: largest relative distance between a state that :class:`~backdrift.Reversible` rebuilt and the one
            kept of the forward pass; None where none was rebuilt.
        fell_back: whether that was beyond the tolerance, and stored states were used instead.
        seconds_forward: wall time in the sampling call.
        seconds_backward: wall time in backward passes, from the first network they reach to their end.
        seconds_redone: the part of ``seconds_backward`` spent on redone calls.
    """

    calls_forward: int = 0
    calls_redone: int = 0
    calls_kept: int = 0
    vjps: int = 0
    decodes: int = 0
    decodes_redone: int = 0
    peak_bytes: int = 0
    drift: float | None = None
    fell_back: bool = False
    seconds_forward: float = 0.0
    seconds_backward: float = 0.0
    seconds_redone: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of sampling and of the backward passes."""
        return self.seconds_forward + self.seconds_backward

    @property
    def network_calls(self) -> int:
        """All network calls, first and redone."""
        return self.calls_forward + self.calls_redone

    def as_dict(self) -> dict[str, Any]:
        """The counts and the two totals as plain numbers, for a record."""
        return asdict(self) | {"seconds": self.seconds, "network_calls": self.network_calls}
