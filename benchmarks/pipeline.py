"""What ``differentiable`` costs: a Stable Diffusion pipeline on the benchmark's UNet, with the built-in VAE.

    python -m benchmarks.pipeline           # 5 interleaved repeats at N = 10
    python -m benchmarks.pipeline --small   # a tiny network: only to see that it runs

The same call is differentiated four ways: by plain autograd, under ``differentiable`` at "max" and at "min", and with
each network call under torch.utils.checkpoint. Weights that no gradient is wanted for are frozen for all four. Pictures
are clamped as diffusers does, so that the gradients can be compared bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import backdrift as bd
from backdrift.pipelines.refusals import undecorated_call
from backdrift.pipelines.shadow import copied_scheduler

from .exact_gradient import RESULTS
from .measure import MALLOC, host_bytes, machine, peak_bytes, seconds
from .problem import FULL, SMALL, WANTS, Size
from .record import Record

NAMES = ("plain", "max", "min", "checkpoint")
CPU = torch.device("cpu")


class PipelineProblem:
    """One prompt embedding and one noise in, the mean square of the finished picture out.

    Args:
        size: of the UNet and its latents.
        wants: ``"all"``: gradients for noise, embeddings and every weight of the UNet; ``"x_T"``: for the noise.
    """

    def __init__(self, size: Size, wants: str) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        torch.manual_seed(0)
        built_in: Any = bd.load()
        self.wants = wants
        self.pipe: Any = StableDiffusionPipeline(
            vae=built_in.vae.requires_grad_(False),
            text_encoder=built_in.text_encoder.requires_grad_(False),
            tokenizer=built_in.tokenizer,
            unet=size.unet(),
            scheduler=DDIMScheduler.from_config(built_in.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.unet.requires_grad_(wants == "all")
        self.noise = torch.randn(1, 4, size.side, size.side, requires_grad=True)
        self.inputs: dict[str, Tensor] = {
            name: torch.randn(1, size.tokens, size.width, requires_grad=wants == "all")
            for name in ("prompt_embeds", "negative_prompt_embeds")
        }
        more = [*self.inputs.values(), *self.pipe.unet.parameters()] if wants == "all" else []
        self.leaves = [self.noise, *more]
        side = size.side * self.pipe.vae_scale_factor
        self.settings = {"height": side, "width": side, "output_type": "pt"}

    def plain(self, steps: int) -> Tensor:
        """The pipeline's own code with gradients on."""
        own = copy.copy(self.pipe)
        own.__dict__["scheduler"] = copied_scheduler(self.pipe.scheduler)
        call = undecorated_call(type(self.pipe))
        return call(own, latents=self.noise, num_inference_steps=steps, **self.inputs, **self.settings).images

    def checkpoint(self, steps: int) -> Tensor:
        """The same, each network call under non-reentrant checkpointing."""
        unet = self.pipe.unet
        forward = unet.forward
        unet.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
        try:
            return self.plain(steps)
        finally:
            del unet.forward

    def ours(self, memory: str, steps: int) -> tuple[Tensor, Any]:
        """Under ``differentiable``, and the run's statistics."""
        train = "unet" if self.wants == "all" else None
        with bd.differentiable(self.pipe, memory=memory, train=train, clamp=True) as run:
            images = self.pipe(
                latents=self.noise, num_inference_steps=steps, **self.inputs, **self.settings
            ).images
        return images, run.stats

    def differentiate(self, name: str, steps: int) -> int:
        """Picture, loss and backward pass; how many network calls that took."""
        if name in ("plain", "checkpoint"):
            images = self.plain(steps) if name == "plain" else self.checkpoint(steps)
            images.square().mean().backward()
            return steps if name == "plain" else 2 * steps
        images, stats = self.ours(name, steps)
        images.square().mean().backward()
        return stats.network_calls

    def clear(self) -> None:
        """Forget all gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def gradients(self) -> list[Tensor]:
        """Copies of all gradients."""
        return [leaf.grad.clone() for leaf in self.leaves if leaf.grad is not None]


class Bench:
    """Measures what the record does not hold yet: memory first, then time."""

    def __init__(self, options: argparse.Namespace, record: Record) -> None:
        self.options, self.record = options, record
        self.size = SMALL if options.small else FULL

    def run(self) -> None:
        for wants in self.options.wants:
            problem = PipelineProblem(self.size, wants)
            for steps in self.options.memory_steps:
                self._memory(problem, steps, "min")
            for name in NAMES:
                self._memory(problem, self.options.steps, name)
            self._host(problem)
            self._times(problem)

    def _memory(self, problem: PipelineProblem, steps: int, name: str) -> None:
        if self.record.find("memory", steps=steps, wants=problem.wants, method=name):
            return
        problem.clear()
        peak = peak_bytes(lambda: problem.differentiate(name, steps), CPU)
        self.record.add("memory", steps=steps, wants=problem.wants, method=name, peak_bytes=peak)
        print(f"memory  N={steps:<3} {problem.wants:4} {name:10} {peak / 1e6:8.1f} MB", flush=True)

    def _host(self, problem: PipelineProblem) -> None:
        """Bytes of the process that each further call of a run leaves behind at "min", until its backward pass."""
        if self.record.find("memory", steps=0, wants=problem.wants, method="host bytes a call"):
            return
        found = []
        for steps in self.options.memory_steps:
            problem.clear()
            gc.collect()
            before = host_bytes()
            kept = problem.ours("min", steps)
            found.append(host_bytes() - before)
            del kept
        few, *_, many = self.options.memory_steps
        rise = round((found[-1] - found[0]) / (many - few))
        self.record.add("memory", steps=0, wants=problem.wants, method="host bytes a call", peak_bytes=rise)
        print(f"host memory a call, {problem.wants}: {rise / 1e6:.2f} MB", flush=True)

    def _times(self, problem: PipelineProblem) -> None:
        steps, wants, reference = self.options.steps, problem.wants, None
        for repeat in range(self.options.repeats):
            turn = repeat % len(NAMES)
            for name in NAMES[turn:] + NAMES[:turn]:
                if self.record.find("times", steps=steps, wants=wants, method=name, repeat=repeat):
                    continue
                if reference is None:  # also warms up
                    problem.clear()
                    problem.differentiate("plain", steps)
                    reference = problem.gradients()
                problem.clear()
                calls: list[int] = []
                took = seconds(lambda: calls.append(problem.differentiate(name, steps)), CPU)  # noqa: B023
                same = all(map(torch.equal, problem.gradients(), reference))
                cell = {"repeat": repeat, "seconds": took, "calls": calls[0], "bits_equal": same}
                self.record.add("times", steps=steps, wants=wants, method=name, **cell)
                print(
                    f"time    N={steps:<3} {wants:4} {name:10} {took:8.3f} s  repeat {repeat + 1}", flush=True
                )


def rows(record: Record) -> list[list[str]]:
    """The README's rows."""
    found = []
    for wants, words in (("all", "every weight and input"), ("x_T", "the noise")):
        times = {
            name: {c["repeat"]: c["seconds"] for c in record.find("times", wants=wants, method=name)}
            for name in NAMES
        }
        if not all(times.values()):
            continue

        def ratio(name: str, to: str, times: dict[str, dict[int, float]] = times) -> str:
            return f"{median(times[name][r] / times[to][r] for r in times[name]):.2f}"

        same = all(c["bits_equal"] for c in record.find("times", wants=wants))
        found.append(
            [
                f"`differentiable` on a Stable Diffusion pipeline with the same UNet, gradients for {words}",
                f'{ratio("max", "plain")} of plain autograd\'s time at `"max"`, {ratio("min", "checkpoint")} of '
                f'per-call checkpointing\'s at `"min"`; {"the same bits" if same else "not the same bits"}',
            ]
        )
    return found


def main(arguments: list[str]) -> int:
    """Measure what is missing, and write the README's rows into the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-steps", type=int, nargs="+", default=[4, 31])
    parser.add_argument("--wants", nargs="+", choices=WANTS, default=list(WANTS), help="gradients for what")
    parser.add_argument("--small", action="store_true", help="a tiny network; proves nothing")
    parser.add_argument("--out", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    out = chosen.out or RESULTS / f"pipeline{'_small' if chosen.small else ''}.json"
    size = SMALL if chosen.small else FULL
    parameters = sum(p.numel() for p in size.unet().parameters())
    settings = {"parameters": parameters, "latents": [1, 4, size.side, size.side]}
    record = Record(out, machine(CPU), settings, "memory", "times")
    Bench(chosen, record).run()
    record.note("figures", rows(record))
    for what, value in record.data["figures"]:
        print(f"{what}: {value}")
    return 0


if __name__ == "__main__":
    if not MALLOC.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.pipeline", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **MALLOC})
    raise SystemExit(main(sys.argv[1:]))
