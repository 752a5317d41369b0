"""Weights and LoRA weights as things to optimise."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..pipelines.homes import named_weights
from ..pipelines.shadow import lora_names, networks, unwrapped
from ..run import Run
from ..suggest import closest
from .adapter import one_more_adapter
from .subject import Example, denoiser
from .variables import Noise, PromptEmbeds, Variable


class Weights(Variable):
    """Weights of the pipeline's components: a component's name, patterns such as ``"unet.*attn2*"``, or both.

    They are trained in place and **put back on leaving**; the trained values are in the run's tensors.
    """

    name = "weights"
    lr = 1e-4

    def __init__(self, patterns: str | Sequence[str]) -> None:
        super().__init__()
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns)

    @contextmanager
    def on(self, pipe: Any, examples: Sequence[Example]) -> Iterator[None]:
        self.parameters = select(pipe, self.patterns)
        self.train = list(self.parameters)
        values = {k: p.detach().clone() for k, p in self.parameters.items()}
        flags = {k: p.requires_grad for k, p in self.parameters.items()}
        try:
            for p in self.parameters.values():
                p.requires_grad_(True)
            yield
        finally:
            with torch.no_grad():
                for k, p in self.parameters.items():
                    p.copy_(values[k])
                    p.requires_grad_(flags[k])

    def settings(self) -> dict[str, Any]:
        return {"over": self.patterns}


class Lora(Weights):
    """LoRA weights: those of the pipeline's active adapters, or with ``rank`` a new adapter on its network.

    A new adapter is trained beside the active ones and removed on leaving. What was trained is exported in diffusers'
    own format, for ``pipe.load_lora_weights(folder)``; several adapters each into a folder of its own name.
    """

    name = "lora"
    lr = 1e-3
    adapter = "backdrift"
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, rank: int | None = None) -> None:
        super().__init__(["lora"])
        self.rank = rank

    @contextmanager
    def on(self, pipe: Any, examples: Sequence[Example]) -> Iterator[None]:
        if self.rank is None:
            with super().on(pipe, examples):
                yield
            return
        component, network = denoiser(pipe)
        network = unwrapped(network)
        self.patterns = [f"{component}.*lora_*.{self.adapter}.*"]
        more = one_more_adapter(component, network, self.adapter, self.rank, self.targets)
        with more, super().on(pipe, examples):
            yield

    def export(self, pipe: Any, run: Run) -> None:
        from peft import get_peft_model_state_dict

        parts: dict[str, Any] = {k: m for k, m in networks(pipe).items() if getattr(m, "peft_config", None)}
        adapters = list(dict.fromkeys(name for m in parts.values() for name in m.peft_config))
        trained = [a for a in adapters if any(f".{a}." in f"{name}." for name in self.parameters)]
        for adapter in trained:
            layers: dict[str, Any] = {}
            for name, network in parts.items():
                mine = [k for k in self.parameters if k.startswith(f"{name}.") and f".{adapter}." in f"{k}."]
                if mine:
                    layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network, adapter_name=adapter)
                    layers[f"{name}_lora_adapter_metadata"] = network.peft_config[adapter].to_dict()
            folder, label = ("lora", "lora") if len(trained) == 1 else (f"lora/{adapter}", f"lora {adapter}")
            pipe.save_lora_weights(str(run.folder / folder), **layers)
            run.record["files"][label] = {
                "path": f"{folder}/pytorch_lora_weights.safetensors",
                "caption": "load with pipe.load_lora_weights(folder)",
            }

    def settings(self) -> dict[str, Any]:
        return {"over": "lora", "rank": self.rank}


def variable_for(over: str | Sequence[str] | Variable, rank: int | None) -> Variable:
    """The variable that ``over`` means.

    Raises:
        InputError: ``rank`` is given for something else than a LoRA, or is not positive.
    """
    if rank is not None and (over != "lora" or rank < 1):
        raise InputError(
            f"rank={rank} makes a LoRA: it must be at least 1 and needs over='lora', got over={over!r}."
        )
    if isinstance(over, Variable):
        return over
    if over == "noise":
        return Noise()
    if over == "prompt_embeds":
        return PromptEmbeds()
    if over == "lora":
        return Lora(rank)
    return Weights(over)


def select(pipe: Any, patterns: Sequence[str]) -> dict[str, Tensor]:
    """The parameters ``component.name`` that match any of ``patterns``.

    Raises:
        InputError: a pattern matches nothing.
    """
    found: dict[str, Tensor] = {}
    components = networks(pipe)  # without the wrappers of torch.compile, as differentiable names them
    weights = {c: {k: p for k, p, _ in named_weights(m)} for c, m in components.items()}
    for pattern in patterns:
        if pattern == "lora":
            named = {f"{c}.{k}": p for c, found_there in weights.items() for k, p in found_there.items()}
            chosen = {name: named[name] for name in lora_names(components)}
        elif pattern in components:
            chosen = {f"{pattern}.{k}": p for k, p in weights[pattern].items()}
        else:
            chosen = {
                f"{c}.{k}": p
                for c, named in weights.items()
                for k, p in named.items()
                if fnmatch.fnmatchcase(f"{c}.{k}", pattern)
            }
        if not chosen:
            hint = closest(pattern, ["noise", "prompt_embeds", *components])
            if "lora" in pattern:
                hint = " The pipeline carries no active LoRA: load one, or give rank=4."
            if pattern in ("noise", "prompt_embeds"):
                hint = f" {pattern!r} is optimised alone, not in a list."
            raise InputError(
                f"over={pattern!r} matches no weight of the pipeline.{hint} Allowed: 'noise', 'prompt_embeds', 'lora', "
                f"a component ({', '.join(sorted(components))}), or patterns such as 'unet.*attn2*'."
            )
        found |= chosen
    return found
