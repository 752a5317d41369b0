"""What stylisation trains, and the file it is taken away in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..descent import Example, Lora, Variable
from ..descent import Weights as WeightsInPlace
from ..descent.randomness import seeded
from ..descent.subject import denoiser
from ..descent.weights import select
from ..errors import InputError
from ..files import write_atomically
from ..pipelines.homes import named_weights
from ..run import Run

CROSS_ATTENTION = "cross-attention"


class Weights(WeightsInPlace):
    """Weights by their patterns, exported one file per component, with the component's own names.

    ``pipe.unet.load_state_dict(safetensors.torch.load_file(file), strict=False)`` takes them up again.
    """

    def export(self, pipe: Any, run: Run) -> None:
        from safetensors.torch import save

        by_component: dict[str, dict[str, Tensor]] = {}
        for name, value in self.parameters.items():
            component, _, key = name.partition(".")
            by_component.setdefault(component, {})[key] = value.detach().cpu().contiguous()
        for component, values in by_component.items():
            path = f"weights/{component}.safetensors"
            data = save(values, metadata={"format": "pt", "component": component})
            write_atomically(run.folder / path, lambda file, data=data: file.write(data))  # type: ignore[misc]
            how = f"pipe.{component}.load_state_dict(safetensors.torch.load_file(file), strict=False)"
            run.record["files"][f"{component} weights"] = {
                "path": path,
                "caption": f"{len(values)} tensors, {sum(v.numel() for v in values.values())} numbers; load with {how}",
            }


class CrossAttention(Weights):
    """The layers of the denoising network in which the picture reads the prompt, the paper's choice."""

    def __init__(self) -> None:
        super().__init__([])

    @contextmanager
    def on(self, pipe: Any, examples: Sequence[Example]) -> Iterator[None]:
        self.patterns = cross_attention(pipe)
        with super().on(pipe, examples):
            yield

    def settings(self) -> dict[str, Any]:
        return {"over": CROSS_ATTENTION}


def cross_attention(pipe: Any) -> list[str]:
    """The names ``component.weight`` of every weight of the denoising network's cross-attention.

    That is every attention whose keys come from the prompt: the ``attn2`` of UNets, PixArt, Sana and Wan. In the
    transformers of SD3 and Flux picture and prompt are one sequence, and the counterpart are the joint attentions,
    which have projections of their own for the prompt (``add_k_proj``). A layer's queries and output belong to it.

    Raises:
        InputError: the network has no such layer.
        UnsupportedError: the pipeline has neither a UNet nor a transformer.
    """
    component, network = denoiser(pipe)
    found = [name for name, module in network.named_modules() if _reads_prompt(module)]
    weights = [key for key, _, _ in named_weights(network) if any(key.startswith(f"{m}.") for m in found)]
    if not weights:
        raise InputError(
            f"{type(network).__name__} has no attention that reads a prompt; say what to train: over='lora', "
            f"over={component!r}, or patterns such as '{component}.*attn*'."
        )
    return [f"{component}.{key}" for key in weights]


def _reads_prompt(module: nn.Module) -> bool:
    crossed = getattr(module, "is_cross_attention", False) is True
    return crossed or isinstance(getattr(module, "add_k_proj", None), nn.Module)


def variable_for(over: str | Sequence[str] | Variable, rank: int | None) -> Variable:
    """The weights that ``over`` means.

    Raises:
        InputError: it means the noise or the prompt, or ``rank`` is given for something else than a LoRA.
    """
    if rank is not None and (over != "lora" or rank < 1):
        raise InputError(
            f"rank={rank} makes a LoRA: it must be at least 1 and needs over='lora', got over={over!r}."
        )
    if isinstance(over, Variable):
        if not isinstance(over, WeightsInPlace):
            raise InputError(f"over= must be weights, which all pictures share, not {over.name!r}.")
        return over
    if over == CROSS_ATTENTION:
        return CrossAttention()
    if over == "lora":
        return Lora(rank)
    if over in ("noise", "prompt_embeds"):
        raise InputError(
            f"over={over!r} belongs to one picture; a style is learnt by weights, which all pictures share: "
            f"{CROSS_ATTENTION!r}, 'lora', a component, or patterns such as 'unet.*attn2*'."
        )
    return Weights(over)


def check_there(pipe: Any, variable: Variable) -> None:
    """See that the pipeline has what the variable trains, before anything is sampled.

    Raises:
        InputError: it has not.
    """
    if isinstance(variable, CrossAttention):
        cross_attention(pipe)
    elif isinstance(variable, Weights) or (isinstance(variable, Lora) and variable.rank is None):
        select(pipe, variable.patterns)


@contextmanager
def applied(
    pipe: Any, variable: Variable, values: dict[str, Tensor], examples: Sequence[Example], seed: int
) -> Iterator[None]:
    """The pipeline with these values of the variable; as it was on leaving."""
    with ExitStack() as stack:
        with seeded(seed, "start"):  # a new LoRA is drawn at random, before it gets its values
            stack.enter_context(variable.on(pipe, examples))
        with torch.no_grad():
            for name, parameter in variable.parameters.items():
                parameter.copy_(values[name])
        yield
