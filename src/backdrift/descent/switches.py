"""What a user may have set on networks without touching a weight, and what changes the pictures all the same.

A run's folder must not be taken for that of another set-up, so the description of a pipeline names it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from ..weights import adapter_layers

_FREEU = ("s1", "s2", "b1", "b2")


def switched_on(pipe: Any) -> dict[str, Any]:
    """Active adapters and their scales, FreeU, IP-Adapters' scales, decoding in tiles, train mode, as JSON.

    Only what is there is named: nothing of an ordinary pipeline.
    """
    networks = sorted((k, m) for k, m in pipe.components.items() if isinstance(m, nn.Module))
    found: dict[str, Any] = {}
    adapters = [[name, *_adapter(layer)] for name, layer in adapter_layers(networks)]
    if adapters:
        found["adapters"] = hashlib.sha256(json.dumps(adapters).encode()).hexdigest()[:16]
    for name, network in networks:
        layers = [(type(layer).__name__, vars(layer)) for layer in network.modules()]
        freeu = [[own[k] for k in _FREEU] for _, own in layers if all(own.get(k) is not None for k in _FREEU)]
        images = [own["scale"] for kind, own in layers if "IPAdapter" in kind and "scale" in own]
        if freeu:
            found[f"{name} FreeU"] = freeu[0]
        if images:
            found[f"{name} image prompts"] = hashlib.sha256(repr(images).encode()).hexdigest()[:16]
        if getattr(network, "use_tiling", False):
            found[f"{name} tiles"] = {k: v for k, v in sorted(vars(network).items()) if k.startswith("tile_")}
        if network.training:
            found[f"{name} mode"] = "train"
    return found


def _adapter(layer: Any) -> list[Any]:
    # Rounded: diffusers multiplies and divides scales around each call, which costs the last digit.
    scales = {k: float(f"{v:.6g}") for k, v in sorted(getattr(layer, "scaling", {}).items())}
    return [list(layer.active_adapters), bool(layer.disable_adapters), scales]
