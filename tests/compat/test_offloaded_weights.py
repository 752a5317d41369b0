"""Weights that wait on the CPU: trained, edited, and counted by a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from offloaded_runs import TRAP, WAYS, leaves_of, loss_of, sequential, size, table_of

import backdrift as bd
from backdrift.errors import StateChangedError
from backdrift.planning.search import option
from tiny_pipelines import PICTURE, tiny_sd


@TRAP.handled(
    "weights trained under sequential offloading are those of accelerate's table (`run.parameters`), and its hooks see "
    "what an optimizer makes of them"
)
def test_an_optimizer_steps_on_the_weights_at_home() -> None:
    """Two steps of gradient descent, beside the same on a pipeline that is not offloaded."""
    results = []
    for offload in (False, True):
        pipe = tiny_sd()
        if offload:
            sequential(pipe)
        inputs = leaves_of(pipe)
        for _ in range(2):
            with bd.differentiable(pipe, "min", train=["unet.conv_in.*", "unet.*to_q*"]) as run:
                images = pipe(**inputs, **size()).images
            loss_of(images).backward()
            optimizer = torch.optim.SGD(run.parameters.values(), lr=1e-2)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            results.append([images, pipe(**inputs, **size(), output_type="pt").images])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not torch.equal(*results[0])


@TRAP.handled("`bd.optimize` over weights, which are put back at home")
@pytest.mark.parametrize("way", ["sequential", "leaves"])
def test_weights_are_optimised_and_put_back(way: str, tmp_path: Path) -> None:
    losses = []
    for offload in (False, True):
        pipe = tiny_sd()
        if offload:
            WAYS[way](pipe)
            home = table_of(pipe.unet)["conv_in.weight"] if way == "sequential" else pipe.unet.conv_in.weight
            before = home.detach().clone()
        run = bd.optimize(
            pipe, "a 7", lambda images: images.square().flatten(1).mean(1), over="unet.conv_in.*", steps=2,
            height=PICTURE, width=PICTURE, num_inference_steps=2, out=tmp_path / str(offload), progress=False,
            memory="min",
        )  # fmt: skip
        losses.append([entry["loss"] for entry in run.record["iterations"]])
    assert losses[0] == losses[1]
    assert losses[0][0] > losses[0][-1]
    assert torch.equal(home, before)


@TRAP.handled("weights edited between the call and its backward pass are noticed, redone or not")
@pytest.mark.parametrize("memory", ["min", "max"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_edited_at_home_are_noticed(way: str, memory: str) -> None:
    pipe = tiny_sd()
    WAYS[way](pipe)
    inputs = leaves_of(pipe)
    with bd.differentiable(pipe, memory):
        images = pipe(**inputs, **size()).images
    with torch.no_grad():
        home = table_of(pipe.unet)["conv_in.weight"] if way == "sequential" else pipe.unet.conv_in.weight
        home.mul_(2)
    with pytest.raises(StateChangedError, match=r"conv_in\.weight"):
        loss_of(images).backward()


@TRAP.handled(
    "a budget: the plan counts the weights of one phase at a time, or of one layer where no phase fits"
)
def test_a_budget_counts_one_phase_at_a_time() -> None:
    pipe = tiny_sd()
    inputs = leaves_of(pipe)
    everything = bd.plan(pipe, **inputs, **size())
    pipe.enable_model_cpu_offload(device="cpu")
    plan = bd.plan(pipe, **inputs, **size())
    assert plan.choices.weights == "offload"
    weights = max(c.weights for c in plan.job.components)
    tactics = [replace(c, keep=0) for c in plan.tactics if c.weights == "offload"]
    phases = min(option(plan.job, choices).needs.peak for choices in tactics)
    assert phases < everything.least.needs.peak
    assert phases - weights < everything.least.needs.peak - everything.job.weights + 1
    assert plan.least.choices.weights == "stream"
    assert plan.least.needs.peak < phases
    for budget, chosen in ((phases, "offload"), (phases - 1, "stream")):
        with bd.differentiable(pipe, budget) as run:
            loss_of(pipe(**inputs, **size()).images).backward()
        assert run.plan is not None
        assert run.plan.choices.weights == chosen
