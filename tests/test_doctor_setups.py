"""The doctor on set-ups: all that is refused is told, what is handled has its row, what is not there is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import backdrift as bd
from tiny_pipelines import tiny_ddim, tiny_flux, tiny_sd


class Detaching(diffusers.DDIMScheduler):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        return super().step(model_output, timestep, sample.detach(), **kwargs)


class Cutting:
    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.detach()


def test_all_refusals_are_told_not_only_the_first() -> None:
    pipe = tiny_sd()
    pipe.scheduler = Detaching.from_config(tiny_ddim().config)
    pipe.unet.set_attn_processor(Cutting())
    state = {"kept": [0]}
    inner = pipe.vae.decoder.mid_block.forward

    def keeping(*args: Any, **kwargs: Any) -> Any:
        state["kept"].append(1)
        return inner(*args, **kwargs)

    pipe.vae.decoder.mid_block.forward = keeping
    pipe.text_encoder = DataParallel(pipe.text_encoder)
    checkup = bd.doctor(pipe)
    assert not checkup.ok
    refused = {row.title: f"{row.found}; {row.advice}" for row in checkup.refused}
    assert set(refused) == {"scheduler", "unet: refused", "vae: refused", "text_encoder: refused"}
    for title, words in (
        ("scheduler", "DDIMScheduler.from_config"),
        ("unet: refused", "set_default_attn_processor"),
        ("vae: refused", "keeps a dict"),
        ("text_encoder: refused", "DataParallel"),
    ):
        assert words in refused[title]
    assert not any(row.topic == "gradient" for row in checkup)  # nothing was run
    assert "not differentiable" in checkup.summary
    with pytest.raises(bd.errors.UnsupportedError):
        bd.differentiable(pipe)


@pytest.mark.parametrize("layers", [False, True])
def test_offloading_is_handled(layers: bool) -> None:
    pipe = tiny_sd()
    (pipe.enable_sequential_cpu_offload if layers else pipe.enable_model_cpu_offload)(device="cpu")
    hooks = {name: m._hf_hook for name, m in pipe.components.items() if hasattr(m, "_hf_hook")}
    checkup = bd.doctor(pipe, directions=1)
    assert checkup.ok, checkup.table()
    for key in ("unet", "vae", "text_encoder"):
        assert checkup[f"{key}: offloading"].status == "handled"
        assert getattr(pipe, key)._hf_hook is hooks[key]
    assert checkup["beside plain autograd"].figures["relative difference"] == 0.0
    assert checkup["by the noise"].status == "ok"


def test_caches_are_handled_and_keep_their_state() -> None:
    pipe = tiny_flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.4))
    checkup = bd.doctor(pipe, directions=1, num_inference_steps=4)
    assert checkup["transformer: hooks"].status == "handled", checkup.table()
    assert checkup["beside plain autograd"].status == "ok", checkup.table()
    pipe = tiny_flux()
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
    )
    assert "disable_cache()" in bd.doctor(pipe)["transformer: refused"].advice


class Watermark:
    def apply_watermark(self, images: Tensor) -> Tensor:
        return torch.from_numpy(images.numpy())


def test_what_is_set_up_has_its_row() -> None:
    pipe = tiny_sd(safety_checker=True)
    pipe.watermark = Watermark()
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    pipe.vae.enable_tiling()
    inner = pipe.unet.mid_block.forward
    pipe.unet.mid_block.forward = lambda *args, **kwargs: 0.5 * inner(*args, **kwargs)
    checkup = bd.doctor(pipe, directions=0)
    handled = {row.title for row in checkup.of("handled")}
    assert {"safety checker", "watermark", "unet: checkpointing", "unet: own forward", "outputs"} <= handled
    assert checkup["decoder's tiles"].status == "warning"
    assert "train mode" in checkup["unet"].found
    absent = checkup["not set up"].found
    for thing in ("offloading", "torch.compile", "quantised weights", "adapters", "DistributedDataParallel"):
        assert thing in absent
    for thing in ("safety checker", "watermark", "gradient checkpointing"):
        assert thing not in absent
    assert "keeps state over the steps" not in checkup["scheduler"].found  # DDIM keeps none
    pipe = tiny_sd()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[1].p = 0.5
    pipe.unet.train()
    checkup = bd.doctor(pipe, directions=0)
    assert "model_outputs" in checkup["scheduler"].found
    assert checkup["unet"].status == "warning"
    assert "1 Dropout at work" in checkup["unet"].found


def test_quantised_weights_have_their_row() -> None:
    pipe = tiny_sd()
    pipe.unet.conv_in.weight = nn.Parameter(pipe.unet.conv_in.weight.to(torch.int8), requires_grad=False)
    checkup = bd.doctor(pipe, directions=0)
    assert "by the noise" not in checkup
    row = checkup["unet: quantised"]
    assert row.status == "handled"
    assert "1 tensors" in row.found
    assert "int8" in row.found


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_wrapped_and_adapted_networks_have_their_rows() -> None:
    from peft import LoraConfig

    pipe = tiny_sd()
    pipe.unet = DistributedDataParallel(pipe.unet)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    checkup = bd.doctor(pipe, directions=0)
    assert checkup.ok, checkup.table()
    assert checkup["unet: parallel"].status == "handled"
    assert checkup["unet"].found.startswith("UNet2DConditionModel")
    assert checkup["beside plain autograd"].status == "ok"
    assert checkup["adapters"].found.startswith("default on 2 layers; active: default")
