"""The small call of a pipeline that everything is measured on: found by trying, smallest first."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...accelerators import seeded
from ...errors import UnsupportedError
from ..load import noise as drawn_noise
from .arguments import accepted, as_arguments, denoiser, sizes, small_arguments
from .plainly import Watch, sampled

_STEPS = (2, 4)


@dataclass
class SmallCall:
    """A call, and the tensors that it is differentiated by.

    Attributes:
        fixed: keywords that stay as they are.
        noise: the initial noise; None for a pipeline that has none.
        drawn: the pipeline draws it itself, and takes ``differentiable(noise=…)``.
        embeddings: prompt embeddings by the call's own keywords; empty where none can be handed in.
        missing: why there are none.
        size: height and width in pixels and the number of frames, as far as the call takes them.
        steps: of the sampler.
        result: what comes back.
        watch: what was seen of the call.
    """

    fixed: dict[str, Any]
    noise: Tensor | None
    drawn: bool
    embeddings: dict[str, Tensor]
    missing: str
    size: dict[str, Any]
    steps: int
    seed: int
    result: Tensor
    watch: Watch = field(repr=False)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything the call is differentiated by, by name."""
        return {**({} if self.noise is None else {"noise": self.noise}), **self.embeddings}

    def keywords(self, leaves: dict[str, Tensor]) -> dict[str, Any]:
        """The call with other tensors in place of :attr:`leaves`."""
        inputs = {k: v for k, v in leaves.items() if k != "noise"}
        if "noise" in leaves and not self.drawn:
            inputs["latents"] = leaves["noise"]
        return {**self.fixed, **inputs}

    def own_noise(self, leaves: dict[str, Tensor]) -> Tensor | None:
        """What takes the place of the pipeline's own draw."""
        return leaves.get("noise") if self.drawn else None

    @property
    def words(self) -> str:
        """Its size, to read."""
        sides = [str(self.size[k]) for k in ("height", "width") if k in self.size]
        told = f"{self.steps} steps"
        if sides:
            told += f" at {'x'.join(sides)} pixels"
        if "num_frames" in self.size:
            told += f", {self.size['num_frames']} frames"
        return told


def find_small_call(
    pipe: Any,
    given: dict[str, Any],
    height: int | None,
    width: int | None,
    steps: int | None,
    seed: int,
    *,
    encode: bool = True,
) -> SmallCall:
    """The first small call that runs.

    Args:
        given: the user's own keywords, which win.
        height, width: in pixels; by default the smallest that work.
        steps: by default 2, or 4 for schedulers that need more.
        encode: hand a prompt in as its embeddings; not where the text encoder is trained.

    Raises:
        UnsupportedError: none runs; says what the last one said.
    """
    said: list[str] = []
    fixed_size: dict[str, Any] = {k: given[k] for k in ("height", "width", "num_frames") if k in given}
    for count in (steps,) if steps is not None else _STEPS:
        for size in sizes(pipe, height, width):
            arguments = small_arguments(pipe, {**size, **fixed_size}, count, given)
            watch = Watch()
            try:
                with seeded(seed), torch.no_grad():
                    result = sampled(pipe, arguments, watch=watch)
                return _with_targets(
                    pipe, arguments, watch, result, {**size, **fixed_size}, count, seed, encode
                )
            except Exception as problem:  # whatever it is, another size may not have it
                line = (str(problem).strip().splitlines() or [""])[0]
                said.append(f"{type(problem).__name__}: {line}")
                if said[-2:-1] == said[-1:]:
                    break
    raise UnsupportedError(said[-1])


def _with_targets(
    pipe: Any,
    arguments: dict[str, Any],
    watch: Watch,
    result: Tensor,
    size: dict[str, Any],
    steps: int,
    seed: int,
    encode: bool,
) -> SmallCall:
    takes = accepted(pipe)
    embeddings = {k: v for k, v in arguments.items() if _is_embedding(k, v)}
    fixed = {k: v for k, v in arguments.items() if k not in embeddings}
    missing = "" if encode else "a text encoder is trained: the call encodes its prompt itself"
    if not embeddings and encode:
        fixed, embeddings, missing = _encoded(pipe, fixed, watch, result, takes, seed)
    call = SmallCall(fixed, None, False, embeddings, missing, size, steps, seed, result, watch)
    for noise, drawn in _noises(pipe, arguments, watch, size, takes, seed):
        trial = SmallCall(
            {k: v for k, v in fixed.items() if k != "latents"},
            noise, drawn, embeddings, missing, size, steps, seed, result, watch,
        )  # fmt: skip
        try:
            with seeded(seed), torch.no_grad():
                trial.result = sampled(
                    pipe, trial.keywords(trial.leaves), noise=trial.own_noise(trial.leaves)
                )
        except Exception:  # noise of another shape than this pipeline takes
            continue
        if trial.result.shape == result.shape:
            return trial
    return call


def _encoded(
    pipe: Any, fixed: dict[str, Any], watch: Watch, result: Tensor, takes: list[str], seed: int
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The call with its prompt encoded beforehand, if that gives the same picture."""
    if watch.encoded is None or "prompt_embeds" not in takes:
        return fixed, {}, "this call has no prompt embeddings to hand in"
    found = as_arguments(pipe, watch.encoded, takes)
    told = "encode_prompt() gives none that the call takes: hand them in, doctor(pipe, prompt_embeds=…)"
    if not found:
        return fixed, {}, told
    try:
        with seeded(seed), torch.no_grad():
            again = sampled(pipe, {**fixed, **found})
    except Exception:
        return fixed, {}, told
    if again.shape != result.shape or not torch.allclose(again, result, rtol=1e-3, atol=1e-3, equal_nan=True):
        return fixed, {}, told
    embeddings = {k: v.detach() for k, v in found.items() if _is_embedding(k, v)}
    return {**fixed, **{k: v for k, v in found.items() if k not in embeddings}}, embeddings, ""


def _noises(
    pipe: Any, arguments: dict[str, Any], watch: Watch, size: dict[str, Any], takes: list[str], seed: int
) -> list[tuple[Tensor, bool]]:
    """Noises to try, and whether each stands in for a draw."""
    if isinstance(arguments.get("latents"), Tensor):
        return [(arguments["latents"].detach(), False)]
    network = denoiser(pipe)
    like = (
        next((p for p in network.parameters() if p.is_floating_point() and p.itemsize > 1), None)
        if network is not None
        else None
    )
    place: dict[str, Any] = {
        "device": watch_device(watch, pipe),
        "dtype": torch.float32 if like is None else like.dtype,
    }
    found: list[tuple[Tensor, bool]] = []
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=draw).to(**place) for shape in watch.drawn[:1]]
    if "latents" in takes and drawn and not hasattr(pipe, "_pack_latents"):
        found.append((drawn[0], False))
    elif "latents" in takes:  # packed after they are drawn
        sides = {k: size[k] for k in ("height", "width") if k in size}
        with suppress(Exception):  # latents that are not pictures
            found.append((drawn_noise(pipe, **sides, seed=seed, **place), False))
    return [*found, *((noise, True) for noise in drawn)]


def watch_device(watch: Watch, pipe: Any) -> torch.device:
    """Where the denoising network was called."""
    for call in watch.calls.values():
        if call.role == "network":
            for value in [*call.args, *call.kwargs.values()]:
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                    return value.device
    network = denoiser(pipe)
    return next(network.parameters()).device if isinstance(network, nn.Module) else torch.device("cpu")


def _is_embedding(name: str, value: Any) -> bool:
    return name.endswith("prompt_embeds") and isinstance(value, Tensor) and value.is_floating_point()
