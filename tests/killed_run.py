"""A small descent that kills its own process without warning: ``python killed_run.py FOLDER OVER KILL_AFTER EVERY``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from backdrift import Run, optimize
from tiny_pipelines import tiny_sd

MORE: dict[str, dict[str, Any]] = {
    "noise": {"noise_prior": 0.01},
    "lora": {"rank": 2, "minibatch": 1},
    "prompt_embeds": {"optimizer": "sgd", "optimizer_kwargs": {"momentum": 0.9}},
}


def random_loss(images: torch.Tensor) -> torch.Tensor:
    """Draws from the global generator, as losses with random crops do."""
    return (images - torch.rand(images.shape)).square().flatten(1).mean(1)


def descend(folder: Path, over: str, kill_after: int | None = None, every: int = 1) -> Run:
    """Five updates; SIGKILL after the update of iteration ``kill_after``."""

    def kill(run: Run, entry: dict[str, Any]) -> None:
        if entry["iteration"] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    return optimize(
        tiny_sd(), "a 2", random_loss, over=over, num_inference_steps=2, steps=5, batch_size=2, lr=0.05,
        lr_schedule="linear", clip_grad=0.1, checkpoint_every=every, out=folder, progress=False, callback=kill,
        **MORE[over],
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, over, kill_after, every = sys.argv[1:]
    # Run as a script this module is called __main__; the loss's name must be the same in the continuation.
    random_loss.__module__ = "killed_run"
    descend(Path(folder), over, int(kill_after), int(every))
