"""The doctor: rows that say what is so, gradients measured right and found wrong, and nothing left changed."""

from __future__ import annotations

import json
import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import InputError
from pipeline_state import state_of
from tiny_pipelines import PICTURE, embeds_for, tiny_ddim, tiny_flux, tiny_sd, tiny_sdxl


def said(checkup: Any) -> str:
    """The table on failure, and that every line of it fits."""
    text = checkup.table(100)
    assert max(map(len, text.splitlines()[1:])) <= 100
    return text


# ---- right gradients ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> Any:
    """The checkup of a sound pipeline, which is as it was before."""
    pipe = tiny_sd()
    random, before = torch.get_rng_state(), state_of(pipe)
    checkup = bd.doctor(pipe, directions=1, seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert state_of(pipe) == before
    return checkup


def test_a_sound_pipeline_is_found_sound(sound: Any) -> None:
    checkup = sound
    assert checkup.ok, said(checkup)
    assert not checkup.of("skipped"), said(checkup)
    assert not checkup.of("warning"), said(checkup)
    assert checkup["beside plain autograd"].figures["relative difference"] == 0.0
    for title in ("by the noise", "by the embeddings"):
        figures = checkup[title].figures
        assert figures["relative error"] < 2e-3 < figures["tolerance"] + 1e-3 < 0.1
    # two steps with guidance, one decode, and everything redone once under "min"
    assert "2 steps at 16x16 pixels" in checkup["finite"].found
    small = checkup["activations, small call"].figures
    assert 0 < small["min"] < small["max"]
    assert "(2 network calls made again)" in checkup["seconds, small call"].found


def test_the_same_seed_says_the_same(sound: Any) -> None:
    first, second = sound.to_dict(), bd.doctor(tiny_sd(), directions=1, seed=3).to_dict()
    for rows in (first["rows"], second["rows"]):
        (timed,) = (row for row in rows if row["title"] == "seconds, small call")
        rows.remove(timed)
    assert json.loads(json.dumps(first)) == second


def test_weights_are_measured_where_they_are_trained() -> None:
    from peft import LoraConfig

    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    before = state_of(pipe)
    checkup = bd.doctor(pipe, train="lora", directions=1)
    assert state_of(pipe) == before
    assert checkup.ok, said(checkup)
    assert checkup["by the weights"].status == "ok", said(checkup)
    assert "default on" in checkup["adapters"].found
    assert bd.doctor(tiny_sd(), train="lora").refused[0].title == "weights"


def test_what_is_counted_is_what_the_planner_says(sound: Any) -> None:
    pipe = tiny_sd()
    plan = bd.plan(
        pipe, num_inference_steps=30, **{k: v.requires_grad_() for k, v in embeds_for(pipe).items()}
    )
    figures = sound["30 steps"].figures
    assert figures["max"] == pytest.approx(plan.plain.needs.peak, rel=0.02)
    assert figures["weights"] == plan.job.weights
    assert sound["one network call"].figures["unet saved"] == plan.needs["activations of one call of unet"]


# ---- wrong gradients -----------------------------------------------------------------------------------------


class Weaker(torch.autograd.Function):
    """SiLU, with a gradient that is 30 % too small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return 0.7 * grad * s * (1 + x * (1 - s))


class WeakerSiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Weaker.apply(x)


@pytest.mark.parametrize("place", ["decoder", "network"])
def test_a_wrong_backward_pass_is_found_and_named(place: str) -> None:
    pipe = tiny_sd()
    if place == "decoder":
        pipe.vae.decoder.conv_act = WeakerSiLU()
    else:
        pipe.unet.conv_act = WeakerSiLU()
    checkup = bd.doctor(pipe, directions=1)
    assert not checkup.ok
    assert checkup["beside plain autograd"].status == "ok"  # as wrong as plain autograd
    assert checkup["by the noise"].status == "failed", said(checkup)
    assert checkup["by the noise"].figures["relative error"] > 0.02
    where = checkup["where"].found
    assert ("vae.decoder.conv_act" if place == "decoder" else "unet.conv_act") in where
    assert "unet.conv_in" not in where
    assert "do not trust" in checkup.summary


def test_a_step_that_hides_its_rounding_is_found() -> None:
    """Wrong only beyond the numbers that the scheduler's own check tries."""

    class Fading(diffusers.DDIMScheduler):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            if sample.shape[-1] > 4:  # the check's toy network has 4
                model_output = model_output + 0.5 * (sample.data - sample)
            return super().step(model_output, timestep, sample, **kwargs)

    pipe = tiny_sd()
    pipe.scheduler = Fading.from_config(tiny_ddim().config)
    checkup = bd.doctor(pipe)
    assert checkup["by the noise"].status == "failed", said(checkup)
    assert checkup["where"].status == "warning"
    assert "scheduler" in checkup["where"].found


def test_a_wrong_compiled_backward_is_told_by_how_much() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 0.7 * grad

    class Around(nn.Module):  # torch's own layers are not compiled alone
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def compiler(module: Any, inputs: Any) -> Any:
        return lambda *args: tuple(Scaled.apply(x) for x in module(*args))

    pipe = tiny_sd()
    pipe.unet.conv_in = Around(pipe.unet.conv_in)
    pipe.unet.conv_in.compile(backend=compiler)
    checkup = bd.doctor(pipe, directions=0)
    row = checkup["unet: compiled backward"]
    assert row.status == "warning", said(checkup)
    assert row.figures["relative error"] == pytest.approx(0.3, rel=1e-4)
    assert checkup.ok  # a run does not use it
    pipe.unet.conv_in.compile(backend="eager")
    assert bd.doctor(pipe, directions=0)["unet: compiled backward"].status == "ok"


# ---- set-ups -------------------------------------------------------------------------------------------------


class Detaching(diffusers.DDIMScheduler):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        return super().step(model_output, timestep, sample.detach(), **kwargs)


class Cutting:
    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.detach()


def test_all_refusals_are_told_not_only_the_first() -> None:
    from torch.nn.parallel import DataParallel

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


def test_hooks_that_move_weights_are_told() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = tiny_sd()
    add_hook_to_module(pipe.unet, AlignDevicesHook("cpu", io_same_device=True))
    checkup = bd.doctor(pipe, directions=1)
    if checkup.refused:
        with pytest.raises(bd.errors.UnsupportedError, match=re.escape(checkup["unet: refused"].found)):
            bd.differentiable(pipe)
    else:
        assert "AlignDevicesHook" in checkup["unet: offloading"].found
        assert checkup.ok, said(checkup)
    assert hasattr(pipe.unet, "_hf_hook")


def test_half_precision_is_upcast_and_checked_in_single_precision() -> None:
    pipe = tiny_sdxl()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.to(torch.float16)
    before = state_of(pipe)
    checkup = bd.doctor(pipe, directions=1)
    assert state_of(pipe) == before
    assert checkup["decoder's precision"].status == "handled"
    assert checkup.ok, said(checkup)
    assert checkup["beside plain autograd"].figures["relative difference"] == 0.0
    assert checkup["by the noise"].status == "ok", said(checkup)
    pipe.vae.decoder.conv_act = WeakerSiLU()
    assert bd.doctor(pipe)["by the noise"].status == "failed"


def test_caches_are_handled_and_keep_their_state() -> None:
    pipe = tiny_flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.4))
    checkup = bd.doctor(pipe, directions=1, num_inference_steps=4)
    assert checkup["transformer: hooks"].status == "handled", said(checkup)
    assert checkup["beside plain autograd"].status == "ok", said(checkup)
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


