"""Weights that lie in float8 and are cast around each layer's call (``enable_layerwise_casting``)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_precision_and_layout import SIZE, assert_bits, inputs, loss_of, plain
from test_quantised import network_of
from traps import Trap

import backdrift as bd
from backdrift.errors import UnsupportedError
from small_jobs import call_of, heavy_flux, measured
from tiny_pipelines import tiny_flux, tiny_sd

TRAP = Trap(
    "`enable_layerwise_casting()`: weights in float8, cast around each layer's call",
    "raises in the backward pass, for which the weights are float8 again.",
)


def cast(pipe: Any) -> None:
    network_of(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def rounded(make: Callable[[], Any], pipe: Any) -> Any:
    """A pipeline with the rounded weights in float32."""
    reference = make()
    weights = dict(network_of(pipe).named_parameters())
    for name, weight in network_of(reference).named_parameters():
        weight.data.copy_(weights[name].data.float())
    return reference


@TRAP.handled(
    "noise, embeddings, LoRA and weights that are not cast; also under a budget, which counts what is cast"
)
@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_bits_of_the_rounded_weights(make: Callable[[], Any]) -> None:
    pipe = make()
    cast(pipe)
    reference = rounded(make, pipe)
    kinds = {p.dtype for p in network_of(pipe).parameters()}
    assert kinds == {torch.float8_e4m3fn, torch.float32}
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    norms = [n for n, p in network_of(pipe).named_parameters() if p.dtype == torch.float32]
    given = inputs(pipe)
    leaves = list(given.values())
    theirs_of = dict(network_of(reference).named_parameters())
    theirs = torch.autograd.grad(
        loss_of(plain(reference, **given)), [*leaves, *(theirs_of[n] for n in norms)], allow_unused=True
    )
    ours_of = dict(network_of(pipe).named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that the call could not be planned
        for memory in ("min", 2_000_000, "max"):
            run = bd.differentiable(pipe, memory, train=[f"{name}.{n}" for n in norms], clamp=True)
            images = run(**given, **SIZE).images
            found = torch.autograd.grad(
                loss_of(images), [*leaves, *(ours_of[n] for n in norms)], allow_unused=True
            )
            assert_bits(found, theirs)
    assert kinds == {p.dtype for p in network_of(pipe).parameters()}


def test_adapters_beside_them() -> None:
    from peft import LoraConfig

    def with_adapter(pipe: Any) -> list[torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
            lora = [p for n, p in pipe.unet.named_parameters() if "lora" in n]
            for p in lora:  # peft gives them the weights' dtype
                p.data = 0.1 * torch.randn(p.shape)
        return lora

    pipe = tiny_sd()
    cast(pipe)
    reference = rounded(tiny_sd, pipe)
    mine, true = with_adapter(pipe), with_adapter(reference)
    given = {k: v.detach() for k, v in inputs(pipe).items()}
    theirs = torch.autograd.grad(loss_of(plain(reference, **given)), true)
    run = bd.differentiable(pipe, "min", train="lora", clamp=True)
    assert_bits(torch.autograd.grad(loss_of(run(**given, **SIZE).images), mine), theirs)


def test_what_is_cast_is_counted() -> None:
    pipe = heavy_flux()
    cast(pipe)
    call = call_of(pipe, 3)
    for choices in (bd.Choices(keep=0), bd.Choices(keep=2), bd.Choices(keep=0, network="block")):
        plan = bd.plan(pipe, **call, choices=choices)
        used = measured(pipe, call, memory=plan)
        assert plan.peak - plan.job.weights == pytest.approx(used, rel=0.1), choices


@TRAP.refused("training the weights that are cast: train an adapter beside them")
def test_training_cast_weights_is_refused() -> None:
    pipe = tiny_sd()
    cast(pipe)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"to_q\.weight is quantised .*float8.*train='lora'"):
        bd.differentiable(pipe, train="unet.mid_block.*attn1.to_q.weight")


def test_the_doctor_says_so() -> None:
    pipe = tiny_sd()
    cast(pipe)
    rows = {row.title: row for row in bd.doctor(pipe).rows}
    assert rows["unet: layerwise casting"].found.startswith("83 layers from float8_e4m3fn to float32")
    assert "caches" not in " ".join(rows)
    assert {rows[name].status for name in ("finite", "beside plain autograd", "by the noise")} == {"ok"}


@TRAP.handled("guidance, and `as_denoiser`")
def test_guidance_and_views() -> None:
    pipe = tiny_sd()
    cast(pipe)
    reference = rounded(tiny_sd, pipe)
    embeds = {k: v.detach() for k, v in inputs(pipe).items() if k != "latents"}
    latents = inputs(pipe)["latents"].detach()
    pictures, gradients = [], []
    for each in (pipe, reference):
        guidance = bd.SymplecticAdjointGuidance(lambda images: images.flatten(1).mean(1), 2, 0.0, 0.5, 2.0)
        call = {**embeds, **SIZE, "num_inference_steps": 4}
        pictures.append(bd.guide(each, None, guidance, latents=latents, **call).images)
        plain_picture = each(latents=latents, output_type="pt", **call).images
        assert not torch.equal(pictures[-1], plain_picture)
        view, x = bd.as_denoiser(each, **embeds), latents.clone().requires_grad_()
        grid = bd.pipeline_grid(each, 3)
        sol = bd.sample(view.model, x, view.cond, grid=grid, gradient=bd.Exact("min"))
        gradients.append(torch.autograd.grad(sol.x0.square().sum(), x)[0])
    assert torch.equal(*pictures)
    assert_bits([gradients[0]], [gradients[1]])
