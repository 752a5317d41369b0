"""The choices a plan is made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..blocks import LEVELS, Level
from .job import Job

__all__ = ["Choices"]


@dataclass(frozen=True)
class Choices:
    """How a job is run. All but ``tiles`` give the same gradient.

    Attributes:
        keep: how many of the last network calls keep what autograd saved of them; the others are run again when the
            backward pass comes to them. None: all are kept.
        network: what is redone at a time inside a network call: nothing more (``"whole"``), one ``"block"``, or one
            ``"resnet"``.
        decoder: the same inside the decoder.
        guidance: ``"together"``, or ``"apart"``: the halves of a guided call one after the other.
        decode: ``"batch"``, ``"sample"`` by sample, or in ``"tiles"`` (overlapping and blended: other pictures).
        loss: how many pictures are scored at a time; None: all.
        latents: where arguments of the calls that will be run again wait for the backward pass: ``"device"`` or
            ``"cpu"``.
        weights: ``"device"``: all stay there; ``"offload"``: only what the present phase calls; ``"stream"``: only
            those of the layer that is being called or differentiated.
    """

    keep: int | None = None
    network: Level = "whole"
    decoder: Level = "whole"
    guidance: Literal["together", "apart"] = "together"
    decode: Literal["batch", "sample", "tiles"] = "batch"
    loss: int | None = None
    latents: Literal["device", "cpu"] = "device"
    weights: Literal["device", "offload", "stream"] = "device"

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from plain autograd."""
        plain = Choices()
        return {k: v for k, v in asdict(self).items() if v != getattr(plain, k)}

    @property
    def same_bits(self) -> bool:
        """Whether every kernel sees the arguments that it sees in plain autograd: no batch is divided."""
        return self.guidance == "together" and self.decode == "batch" and self.loss is None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def candidates(
    job: Job,
    *,
    tiles: bool = False,
    offload: bool = True,
    offloaded: bool = False,
    park: bool | None = None,
    micro: bool = True,
) -> Iterator[Choices]:
    """Every combination that can make a difference to this job, ``keep`` left open.

    Args:
        job: what is planned.
        tiles: whether decoding in tiles, which is not exact, is one.
        offload: whether there is a second place to move weights to.
        offloaded: the weights wait there already; how much of them comes at a time is open.
        park: whether there is one for latents; None: as for weights.
        micro: whether the loss can be evaluated on a few pictures at a time.
    """
    networks, decoders = job.kinds("network"), job.kinds("decoder")
    halves = any(kind.rows % 2 == 0 for kind in networks)
    samples = any(kind.rows > 1 for kind in decoders)
    tiled = tiles and any(kind.tiles for kind in decoders)
    options: dict[str, list[Any]] = {
        "network": list(LEVELS),
        "decoder": list(LEVELS) if decoders else ["whole"],
        "guidance": ["together", *(["apart"] if halves else [])],
        "decode": ["batch", *(["sample"] if samples else []), *(["tiles"] if tiled else [])],
        "loss": [None, *([1] if micro and job.loss is not None and job.loss.rows > 1 else [])],
        "latents": ["device", *(["cpu"] if (offload if park is None else park) and job.latents else [])],
        "weights": [
            *([] if offloaded else ["device"]),
            *(["offload"] if offloaded or (offload and len(job.components) > 1) else []),
            *(["stream"] if offloaded or offload else []),
        ],
    }
    for values in itertools.product(*options.values()):
        yield replace(Choices(), **dict(zip(options, values, strict=True)))
