"""Rows on the pipeline itself: its class, where tensors go in, its schedulers, the versions around it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..._version import __version__
from ...accelerators import random_numbers_kept
from ..modular import is_modular
from ..refusals import check_pipeline, plain_class, reached
from ..shadow import Train, copied_scheduler, trained_parameters
from ..steps import check_steps, step_error
from ..trainable import check_trainable
from ..twins import names
from .arguments import accepted
from .rows import Row
from .verdicts import refusal, schedulers, split_refusal, with_one_network, with_one_scheduler

TOPIC = "pipeline"
#: Classes whose gradients are compared bit for bit in the tests, and what people call them.
FAMILIES = {
    "StableDiffusionPipeline": "Stable Diffusion",
    "StableDiffusionXLPipeline": "Stable Diffusion XL",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "Flux",
    "PixArtSigmaPipeline": "PixArt",
    "DiTPipeline": "DiT",
    "DDPMPipeline": "DDPM, in pixels",
    "DDIMPipeline": "DDIM, in pixels",
    "SanaPipeline": "Sana",
    "AnimateDiffPipeline": "AnimateDiff",
    "WanPipeline": "Wan",
    "StableAudioPipeline": "Stable Audio",
    "StableDiffusionXLModularPipeline": "Modular (Stable Diffusion XL's blocks)",
}
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
_OLDEST = {
    "torch": (2, 4),
    "diffusers": (0, 35),
    "transformers": (4, 48),
    "accelerate": (1, 0),
    "peft": (0, 15),
}


def versions_row() -> Row:
    """The packages that gradients pass through."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    old = [p for p, v in found.items() if v[0].isdigit() and _numbers(v) < _OLDEST[p]]
    told = ", ".join(f"{p} {v}" for p, v in found.items())
    told += f"; backdrift {__version__}, Python {platform.python_version()}"
    advice = "; ".join(f"pip install -U '{p}>={'.'.join(map(str, _OLDEST[p]))}'" for p in old)
    return Row("warning" if old else "ok", TOPIC, "versions", told, advice)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def class_row(pipe: Any) -> Row:
    """The pipeline's class, and whether its code lets gradients through."""
    cls = plain_class(type(pipe))
    message = refusal(check_pipeline, pipe)
    if message is not None:
        return Row("refused", TOPIC, "pipeline", *split_refusal(message))
    family = FAMILIES.get(cls.__name__) if cls.__module__.startswith("diffusers.") else None
    home = "of diffusers" if cls.__module__.startswith("diffusers.") else f"from {cls.__module__}"
    kind = "modular pipeline, its blocks run as copies without no_grad" if is_modular(cls) else "pipeline"
    found = f"{cls.__name__}, a {kind} {home}"
    if family is not None:
        found += f"; family {family}, compared bit for bit with plain autograd in backdrift's tests"
        return Row("handled" if is_modular(cls) else "ok", TOPIC, "pipeline", found)
    found += (
        "; not one of the families in backdrift's own tests: what is measured below is what is known of it"
    )
    return Row("ok", TOPIC, "pipeline", found)


def noise_row(pipe: Any) -> Row:
    """How the initial noise is handed in."""
    if "latents" in accepted(pipe):
        return Row("ok", TOPIC, "noise", "goes in as latents=")
    return Row(
        "handled", TOPIC, "noise", "the pipeline takes no latents=; its own random draw can be replaced",
        "bd.differentiable(pipe, noise=tensor)",
    )  # fmt: skip


def embeddings_row(pipe: Any) -> Row:
    """How prompt embeddings are handed in."""
    found = [name for name in accepted(pipe) if name.endswith("prompt_embeds")]
    if found:
        return Row("ok", TOPIC, "embeddings", f"go in as {', '.join(f'{name}=' for name in found)}")
    return Row(
        "handled", TOPIC, "embeddings", "the pipeline takes no prompt_embeds=",
        "a forward hook on its text encoder or embedding layer that returns your tensor",
    )  # fmt: skip


def weights_row(pipe: Any, train: Train) -> Row:
    """Which weights get gradients, and which could."""
    if train is not None:
        message = refusal(_check_trained, pipe, train)
        if message is not None:
            return Row("refused", TOPIC, "weights", *split_refusal(message))
        trained = trained_parameters(pipe, train)
        count = sum(p.numel() for p in trained.values())
        return Row("ok", TOPIC, "weights", f"train={train!r}: {len(trained)} tensors, {count:,} numbers")
    return Row(
        "ok", TOPIC, "weights", "none get gradients (train=None)",
        "bd.doctor(pipe, train='lora') (or a component, or a pattern of names) examines those of weights",
    )  # fmt: skip


def _check_trained(pipe: Any, train: Train) -> None:
    check_trainable(pipe, trained_parameters(pipe, train))


def scheduler_rows(pipe: Any) -> Iterator[Row]:
    """Each scheduler: its step, its times, its state; and decoders that round to a codebook."""
    for key, scheduler in schedulers(pipe).items():
        view = with_one_scheduler(with_one_network(pipe, None), key)
        name = type(scheduler).__name__
        message = refusal(check_steps, view)
        if message is not None:
            yield Row("refused", TOPIC, key, *split_refusal(message))
            continue
        with random_numbers_kept():
            error = step_error(scheduler)
        facts = [f"{name}: its step is differentiable"]
        if error is not None:
            facts.append(f"on a toy network its gradient is {error:.1g} off finite differences")
        elif not type(scheduler).__module__.startswith("diffusers."):
            facts.append("its code cuts no graph, but it cannot be run by itself")
        times, kept = _clock_and_memory(scheduler)
        status: Any = "ok"
        if times:
            facts.append(times)
        if kept:
            status = "handled"
            facts.append(f"keeps state over the steps ({', '.join(kept)}); a run works on a copy")
        if {"randn_tensor", "randn", "randn_like"} & {
            n for _, c in reached(type(scheduler), "step") for n in names(c)
        }:
            facts.append("can draw noise in its steps: seed them with generator=")
        figures = {} if error is None else {"step error": error}
        yield Row(status, TOPIC, key, "; ".join(facts), figures=figures)
    message = refusal(check_steps, with_one_scheduler(pipe, None))
    if message is not None:
        yield Row("refused", TOPIC, "codebook", *split_refusal(message))


def _clock_and_memory(scheduler: Any) -> tuple[str, list[str]]:
    """What a scheduler does to times, in words, and the attributes that its steps leave changed."""
    own = copied_scheduler(scheduler)
    try:
        with random_numbers_kept(), torch.no_grad():
            own.set_timesteps(7)
            times = torch.as_tensor(own.timesteps)
            before = {k: repr(v) for k, v in vars(own).items()}
            x = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
            for t in own.timesteps[:3]:
                scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
                x = own.step(0.1 * scaled, t, x, return_dict=False)[0]
            now = {k: repr(v) for k, v in vars(own).items()}
    except Exception:  # takes other arguments: nothing can be said
        return "", []
    whole = not times.is_floating_point() or bool((times == times.round()).all())
    said = (
        "rounds its times to whole numbers, as it was trained; gradients are those at these times"
        if whole
        else ""
    )
    return said, [k.lstrip("_") for k, v in now.items() if before.get(k) != v and "step_index" not in k]
