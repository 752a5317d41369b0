"""The doctor: rows that say what is so, gradients measured right and found wrong, and nothing left changed."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import InputError
from examined import state_of
from tiny_pipelines import PICTURE, embeds_for, tiny_ddim, tiny_sd, tiny_sdxl


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


class Scaling(torch.autograd.Function):
    """A product with a weight whose gradient is forgotten to be one half of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight, 0.5 * (grad * x).sum((0, 2, 3), keepdim=True)


class Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return Scaling.apply(nn.functional.silu(x), self.weight)


def test_a_wrong_gradient_of_weights_is_found() -> None:
    pipe = tiny_sd()
    pipe.unet.conv_act = Scale(8)
    checkup = bd.doctor(pipe, train="unet.conv_act*", directions=1)
    assert checkup["by the noise"].status == "ok", said(checkup)
    assert checkup["by the weights"].status == "failed", said(checkup)
    assert "whose weights are trained" in checkup["where"].found


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
    assert bd.doctor(pipe, directions=1)["by the noise"].status == "failed"


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
