"""Rows on what a user has set up: everything that is known to stand in the way of gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...weights import adapter_layers
from ..endings import ending_of
from ..refusals import image_processors, plain_class
from ..shadow import networks, trained_parameters
from . import networks as look
from .rows import Row
from .verdicts import modules, network_refusals, refusal, split_refusal

TOPIC = "set-up"


def setup_rows(pipe: Any) -> Iterator[Row]:
    """A row for each thing that is there, refusals first, and one that names what is not."""
    absent: list[str] = []
    refused: set[str] = set()
    seen: dict[str, int] = {}
    for key, message in network_refusals(pipe):
        refused.add(key)
        seen[key] = seen.get(key, 0) + 1
        title = f"{key}: refused" if seen[key] == 1 else f"{key}: refused ({seen[key]})"
        yield Row("refused", TOPIC, title, *split_refusal(message))
    yield from _outputs(pipe, absent)
    yield from _decoder(pipe, absent)
    for name, rows in _parts(pipe, refused):
        found = list(rows)
        yield from found
        if not found:
            absent.append(name)
    if absent:
        yield Row("ok", TOPIC, "not set up", ", ".join(absent))


def _parts(pipe: Any, refused: set[str]) -> Iterator[tuple[str, Iterator[Row]]]:
    """What may have been set up on networks, by name, and its rows."""
    every, bare = modules(pipe), networks(pipe)  # with their wrappers, and without
    yield "offloading", _handled(
        every, look.offloading, "offloading",
        "{}: a run brings copies of weights to the device in the same grain, forward and backward", unless=refused,
    )  # fmt: skip
    yield "caches over the steps", _handled(
        bare, look.caches, "hooks",
        "{}: a redone call finds the state that the first one found; gradients pass skipped steps", unless=refused,
    )  # fmt: skip
    yield "layerwise casting", _handled(
        bare, look.cast, "layerwise casting",
        "{}: the wider weights belong to the call, and are kept or made again with its activations", unless=refused,
    )  # fmt: skip
    yield "functions in place of a forward", _handled(
        bare, look.own_forwards, "own forward",
        "a function stands in place of {}; it only calls layers, and is followed", unless=refused,
    )  # fmt: skip
    uncompiled = "a run calls the network itself, uncompiled"
    yield "torch.compile", _handled(every, look.compiled, "torch.compile", uncompiled)
    yield "quantised weights", _handled(
        bare, look.quantised, "quantised", "{}: frozen, gradients pass through to everything else",
        "train an adapter beside them: train='lora'",
    )  # fmt: skip
    yield "attention processors", _processors(pipe, refused)
    yield "gradient checkpointing", _checkpointing(pipe)
    yield "adapters", _adapters(pipe)
    yield "DistributedDataParallel", _handled(
        every, look.in_parallel, "parallel",
        "in DistributedDataParallel: gradients are averaged once, when all calls' parts have been added up",
        unless=refused,
    )  # fmt: skip
    yield "autocast or inference mode", _ambient()


def _outputs(pipe: Any, absent: list[str]) -> Iterator[Row]:
    cls = plain_class(type(pipe))
    if getattr(pipe, "safety_checker", None) is not None:
        yield Row(
            "handled", TOPIC, "safety checker",
            "runs on a copy: its flags are in the output and in run.flagged, pictures keep their gradient",
        )  # fmt: skip
    else:
        absent.append("safety checker")
    if getattr(pipe, "watermark", None) is not None:
        yield Row("handled", TOPIC, "watermark", "drawn in numpy, where gradients end: left out in a run")
    else:
        absent.append("watermark")
    if refusal(ending_of, cls, False) is None and ending_of(cls, False) is not None:
        found = "the pipeline clamps and makes arrays in its own code; a run gives back the tensor, unclamped"
    elif image_processors(pipe):
        found = "whatever output_type says, a run gives back a tensor in [0, 1], unclamped; run.pil has PIL copies"
    else:
        return
    yield Row("handled", TOPIC, "outputs", found, "clamp=True leaves diffusers' clamp in")


def _decoder(pipe: Any, absent: list[str]) -> Iterator[Row]:
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, nn.Module):
        return
    dtype, upcast = (
        getattr(vae, "dtype", None),
        bool(getattr(getattr(vae, "config", None), "force_upcast", False)),
    )
    if dtype == torch.float16 and upcast:
        yield Row(
            "handled", TOPIC, "decoder's precision",
            "float16 with force_upcast: a run decodes on a float32 copy, which is still there in backward()",
            "to train the decoder itself: pipe.vae.to(torch.float32)",
        )  # fmt: skip
    elif dtype == torch.float16:
        yield Row(
            "ok", TOPIC, "decoder's precision",
            "float16 and not upcast: fine for decoders made for it; others overflow (see 'finite' below)",
        )  # fmt: skip
    else:
        absent.append("upcast decoder")
    if getattr(vae, "use_tiling", False):
        yield Row(
            "warning", TOPIC, "decoder's tiles", "decodes in overlapping tiles: gradients are exact for the tiled "
            "picture, which differs from the whole one at the seams once it is larger than a tile",
            "pipe.vae.disable_tiling()",
        )  # fmt: skip


def _handled(
    parts: Mapping[str, Any],
    look_for: Callable[[Any], object],
    title: str,
    told: str,
    advice: str = "",
    unless: Collection[str] = (),
) -> Iterator[Row]:
    """A row for each network in which something is found that a run takes care of; ``told`` says how."""
    for key, module in parts.items():
        found = look_for(module)
        if found and key not in unless:
            yield Row("handled", TOPIC, f"{key}: {title}", told.format(found), advice)


def _processors(pipe: Any, refused: set[str]) -> Iterator[Row]:
    for key, module in networks(pipe).items():
        found = look.processors(module)
        if not found or key in refused:
            continue
        told = ", ".join(f"{n} x {name}" for (name, _), n in found.items())
        strange = sorted({home for _, home in found if not home.startswith("diffusers.")})
        if strange:
            told += f" (from {', '.join(strange)}; no word in their code cuts the graph)"
        yield Row("handled" if strange else "ok", TOPIC, f"{key}: attention", told)


def _checkpointing(pipe: Any) -> Iterator[Row]:
    for key, module in networks(pipe).items():
        blocks = look.checkpointed(module)
        if blocks and module.training:
            yield Row(
                "handled", TOPIC, f"{key}: checkpointing",
                f"gradient checkpointing in {blocks} places: right, but a redone call redoes its blocks once more",
                f"pipe.{key}.disable_gradient_checkpointing() and a memory= budget, which chooses it where it pays",
            )  # fmt: skip
        elif blocks:
            yield Row(
                "ok", TOPIC, f"{key}: checkpointing",
                f"gradient checkpointing in {blocks} places, without effect in eval mode",
            )  # fmt: skip


def _adapters(pipe: Any) -> Iterator[Row]:
    layers: list[tuple[str, Any]] = adapter_layers(list(networks(pipe).items()))
    if not layers:
        return
    names = sorted(
        {name for _, layer in layers for kind in layer.adapter_layer_names for name in getattr(layer, kind)}
    )
    active = sorted(
        {name for _, layer in layers for name in layer.active_adapters if not layer.disable_adapters}
    )
    merged = sorted({name for _, layer in layers for name in layer.merged_adapters})
    found = (
        f"{', '.join(names) or 'none left'} on {len(layers)} layers; active: {', '.join(active) or 'none'}"
    )
    if merged:
        yield Row(
            "warning", TOPIC, "adapters", f"{found}; {', '.join(merged)} fused into the weights, and cannot be trained",
            "pipe.unfuse_lora()",
        )  # fmt: skip
        return
    message = refusal(trained_parameters, pipe, "lora") if active else None
    if message is not None:
        yield Row("warning", TOPIC, "adapters", f"{found}; {message}")
    else:
        yield Row("ok", TOPIC, "adapters", f"{found}; train='lora' gives the active ones gradients")


def _ambient() -> Iterator[Row]:
    if torch.is_inference_mode_enabled():
        yield Row(
            "refused", TOPIC, "inference mode", "this is called inside torch.inference_mode(), which forbids gradients",
            "leave that block",
        )  # fmt: skip
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if kinds:
        told = ", ".join(f"{kind} in {torch.get_autocast_dtype(kind)}" for kind in kinds)
        yield Row(
            "handled",
            TOPIC,
            "autocast",
            f"on for {told}: redone calls run under it too, wherever backward() is",
        )
