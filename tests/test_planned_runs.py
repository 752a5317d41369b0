"""Runs of ``differentiable`` that follow a plan: the gradient, the calls and the bytes that it names."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import backdrift as bd
from backdrift.errors import BudgetError, UnsupportedError
from backdrift.planning.search import option
from small_jobs import PIPELINES, call_of, gradients, heavy_flux, measured
from tiny_pipelines import tiny_sd

BITWISE = [
    bd.Choices(keep=1),
    bd.Choices(keep=1, network="block", decoder="block"),
    bd.Choices(keep=0, network="resnet", decoder="resnet"),
    bd.Choices(network="resnet"),
]
ROUNDED = [
    bd.Choices(keep=0, guidance="apart"),
    bd.Choices(keep=0, network="block", guidance="apart", decode="sample"),
]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", PIPELINES)
def test_choices_that_repeat_the_arithmetic_give_the_same_bits(name: str) -> None:
    pipe = PIPELINES[name]()
    call = call_of(pipe, 2, side=16)
    train = "unet" if hasattr(pipe, "unet") else "transformer"
    plain, _ = gradients(pipe, call, memory="max", train=train)
    for choices in BITWISE:
        found, run = gradients(pipe, call, memory=choices, train=train)
        assert equal(found, plain), choices
        assert run.stats.calls_redone == (0 if choices.keep is None else 2 - choices.keep)


@pytest.mark.parametrize("name", PIPELINES)
def test_choices_that_divide_the_rows_agree_to_rounding(name: str) -> None:
    """In float64, where rounding is 1e-16 of what is summed."""
    pipe = PIPELINES[name]().to(torch.float64)
    call = call_of(pipe, 2, side=16, batch=2)
    call |= {
        k: v.detach().double().requires_grad_(v.requires_grad)
        for k, v in call.items()
        if isinstance(v, torch.Tensor)
    }
    plain, _ = gradients(pipe, call, memory="max")
    for choices in ROUNDED:
        found, run = gradients(pipe, call, memory=choices)
        assert torch.allclose(found[0], plain[0], rtol=1e-9, atol=1e-12 * plain[0].abs().max().item())
        assert (run.stats.calls_forward, run.stats.calls_redone, run.stats.decodes) == (2, 2, 1)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_estimate_is_within_ten_percent_of_the_measured_peak(name: str) -> None:
    pipe = PIPELINES[name]()
    call = call_of(pipe, 4)
    divided = bd.Choices(keep=0, network="block", decoder="resnet")
    for choices in (bd.Choices(keep=2), divided, bd.Choices(network="resnet")):
        plan = bd.plan(pipe, **call, choices=choices)
        used = measured(pipe, call, memory=plan)
        assert plan.peak - plan.job.weights == pytest.approx(used, rel=0.1), choices


def test_parts_and_trained_weights_are_within_ten_percent_too() -> None:
    pipe = PIPELINES["sd"]()
    call = call_of(pipe, 3, batch=2)
    choices = bd.Choices(keep=1, guidance="apart", decode="sample")
    plan = bd.plan(pipe, **call, choices=choices)
    assert plan.peak - plan.job.weights == pytest.approx(measured(pipe, call, memory=plan), rel=0.1)
    plan = bd.plan(pipe, **call, choices=bd.Choices(keep=1), train="unet", optimizer="sgd")
    used = measured(pipe, call, memory=plan, train="unet")
    assert plan.peak - plan.job.weights == pytest.approx(used, rel=0.1)


@pytest.mark.parametrize("share", [0.02, 0.15, 0.5, 1.0])
def test_a_budget_for_everything_is_kept(share: float) -> None:
    pipe = tiny_sd()
    call = call_of(pipe, 4)
    plan = bd.plan(pipe, **call, offload=False)
    least, most = plan.least.needs.peak, plan.plain.needs.peak
    budget = int(least + share * (most - least))
    plain, _ = gradients(pipe, call, memory="max")
    found, run = gradients(pipe, call, memory=budget)
    assert run.plan is not None
    assert run.plan.peak <= budget
    assert run.stats.calls_redone == run.plan.chosen.needs.redone
    assert measured(pipe, call, memory=budget) + plan.job.weights <= 1.1 * budget
    exact = run.plan.choices.guidance == "together"
    assert (
        torch.equal(found[0], plain[0]) if exact else torch.allclose(found[0], plain[0], rtol=1e-3, atol=1e-7)
    )
    if share == 1.0:
        assert run.plan.choices == bd.Choices()
        assert "Everything is kept" in str(run.plan)


def test_a_budget_that_is_too_small_is_refused_before_sampling() -> None:
    pipe = tiny_sd()
    call = call_of(pipe, 3, side=16)
    least = bd.plan(pipe, **call, offload=False).least.needs.peak
    run = bd.differentiable(pipe, memory=least - 1)
    with pytest.raises(BudgetError, match="smallest budget that works is") as error:
        run(**call)
    assert f"({least} bytes)" in str(error.value)
    assert run.stats.calls_forward == 0
    gradients(pipe, call, memory=least)


def test_room_is_left_for_the_loss() -> None:
    pipe = tiny_sd()
    call = call_of(pipe, 4)
    budget = bd.plan(pipe, **call, offload=False).plain.needs.peak
    assert gradients(pipe, call, memory=budget)[1].plan.choices == bd.Choices()
    with pytest.raises(BudgetError, match="smallest budget"):
        gradients(pipe, call, memory=budget, loss="clip-vit-base-patch32")
    more = 4 * 87_849_216 + 2**26
    assert (
        gradients(pipe, call, memory=budget + more, loss="clip-vit-base-patch32")[1].plan.job.loss is not None
    )


def test_a_remembered_job_keeps_neither_pipeline_nor_loss_alive() -> None:
    pipe = tiny_sd()

    def loss(images: torch.Tensor, of: Any = pipe) -> torch.Tensor:
        return images.flatten(1).sum(1)

    watched = weakref.ref(pipe), weakref.ref(loss)
    gradients(pipe, call_of(pipe, 2, side=16), memory="40MB", loss=loss)
    del pipe, loss
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def checkpointed(pipe: Any) -> None:
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.vae.enable_slicing(),
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.unet.mid_block.requires_grad_(False),
        checkpointed,
    ],
    ids=["slices", "attention", "flags", "checkpoints"],
)
def test_a_job_is_counted_anew_where_the_pipeline_was_set_up_otherwise(change: Callable[[Any], Any]) -> None:
    """The count for the earlier set-up was taken, and the budget passed without a word."""

    def need(pipe: Any) -> int:
        run = bd.differentiable(pipe, memory="1GiB", train="unet")
        run(**call_of(pipe, 2, side=16, batch=2))
        assert run.plan is not None
        return run.plan.plain.needs.peak

    pipe, other = tiny_sd(), tiny_sd()
    before = need(pipe)
    change(pipe)
    change(other)
    assert need(pipe) == need(other) != before


def test_what_is_only_planned_for_is_refused_by_name() -> None:
    for changed in ({"weights": "offload"}, {"weights": "stream"}, {"loss": 1}):
        with pytest.raises(UnsupportedError, match=next(iter(changed))):
            bd.differentiable(tiny_sd(), memory=bd.Choices(keep=0, **changed))


WAYS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "group": lambda pipe: pipe.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=1
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights", ["offload", "stream"])
def test_weights_that_come_and_go_are_counted(way: str, weights: Any) -> None:
    """However the user has them offloaded, a run brings them as its plan says."""
    pipe = heavy_flux()
    call = call_of(pipe, 3, side=8)
    plain, _ = gradients(pipe, call, memory="max")
    size = sum(p.nbytes for p in pipe.transformer.parameters())
    WAYS[way](pipe)
    for choices in (bd.Choices(keep=0, decoder="resnet"), bd.Choices(keep=1, network="resnet")):
        plan = bd.plan(pipe, **call, choices=replace(choices, weights=weights))
        found, run = gradients(pipe, call, memory=plan)
        assert equal(found, plain)
        assert run.stats.calls_redone == 3 - (choices.keep or 0)
        assert plan.peak == pytest.approx(measured(pipe, call, memory=plan), rel=0.1)
        assert (plan.peak > size) == (weights == "offload")


def test_a_budget_that_holds_no_phase_is_met_layer_by_layer() -> None:
    pipe = heavy_flux()
    call = call_of(pipe, 3, side=8)
    plain, _ = gradients(pipe, call, memory="max")
    everything = bd.plan(pipe, **call, offload=False).least.needs.peak
    pipe.enable_model_cpu_offload(device="cpu")
    plan = bd.plan(pipe, **call)
    phases = min(
        option(plan.job, replace(c, keep=0)).needs.peak for c in plan.tactics if c.weights == "offload"
    )
    least = plan.least.needs.peak
    assert 2 * least < phases < everything
    for budget, weights in ((phases, "offload"), (phases - 1, "stream"), (least, "stream")):
        found, run = gradients(pipe, call, memory=budget)
        assert run.plan is not None
        assert run.plan.choices.weights == weights
        assert equal(found, plain) == run.plan.choices.same_bits
        assert run.plan.peak <= budget
        assert measured(pipe, call, memory=budget) <= 1.1 * budget
    with pytest.raises(BudgetError, match=f"smallest budget that works is .*{least} bytes"):
        gradients(pipe, call, memory=least - 1)


def test_what_stays_on_the_device_is_counted_beside_what_comes_and_goes() -> None:
    pipe = heavy_flux()
    call = call_of(pipe, 2, side=8)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, "leaf_level")
    job = bd.plan(pipe, **call).job
    assert {c.name: c.stays for c in job.components} == {"vae": True, "transformer": False}
    alone = option(job, bd.Choices(keep=0, weights="stream")).needs.peak
    pipe = heavy_flux()
    pipe.enable_group_offload(cpu, cpu, "leaf_level")
    job = bd.plan(pipe, **call).job
    stays = sum(c.weights for c in job.components if c.name != "transformer")
    together = option(job, bd.Choices(keep=0, weights="stream")).needs
    assert together.phases["sampling"] + stays == pytest.approx(alone, rel=0.05)


def test_a_pipeline_that_cannot_be_planned_keeps_what_fits_beside_its_weights(monkeypatch: Any) -> None:
    from backdrift.pipelines import choosing

    pipe = tiny_sd()
    call = call_of(pipe, 3, side=16)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedError("Made cannot be planned")

    monkeypatch.setattr(choosing, "count_job", refuse)
    plain, _ = gradients(pipe, call, memory="max")
    with pytest.warns(UserWarning, match="cannot be planned"):
        found, run = gradients(pipe, call, memory="40MiB")
    assert equal(found, plain)
    assert run.plan is None
    with (
        pytest.warns(UserWarning, match="cannot be planned"),
        pytest.raises(BudgetError, match="weights alone"),
    ):
        gradients(pipe, call, memory="100KiB")
