"""The one training loop: resumable after a kill, the same result from the same seed, averaged weights."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WORK = Path(os.environ.get("BACKDRIFT_TRAINING", ".training"))
Loss = Callable[[np.random.Generator, torch.Generator], Tensor]
TIMES = Path(__file__).parent / "measured" / "minutes.json"


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_atomically(state: object, path: Path) -> None:
    """Write beside the target, then rename: a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def train(
    name: str,
    module: nn.Module,
    loss: Loss,
    *,
    steps: int,
    lr: float,
    stop: int | None = None,
    seed: int = 0,
    ema: float = 0.0,
    weight_decay: float = 0.01,
    warmup: int = 100,
    save_every: int = 200,
    minutes: float = math.inf,
) -> nn.Module:
    """Minimise ``loss(rng, generator)`` over the parameters of ``module``; return it with averaged weights.

    Every step draws from generators seeded by (seed, step), so a resumed run sees the same batches. The
    learning rate rises over ``warmup`` steps and falls by a cosine to a hundredth at ``steps``; the training ends
    at ``stop`` where that is earlier. ``minutes`` bounds one sitting: the loop saves and raises
    ``TimeoutError``, and the same call goes on from there.
    """
    where = device()
    module.to(where).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    mean = {k: v.detach().clone() for k, v in module.state_dict().items()}
    path, first, spent = WORK / f"{name}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=where)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        mean, first, spent = state["mean"], state["step"], state["seconds"]
    began, running = time.monotonic(), math.nan

    def save(step: int) -> None:
        seconds = spent + time.monotonic() - began
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean}
        save_atomically({**state, "step": step, "seconds": seconds}, path)

    last = min(steps, stop or steps)
    for step in range(first, last):
        rate = min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        rng = np.random.default_rng((seed, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.autocast(where.type, torch.bfloat16):
            value = loss(rng, generator)
        if not torch.isfinite(value):
            raise ArithmeticError(f"{name}: the loss is {value.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        keep = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, current in module.state_dict().items():
                if current.is_floating_point():
                    mean[key].lerp_(current, 1 - keep)
                else:
                    mean[key].copy_(current)
        running = value.item() if math.isnan(running) else 0.98 * running + 0.02 * value.item()
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - began) / (step + 1 - first)
            print(
                f"{name} {step + 1}/{last} loss {running:.4f}, {pace * (last - step - 1) / 60:.1f} min left",
                flush=True,
            )
        if (step + 1) % save_every == 0:
            save(step + 1)
        if time.monotonic() - began > 60 * minutes:
            save(step + 1)
            raise TimeoutError(
                f"{name}: stopped at step {step + 1} after {minutes} minutes; the same command goes on"
            )
    if first < last:
        save(last)
        note_minutes(name, (spent + time.monotonic() - began) / 60)
    module.load_state_dict(mean)
    return module.eval()


@dataclass(frozen=True)
class Round:
    """Steps and learning rate of a round; the step it is cut short at; a loss of its own."""

    steps: int
    lr: float
    stop: int | None = None
    loss: Loss | None = None


def in_rounds(
    name: str,
    module: nn.Module,
    loss: Loss,
    rounds: Sequence[Round],
    **options: Any,
) -> nn.Module:
    """Train in rounds, each with a cosine of its own (warm restarts).

    A round begins with the averaged weights of the one before, rounded to half precision as they ship: so a
    shipped network can take the place of the rounds that made it (``python -m training restore``).
    """
    for k, part in enumerate(rounds):
        done = WORK / f"{name}-round{k}.pt"
        if not done.exists():
            own = part.loss or loss
            options |= {"steps": part.steps, "lr": part.lr, "stop": part.stop, "seed": k}
            train(name if k == 0 else f"{name}{k}", module, own, **options)
            save_atomically({n: v.half().cpu() for n, v in module.state_dict().items()}, done)
        module.load_state_dict(torch.load(done, weights_only=True))
    return module.eval()


def note_minutes(name: str, minutes: float) -> None:
    """Keep how long the training of a part took, beside its checkpoints; the cards put it on record."""
    path = WORK / "minutes.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(times | {name: round(minutes, 1)}, indent=2, sort_keys=True) + "\n")


def trained_minutes() -> dict[str, float]:
    """Minutes that each part's training took, over all its sittings: the record, and what was trained since."""
    found: dict[str, float] = {}
    for path in (TIMES, WORK / "minutes.json"):
        found |= json.loads(path.read_text()) if path.exists() else {}
    return found
