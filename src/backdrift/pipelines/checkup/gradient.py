"""Rows on the gradient: that it is finite, that it has plain autograd's bits, that finite differences agree."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...accelerators import seeded
from ...budget import available_bytes
from ...errors import BackdriftError
from ...stats import RunStats
from ..differentiable import differentiable
from ..offloaded import execution_device
from ..outputs import first_tensor
from ..shadow import Train, trained_parameters
from .differences import Leaves, judged, rounding_of, slope
from .networks import noise_of
from .plainly import quiet, runs_undecorated, sampled, undecorated
from .rows import Row
from .small import SmallCall
from .verdicts import modules, split_refusal

TOPIC = "gradient"
#: Where a finite difference is less sure than this (of the slope expected), it says nothing.
_SURE = 0.3
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Subject:
    """What is measured.

    Attributes:
        pipe: the user's pipeline, without its progress bar.
        call: the small call.
        train: which weights get gradients.
    """

    pipe: Any
    call: SmallCall
    train: Train
    seed: int
    trained: dict[str, Tensor] = field(init=False)
    weighting: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.trained = trained_parameters(self.pipe, self.train)
        draw = torch.Generator().manual_seed(self.seed + 1)
        self.weighting = torch.randn(self.call.result.shape, generator=draw, dtype=torch.float64)
        self.weighting /= self.weighting.numel() ** 0.5

    def value(self, result: Tensor) -> Tensor:
        """One number of a result: random weights on everything in it, in float64."""
        return (result.cpu().double() * self.weighting).sum()

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest precision among what is differentiated by and the networks' weights."""
        kinds = {x.dtype for x in self.call.leaves.values()}
        for key, module in modules(self.pipe).items():
            if key in {call.component for call in self.call.watch.calls.values() if call.role != "other"}:
                kinds |= {
                    p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1
                }
        return max(kinds or {torch.float32}, key=lambda kind: torch.finfo(kind).eps)


@dataclass
class Pulled:
    """A result, the value of it, and the gradients by name (None: none)."""

    result: Tensor
    gradients: dict[str, Tensor | None]
    stats: RunStats | None = None


def pull(subject: Subject, memory: str) -> Pulled:
    """By ``differentiable``."""
    leaves = _fresh(subject.call.leaves)
    run = differentiable(subject.pipe, memory, train=subject.train, noise=subject.call.own_noise(leaves))
    with torch.enable_grad(), seeded(subject.seed):
        result = first_tensor(run(**subject.call.keywords(leaves)))
        assert result is not None  # the run has checked that
        return Pulled(result.detach(), _differentiated(subject, result, leaves), run.stats)


def pull_plainly(subject: Subject) -> Pulled:
    """By plain autograd: the undecorated call where that works, else the pipeline's own code on copies."""
    leaves = _fresh(subject.call.leaves)
    arguments = subject.call.keywords(leaves)
    with torch.enable_grad(), seeded(subject.seed):
        if runs_undecorated(subject.pipe) and not subject.call.drawn:
            result = undecorated(subject.pipe, arguments)
        else:
            trained = {id(p) for p in subject.trained.values()}
            result = sampled(subject.pipe, arguments, noise=subject.call.own_noise(leaves), trained=trained)
        return Pulled(result.detach(), _differentiated(subject, result, leaves))


def _fresh(leaves: Leaves) -> Leaves:
    return {k: x.detach().clone().requires_grad_() for k, x in leaves.items()}