# ---- what cannot be examined ---------------------------------------------------------------------------------


def test_what_is_no_pipeline_is_refused_and_a_wrong_argument_raises() -> None:
    checkup = bd.doctor(nn.Linear(2, 2))
    assert checkup["pipeline"].status == "refused"
    assert "backdrift.sample" in checkup["pipeline"].advice + checkup["pipeline"].found
    with pytest.raises(InputError, match="takes no argument 'colour'"):
        bd.doctor(tiny_sd(), colour="red")
    with pytest.raises(InputError, match="directions=-1"):
        bd.doctor(tiny_sd(), directions=-1)


def test_a_pipeline_that_does_not_run_is_told_not_crashed_on() -> None:
    class Broken(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the wrong number of legs")

    pipe = tiny_sd()
    pipe.unet.mid_block = Broken()
    checkup = bd.doctor(pipe)
    assert checkup["small call"].status == "skipped"
    assert "the wrong number of legs" in checkup["small call"].found
    assert "no gradient was measured" in checkup.summary


def test_inference_mode_is_told() -> None:
    pipe = tiny_sd()
    with torch.inference_mode():
        checkup = bd.doctor(pipe)
    assert checkup["inference mode"].status == "refused"
    assert not any(row.topic == "gradient" for row in checkup)


def test_the_users_own_arguments_are_used() -> None:
    pipe = tiny_sd()
    checkup = bd.doctor(pipe, directions=1, height=2 * PICTURE, num_inference_steps=3, **embeds_for(pipe))
    assert "3 steps at 32x32 pixels" in checkup["finite"].found
    assert checkup.ok, said(checkup)


# ---- what it looks like ----------------------------------------------------------------------------------------


def test_the_table_and_the_rows(sound: Any) -> None:
    checkup = sound
    text = said(checkup)
    assert text.splitlines()[0] == checkup.summary
    for row in checkup:
        assert row.title.split()[0] in text
        assert row.status in text
    assert checkup[0] is checkup.rows[0]
    assert checkup["scheduler"] in checkup
    with pytest.raises(InputError, match=r"Did you mean 'scheduler'\?"):
        checkup["schedule"]
    titles = [row.title for row in checkup]
    assert len(titles) == len(set(titles))
