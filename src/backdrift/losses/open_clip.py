"""CLIP checkpoints in open_clip's layout (``visual.transformer.resblocks.…``) as transformers' ``CLIPModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

_WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_TURNED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWERS = {"transformer.resblocks": "text_model", "visual.transformer.resblocks": "vision_model"}


def from_open_clip(
    state: Mapping[str, Tensor], *, vision_head: int, text_head: int = 64, activation: str = "gelu"
) -> Any:
    """A frozen ``CLIPModel`` in float32, with the sizes that the tensors have.

    Args:
        state: Tensors by open_clip's names, of a vision transformer with class-token pooling.
        vision_head, text_head: Width of an attention head, which no tensor tells (80 in ViT-H/14's pictures, else 64).
        activation: ``"gelu"``, or ``"quick_gelu"`` for OpenAI's weights.

    Raises:
        InputError: When names or shapes are not those.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        renamed = _renamed(state)
        config = CLIPConfig(**_sizes(state, vision_head, text_head, activation))
        with torch.device("meta"):
            model = CLIPModel(config)
        model.load_state_dict(renamed, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(
            "These weights are not a CLIP in open_clip's layout (visual.conv1.weight, "
            f"visual.transformer.resblocks.0.ln_1.weight, …, text_projection, logit_scale): {line}"
        ) from error
    for module in model.modules():  # the counting buffers are in no checkpoint
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    return model.eval().requires_grad_(False)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {new: state[old] for old, new in _WHOLE.items()}
    made |= {new: state[old].T.contiguous() for old, new in _TURNED.items()}
    for old, new in _NORMS.items():
        made |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    for old, tower in _TOWERS.items():
        for i in range(_depth(state, old)):
            block = f"{tower}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                made |= {
                    f"{block}.{new}.{kind}": state[f"{old}.{i}.{part}.{kind}"] for part, new in _BLOCK.items()
                }
                for letter, part in zip("qkv", state[f"{old}.{i}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    made[f"{block}.self_attn.{letter}_proj.{kind}"] = part
    return {name: nn.Parameter(t.float(), requires_grad=False) for name, t in made.items()}


def _sizes(state: Mapping[str, Tensor], vision_head: int, text_head: int, activation: str) -> dict[str, Any]:
    convolution, table = state["visual.conv1.weight"], state["token_embedding.weight"]
    patch, width = convolution.shape[-1], convolution.shape[0]
    side = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)

    def tower(name: str, width: int, head: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": state[f"{name}.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _depth(state, name),
            "num_attention_heads": width // head,
            "projection_dim": state["visual.proj"].shape[1],
            "hidden_act": activation,
        }

    return {
        "projection_dim": state["visual.proj"].shape[1],
        "vision_config": {
            **tower("visual.transformer.resblocks", width, vision_head),
            "patch_size": patch,
            "image_size": patch * side,
        },
        "text_config": {
            **tower("transformer.resblocks", table.shape[1], text_head),
            "vocab_size": table.shape[0],
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "bos_token_id": table.shape[0] - 2,
            "eos_token_id": table.shape[0] - 1,
            "pad_token_id": table.shape[0] - 1,
        },
    }


def _depth(state: Mapping[str, Tensor], name: str) -> int:
    end = ".ln_1.weight"
    return sum(key.startswith(f"{name}.") and key.endswith(end) for key in state)
