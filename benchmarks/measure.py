"""Time, live tensor bytes, and what the machine is."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# Without these, glibc gives every large tensor back to the system and asks for it again: a third of a
# CPU's time goes into page faults, most of it for whoever frees most. They are read when a process starts.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of ``work()``, garbage collected before it."""
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors alive at once during ``work()``, above those alive before it.

    On a CPU every allocation and release of PyTorch's allocator is recorded (by its profiler) and summed up:
    the resident size of the process would also count what the system's allocator keeps in reserve, and differs
    by a third between settings of that. Temporaries inside kernels count; what the profiler itself takes does
    not. On CUDA it is the allocator's own figure.
    """
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The inner profiler, since the outer one also builds a tree of all operators.
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        torch.empty(1)  # the first allocation inside is sometimes not recorded
        work()
    recorded = profile.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(recorded) if e.name() == "[memory]")
    if not changes:
        raise RuntimeError(
            "torch's profiler recorded no allocation: this version of torch records them elsewhere"
        )
    live = peak = 0
    for _, _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def host_bytes() -> int:
    """Resident bytes of this process, after what its allocator holds in reserve has been given back (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on: hardware and versions, nothing that names the machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "torchdiffeq": version("torchdiffeq"),
        "malloc": {name: os.environ.get(name) for name in MALLOC},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
