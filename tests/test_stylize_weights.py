"""What of each family's network reads the prompt, and is trained by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backdrift.errors import InputError
from backdrift.recipes.stylize_weights import CrossAttention, applied, cross_attention
from tiny_families import tiny_dit, tiny_pixart, tiny_pixels, tiny_sana, tiny_wan
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl


@pytest.mark.parametrize(
    "build", [tiny_sd, tiny_sdxl, tiny_pixart, tiny_sana, tiny_wan], ids=lambda b: b.__name__
)
def test_it_is_the_attn2_of_networks_that_have_one(build: Any) -> None:
    pipe = build()
    component = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    named = [k for k, _ in getattr(pipe, component).named_parameters() if ".attn2." in k]
    assert cross_attention(pipe) == [f"{component}.{k}" for k in named] != []


@pytest.mark.parametrize("build", [tiny_sd3, tiny_flux], ids=lambda b: b.__name__)
def test_where_picture_and_prompt_are_one_sequence_it_is_their_joint_attention(build: Any) -> None:
    pipe = build()
    named = [
        k
        for k, _ in pipe.transformer.named_parameters()
        if k.startswith("transformer_blocks.") and ".attn." in k
    ]
    assert cross_attention(pipe) == [f"transformer.{k}" for k in named]
    assert any(".add_k_proj." in k for k in named)
    assert any(".to_q." in k for k in named)


def test_the_second_attention_of_sd3_5_reads_no_prompt() -> None:
    """Its attn2 is a self-attention of the picture: the name alone does not tell."""
    from diffusers import SD3Transformer2DModel

    pipe = tiny_sd3()
    config = {**pipe.transformer.config, "dual_attention_layers": (0,)}
    del config["_use_default_values"]  # which would win over what is asked for
    pipe.transformer = SD3Transformer2DModel.from_config(config)
    names = [k for k, _ in pipe.transformer.named_parameters()]
    assert any(".attn2." in k for k in names)
    assert not any(".attn2." in k for k in cross_attention(pipe))


@pytest.mark.parametrize("build", [tiny_dit, tiny_pixels], ids=lambda b: b.__name__)
def test_a_network_without_prompts_has_none_and_says_what_to_do(build: Any) -> None:
    with pytest.raises(InputError, match="no attention that reads a prompt; say what to train: over='lora'"):
        cross_attention(build())


def test_values_are_applied_for_a_while_only() -> None:
    pipe, variable = tiny_sd(), CrossAttention()
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    values = {
        name: torch.full_like(dict(pipe.unet.named_parameters())[name.removeprefix("unet.")], 0.5)
        for name in cross_attention(pipe)
    }
    with applied(pipe, variable, values, [], seed=0):
        for name, value in pipe.unet.state_dict().items():
            wanted = values.get(f"unet.{name}", before[name])
            assert torch.equal(value, wanted), name
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