def _differentiated(subject: Subject, result: Tensor, leaves: Leaves) -> dict[str, Tensor | None]:
    named = {**leaves, **subject.trained}
    found = torch.autograd.grad(subject.value(result), list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


# ---- rows ------------------------------------------------------------------------------------------------


def finite_row(subject: Subject, ours: Pulled) -> Row:
    """Whether picture and gradients are numbers, and not all zero."""
    wrong = [] if bool(ours.result.isfinite().all()) else ["the result"]
    for name, gradient in ours.gradients.items():
        if gradient is not None and not bool(gradient.isfinite().all()):
            wrong.append(f"the gradient by {name}")
    half = subject.dtype in _HALF
    if wrong:
        advice = "pipe.to(torch.bfloat16) or torch.float32, which have a wider range" if half else ""
        return Row("failed", TOPIC, "finite", f"NaN or infinite: {', '.join(wrong[:4])}", advice)
    lost = [k for k, g in ours.gradients.items() if g is None]
    zero = [k for k, g in ours.gradients.items() if g is not None and not bool(g.any())]
    leaves = [k for k in (*lost, *zero) if k in subject.call.leaves]
    shape = "x".join(map(str, ours.result.shape))
    told = f"{subject.call.words}: result {shape} and {len(ours.gradients) - len(lost)} gradients, all finite"
    if leaves:
        advice = "negative embeddings, for one, are read only under guidance: guidance_scale above 1"
        return Row("warning", TOPIC, "finite", f"{told}; nothing reaches {', '.join(leaves)}", advice)
    share = max(
        (float((g == 0).float().mean()) for g in ours.gradients.values() if g is not None), default=0.0
    )
    figures = {"zeros": share}
    if subject.dtype == torch.float16 and share > 0.2:
        return Row(
            "warning", TOPIC, "finite", f"{told}; {share:.0%} of one gradient's numbers are 0, too small for float16",
            "scale the loss up before backward() (torch.amp.GradScaler does it)", figures,
        )  # fmt: skip
    if lost or zero:
        told += f"; {len(lost) + len(zero)} of the trained tensors are not reached by this call"
    return Row("ok", TOPIC, "finite", told, figures=figures)


def plain_rows(subject: Subject, ours: Pulled) -> Iterator[Row]:
    """Ours beside plain autograd: the same bits where that is promised."""
    title = "beside plain autograd"
    try:
        plain = pull_plainly(subject)
    except Exception as problem:  # whatever stops plain autograd, it is told
        line = (str(problem).strip().splitlines() or [""])[0]
        why = f"plain autograd does not run here ({type(problem).__name__}: {line})"
        yield Row("skipped", TOPIC, title, why, "finite differences below do not need it")
        return
    largest, where = _difference(ours, plain)
    same = largest == 0.0
    unpromised = _not_promised(subject)
    figures = {"relative difference": largest}
    if same:
        yield Row("ok", TOPIC, title, "the same bits, result and all gradients", figures=figures)
    elif not unpromised:
        yield Row(
            "failed", TOPIC, title,
            f"up to {largest:.1g} apart ({where}); on a CPU in eval mode the bits should be the same",
            "report this pipeline to backdrift", figures,
        )  # fmt: skip
    else:
        again, _ = _difference(plain, pull_plainly(subject))
        figures["plain autograd beside itself"] = again
        allowed = max(4 * again, 64 * torch.finfo(subject.dtype).eps)
        told = (
            f"up to {largest:.1g} apart ({where}); {unpromised}, no bits are promised, and plain autograd run twice is "
            f"{again:.1g} apart"
        )
        status: Any = "ok" if largest <= allowed else "failed"
        yield Row(
            status, TOPIC, title, told, "" if status == "ok" else "report this pipeline to backdrift", figures
        )


def _not_promised(subject: Subject) -> str:
    found = modules(subject.pipe)
    place = execution_device(subject.pipe)
    if place is not None and place.type != "cpu":
        return "off the CPU"
    if place is None and any(p.device.type != "cpu" for m in found.values() for p in m.parameters()):
        return "off the CPU"
    if any(noise_of(m) for m in found.values()):
        return "with dropout at work"
    return ""


def _difference(ours: Pulled, theirs: Pulled) -> tuple[float, str]:
    """The largest relative difference, and of what."""
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {"result": (ours.result, theirs.result)}
    pairs |= {f"gradient by {k}": (g, theirs.gradients[k]) for k, g in ours.gradients.items()}
    found = {name: apart(a, b) for name, (a, b) in pairs.items()}
    where = max(found, key=lambda name: found[name])
    return found[where], where


def apart(a: Tensor | None, b: Tensor | None) -> float:
    """Norm of the difference over the second's norm; 0 only where all bits agree, infinite if one is missing."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    if torch.equal(a, b):
        return 0.0
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    found = float((a - b).norm() / b.norm()) if b.any() else float("inf")
    return found if found == found else float("inf")


def difference_rows(subject: Subject, ours: Pulled, directions: int) -> Iterator[Row]:
    """The gradients beside finite differences along random directions: by noise, by embeddings, by weights."""
    call = subject.call
    groups: dict[str, Leaves] = {}
    if call.noise is not None:
        groups["by the noise"] = {"noise": call.noise}
    if call.embeddings:
        groups["by the embeddings"] = dict(call.embeddings)
    weights = {k: p for k, p in subject.trained.items() if ours.gradients.get(k) is not None}
    if weights:
        groups["by the weights"] = {k: p.detach() for k, p in weights.items()}
    if call.noise is None:
        yield Row("skipped", TOPIC, "by the noise", "the call draws no noise that could be replaced")
    if not call.embeddings:
        yield Row("skipped", TOPIC, "by the embeddings", *split_refusal(call.missing))
    for title, moving in groups.items():
        yield _against_differences(subject, ours, title, moving, directions)


def _against_differences(subject: Subject, ours: Pulled, title: str, moving: Leaves, directions: int) -> Row:
    gradients = {k: g for k in moving if (g := ours.gradients[k]) is not None}
    moving = {k: x for k, x in moving.items() if k in gradients}
    if not any(bool(g.any()) for g in gradients.values()):
        return Row("skipped", TOPIC, title, "the gradient is zero, see above")
    error, tolerance = measured(subject, moving, gradients, directions)
    figures = {"relative error": error, "tolerance": tolerance, "directions": float(directions)}
    ways = f"{directions} random direction{'s' if directions > 1 else ''}"
    precision = str(subject.dtype).removeprefix("torch.")
    if not tolerance < _SURE:  # NaN too
        if subject.dtype in _HALF:
            return _in_single_precision(subject, ours, title, tuple(moving), directions, figures)
        return Row(
            "skipped", TOPIC, title, f"rounding in {precision} or a kink hides the finite difference along {ways}",
            "another seed=, or more directions=", figures,
        )  # fmt: skip
    told = f"{error:.1%} off finite differences along {ways}; {precision} lets {tolerance:.1%} be told"
    if error < 1e-3:
        told = f"{error:.1e} off finite differences along {ways} (relative; {precision} lets {tolerance:.1e} be told)"
    if error <= tolerance:
        return Row("ok", TOPIC, title, told, figures=figures)
    return Row("failed", TOPIC, title, told, "", figures)


def measured(subject: Subject, moving: Leaves, gradients: Leaves, directions: int) -> tuple[float, float]:
    """The relative error of gradients beside finite differences along random directions, and its tolerance."""
    call = subject.call

    def value(at: Leaves) -> float:
        leaves = {k: at.get(k, x) for k, x in call.leaves.items()}
        weights = {k: x for k, x in at.items() if k not in leaves}

        def dress(name: str, module: nn.Module) -> nn.Module:
            for key, parameter in module.named_parameters():
                if f"{name}.{key}" in weights:
                    parameter.data = weights[f"{name}.{key}"]  # of the copy alone
            return module

        with torch.no_grad(), seeded(subject.seed):
            result = sampled(
                subject.pipe,
                call.keywords(leaves),
                noise=call.own_noise(leaves),
                dress=dress if weights else None,
            )
        return float(subject.value(result))

    draw = torch.Generator().manual_seed(subject.seed + 2)
    rounding = rounding_of(value, moving, draw)
    slopes = [slope(value, moving, gradients, draw, rounding) for _ in range(directions)]
    return judged(slopes, max(1e-3, 16 * torch.finfo(subject.dtype).eps))


def _in_single_precision(
    subject: Subject,
    ours: Pulled,
    title: str,
    names: tuple[str, ...],
    directions: int,
    figures: dict[str, float],
) -> Row:
    """The same on a copy of the pipeline in float32, where the rounding of half precision hides all."""
    weights = sum(p.numel() * 4 for m in modules(subject.pipe).values() for p in m.parameters())
    device = next(
        (p.device for m in modules(subject.pipe).values() for p in m.parameters()), torch.device("cpu")
    )
    precision = str(subject.dtype).removeprefix("torch.")
    hidden = f"{precision} rounds too much for finite differences"
    advice = "bd.doctor(pipe.to(torch.float32)), where there is memory for it"
    if weights > available_bytes(device) // 2:
        return Row("skipped", TOPIC, title, hidden, advice, figures)
    try:
        single = quiet(copy.deepcopy(subject.pipe).to(torch.float32))
        call = subject.call
        wide = SmallCall(
            {k: _wide(v) for k, v in call.fixed.items()}, _wide(call.noise), call.drawn,
            {k: _wide(v) for k, v in call.embeddings.items()}, "", call.size, call.steps, call.seed,
            call.result, call.watch,
        )  # fmt: skip
        double = Subject(single, wide, subject.train, subject.seed)
        theirs = pull(double, "min")
        moving = {k: x for k, x in {**wide.leaves, **double.trained}.items() if k in names}
        gradients = {k: g for k in moving if (g := theirs.gradients[k]) is not None}
        error, tolerance = measured(
            double, {k: x.detach() for k, x in moving.items() if k in gradients}, gradients, directions
        )
    except (BackdriftError, RuntimeError, ValueError, TypeError) as problem:
        line = (str(problem).strip().splitlines() or [""])[0]
        return Row(
            "skipped", TOPIC, title, f"{hidden}, and a float32 copy did not run: {line}", advice, figures
        )
    figures = {"relative error": error, "tolerance": tolerance, "directions": float(directions)}
    told = f"{hidden}; on a float32 copy it is {error:.1e} off them (relative; {tolerance:.1e} can be told)"
    if not tolerance < _SURE:
        return Row("skipped", TOPIC, title, told, "another seed=", figures)
    figures["beside float32"] = beside = apart(_joined(ours, gradients), _joined(theirs, gradients))
    told += f"; the {precision} gradient is {beside:.1%} from the float32 one"
    if error > tolerance:
        return Row("failed", TOPIC, title, told, "", figures)
    if beside > 0.5:
        return Row(
            "warning",
            TOPIC,
            title,
            told,
            "a scaled loss, bfloat16 or float32: this one is mostly rounding",
            figures,
        )
    return Row("ok", TOPIC, title, told, "", figures)


def _joined(pulled: Pulled, names: Any) -> Tensor:
    return torch.cat([g.cpu().double().flatten() for k in names if (g := pulled.gradients[k]) is not None])


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


__all__ = ["Pulled", "Subject", "apart", "difference_rows", "finite_row", "plain_rows", "pull"]
