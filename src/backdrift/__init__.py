"""backdrift: exact, memory-bounded gradients through diffusion and flow sampling.

Names are imported on first use, so that ``import backdrift`` costs little beyond torch and does not
import diffusers or transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._version import __version__

# public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "VP": "schedules",
    "EDM": "schedules",
    "Flow": "schedules",
    "Schedule": "schedules",
    "TimeGrid": "grids",
    "Denoiser": "denoiser",
    "Euler": "solvers",
    "Heun": "solvers",
    "RK4": "solvers",
    "AdamsBashforth": "solvers",
    "Midpoint": "solvers",
    "Ralston": "solvers",
    "BogackiShampine": "solvers",
    "ThreeEighths": "solvers",
    "DormandPrince": "solvers",
    "AdaptiveDormandPrince": "solvers",
    "DEIS": "solvers",
    "DPMSolver": "solvers",
    "DPMSolverPP": "solvers",
    "Ancestral": "solvers",
    "EulerMaruyama": "solvers",
    "ExponentialEuler": "solvers",
    "SDEDPMSolverPP": "solvers",
    "Brownian": "noises",
    "GivenNoise": "noises",
    "cycle_encode": "cycle",
    "CycleNoises": "cycle",
    "McCallumFoster": "solvers",
    "ReversibleHeun": "solvers",
    "EDICT": "solvers",
    "Pair": "solvers",
    "Plain": "gradients",
    "Exact": "gradients",
    "SymplecticAdjoint": "gradients",
    "ContinuousAdjoint": "gradients",
    "AdjointDEIS": "gradients",
    "Reversible": "gradients",
    "PerStep": "conditioning",
    "All": "through",
    "Last": "through",
    "Random": "through",
    "Steps": "through",
    "Trace": "trace",
    "sample": "sampling",
    "encode": "encoding",
    "SymplecticAdjointGuidance": "guidance",
    "guide": "guidance",
    "Solution": "sampling",
    "as_denoiser": "pipelines.view",
    "pipeline_grid": "pipelines.view",
    "load": "pipelines.load",
    "noise": "pipelines.load",
    "differentiable": "pipelines.differentiable",
    "plan": "pipelines.planned",
    "Choices": "planning.choices",
    "doctor": "pipelines.doctor",
    "Checkup": "pipelines.doctor",
    "optimize": "optimization",
    "Run": "run",
    "invert": "recipes.invert",
    "audit": "recipes.audit",
    "stylize": "recipes.stylize",
    "expand": "recipes.expand",
    "verify": "verification.certificate",
    "Certificate": "verification.certificate",
}
_MODULES = ("errors", "gradients", "guidance", "losses", "memory", "recipes", "report", "solvers")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'backdrift' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
