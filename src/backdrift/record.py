"""What a run's record begins with, and how two records are told apart (its format: ``run.py``)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import torch

from . import accelerators

FORMAT = "backdrift-run/1"
#: settings that a result does not depend on
NOT_DECISIVE = ("memory", "checkpoint_every")
PACKAGES = ("backdrift", "torch", "diffusers", "transformers", "peft", "numpy", "safetensors")


def new_record(
    kind: str,
    settings: Mapping[str, Any],
    *,
    title: str,
    prompt: list[str],
    seed: int,
    mark: str,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The record of a run that has done nothing yet; ``mark`` is its fingerprint."""
    return {
        "format": FORMAT,
        "kind": kind,
        "title": title,
        "status": "running",
        "message": "",
        "created": now(),
        "updated": now(),
        "prompt": prompt,
        "seed": seed,
        "settings": dict(settings),
        "fingerprint": mark,
        "versions": versions(),
        "machine": machine,
        **nothing_done(),
    }


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Where work is done: the system, the device (the CPU if None), and the CPU's threads."""
    return {
        "platform": platform.platform(),
        "device": accelerators.name(device or torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }


def nothing_done() -> dict[str, Any]:
    """The part of a record that work fills."""
    return {
        "iterations": [],
        "best": None,
        "pictures": {},
        "tensors": {},
        "files": {},
        "trace": None,
        "stats": dict.fromkeys(("network_calls", "redone", "vjps", "peak_bytes", "seconds")),
        "figures": {},
    }


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(finite(value), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on, as far as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"torch": str(torch.__version__)}  # which says the build, too (+cu130, +cpu)


def finite(value: Any) -> Any:
    """The same JSON value with numbers that are not finite replaced by ``null``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Which settings two records differ in, for a message."""

    def flat(record: dict[str, Any]) -> dict[str, Any]:
        return {k: record[k] for k in ("kind", "prompt", "seed")} | finite(record["settings"])

    a, b = flat(old), flat(new)
    names = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and k not in NOT_DECISIVE]
    shown = [f"{k}: {_short(a.get(k))} there, {_short(b.get(k))} given" for k in names[:4]]
    return "; ".join(shown) + ("; …" if len(names) > 4 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
