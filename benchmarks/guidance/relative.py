"""Presets whose published weights do not carry over between losses, with relative strengths: docs/guidance-rules.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import backdrift as bd
from backdrift.guidance import DPS, LGD, TFG, Guidance, Relative, UniversalGuidance
from backdrift.losses import resolve
from backdrift.recipes.judges import clip_score, open_clip

from .results import Results
from .setting import Case, Setting, clamped
from .tables import number
from .ways import UNGUIDED, Way

PAGE = Path(__file__).parents[2] / "docs" / "guidance-rules.md"
SETTING = Setting(steps=20, batch=2)
CASE = Case("", "a red two on grass", 5)
LOSSES = ("style:skimage/coffee", "class:seven")
EVERYWHERE: dict[str, Any] = {"start": 0.0, "stop": 1.0, "repeats": 1}


class Setup(NamedTuple):
    """A row.

    Attributes:
        called: as it is written.
        made: of a loss.
        recommended: to start from.
    """

    called: str
    made: Callable[[Any], Guidance]
    recommended: bool = False


def _universal(w: float, recommended: bool = False) -> Setup:
    named = f"UniversalGuidance(loss, Relative({w}), repeats=1)"
    return Setup(named, lambda loss: UniversalGuidance(loss, Relative(w), **EVERYWHERE), recommended)


def _backward(v: float, recommended: bool = False) -> Setup:
    named = f"UniversalGuidance(loss, 0, 5, Relative({v}), repeats=1)"
    return Setup(named, lambda loss: UniversalGuidance(loss, 0, 5, Relative(v), **EVERYWHERE), recommended)


def _tfg(w: float, v: float, recommended: bool = False) -> Setup:
    named = f"TFG(loss, Relative({w}), Relative({v}))"
    return Setup(named, lambda loss: TFG(loss, Relative(w), Relative(v), **EVERYWHERE), recommended)


def _dps(w: float) -> Setup:
    return Setup(f"DPS(loss, Relative({w}))", lambda loss: DPS(loss, Relative(w), **EVERYWHERE))


def _lgd(w: float) -> Setup:
    return Setup(f"LGD(loss, Relative({w}), 4)", lambda loss: LGD(loss, Relative(w), 4, **EVERYWHERE))


SETUPS = (
    *(_universal(w, w == 1.0) for w in (0.3, 1.0, 3.0)),
    *(_backward(v, v == 0.1) for v in (0.03, 0.1, 0.3)),
    _tfg(0.1, 0.02, True),
    _tfg(0.2, 0.05),
    *(_dps(w) for w in (0.1, 0.2)),
    *(_lgd(w) for w in (0.1, 0.2)),
)


def measure(found: Results) -> None:
    """Every setup with every loss, and the unguided pictures."""
    for text in LOSSES:
        loss = resolve(text)
        plain = Way(UNGUIDED).guidance(loss, SETTING.steps, CASE.seed, None)  # type: ignore[arg-type]
        ways = [("unguided", lambda _, plain=plain: plain), *((s.called, s.made) for s in SETUPS)]
        for name, made in ways:
            found.ensure({"loss": text, "setup": name}, lambda m=made, lo=loss: _cell(m(lo), lo))
            print(f"relative: {text}, {name}", flush=True)


@torch.no_grad()
def _cell(guidance: bd.guidance.Guidance, loss: Any) -> dict[str, Any]:
    seen = clamped(SETTING.guide(CASE, guidance).images)
    prompts = [CASE.prompt] * len(seen)
    scores = {"loss": loss(seen, prompts), "CLIP score": clip_score(open_clip(None), "").score(seen, prompts)}
    return {
        name: float(torch.as_tensor(values, dtype=torch.float64).mean()) for name, values in scores.items()
    }


def table(cells: list[dict[str, Any]]) -> str:
    """The rows: mean loss and CLIP score for each loss."""
    at = {(cell["key"]["loss"], cell["key"]["setup"]): cell for cell in cells}
    lines = [
        "| | " + " | ".join(f"`{text}` · CLIP score" for text in LOSSES) + " |",
        "|---|" + "---|" * len(LOSSES),
    ]
    rows = [
        ("unguided", "unguided"),
        *((s.called, f"**`{s.called}`**" if s.recommended else f"`{s.called}`") for s in SETUPS),
    ]
    for name, shown in rows:
        found = [at[text, name] for text in LOSSES]
        values = [f"{number(cell['loss'])} · {number(cell['CLIP score'])}" for cell in found]
        lines.append(f"| {shown} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"
