"""`differentiable` on tiny pipelines of every family: the bits of plain autograd through the same call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import backdrift as bd
from backdrift.errors import BudgetError
from backdrift.verification.memory import LiveStorages
from pipeline_calls import assert_equal, call_arguments, loss_of, plain
from tiny_pipelines import (
    LATENT,
    tiny_controlnet,
    tiny_flux,
    tiny_sd,
    tiny_sd3,
    tiny_sd_img2img,
    tiny_sdxl,
)

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverMultistepScheduler",
]
PLANS = ["min", 1_600_000, "max"]


def denoiser(pipe: Any) -> tuple[str, torch.nn.Module]:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    return name, getattr(pipe, name)


def reference(pipe: Any, **kwargs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pictures and gradients (inputs, then the denoiser's weights) by plain autograd."""
    arguments, leaves = call_arguments(pipe, **kwargs)
    images = plain(pipe, **arguments)
    grads = torch.autograd.grad(
        loss_of(images), [*leaves, *denoiser(pipe)[1].parameters()], allow_unused=True
    )
    return images, list(grads)


def differentiated(pipe: Any, memory: Any, train: bool = True, **kwargs: Any) -> Any:
    name, network = denoiser(pipe)
    arguments, leaves = call_arguments(pipe, **kwargs)
    with bd.differentiable(pipe, memory=memory, train=name if train else None, clamp=True) as run:
        images = pipe(**arguments).images
    weights = list(network.parameters()) if train else []
    grads = torch.autograd.grad(loss_of(images), [*leaves, *weights], allow_unused=True)
    return images, list(grads), run


# ---------------------------------------------------------------------------- the same bits


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny_sd()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_bits_of_plain_autograd_with_every_scheduler(sd: Any, scheduler: str) -> None:
    import diffusers

    sd.scheduler = getattr(diffusers, scheduler).from_config(sd.scheduler.config)
    images, grads = reference(sd, steps=4)
    assert sum(g is not None for g in grads) > 200
    for memory in PLANS:
        ours, found, run = differentiated(sd, memory, steps=4)
        assert torch.equal(ours, images)
        assert_equal(found, grads)
        assert run.stats.calls_redone == run.stats.calls_forward - run.stats.calls_kept
    assert run.stats.calls_forward >= 4


BUILDERS = [tiny_sd, tiny_sdxl, tiny_sd3, tiny_flux, tiny_sd_img2img, tiny_controlnet]


@pytest.mark.parametrize("build", BUILDERS)
def test_bits_of_plain_autograd_with_every_family(build: Any) -> None:
    pipe = build()
    images, grads = reference(pipe)
    for memory in ("min", 900_000, "max", "auto"):
        if memory == 900_000 and build is tiny_controlnet:
            memory = 1_800_000  # the control network's outputs are the UNet's arguments, and stay
        ours, found, _ = differentiated(pipe, memory)
        assert torch.equal(ours, images)
        assert_equal(found, grads)


def test_frozen_weights_change_no_bit_of_the_other_gradients(sd: Any) -> None:
    arguments, leaves = call_arguments(sd)
    for parameter in sd.unet.parameters():
        parameter.grad = None
    expected = torch.autograd.grad(loss_of(plain(sd, **arguments)), leaves)
    _, found, run = differentiated(sd, "min", train=False)
    assert_equal(found, list(expected))
    assert run.trained == ()
    assert all(p.requires_grad and p.grad is None for p in sd.unet.parameters())


@pytest.mark.parametrize("memory", ["min", 500_000])
def test_gradient_agrees_with_finite_differences(memory: Any) -> None:
    pipe = tiny_sd().to(torch.float64)
    arguments, _ = call_arguments(pipe, steps=2)
    arguments = {
        k: v.detach().double() if torch.is_tensor(v) else v
        for k, v in arguments.items()
        if k != "generator"  # DDIM draws nothing
    }
    noise = arguments.pop("latents").requires_grad_()
    run = bd.differentiable(pipe, memory=memory if memory == "min" else 2 * memory)
    loss = loss_of(run(latents=noise, **arguments).images)
    (grad,) = torch.autograd.grad(loss, noise)
    direction, h = (
        torch.randn(noise.shape, generator=torch.Generator().manual_seed(5), dtype=noise.dtype),
        1e-5,
    )
    with torch.no_grad():
        up, down = (loss_of(run(latents=noise + s * h * direction, **arguments).images) for s in (1, -1))
    assert (grad * direction).sum().item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-6)


# ---------------------------------------------------------------------------- PyTorch's manners


@pytest.mark.parametrize("memory", PLANS)
def test_backward_inside_the_block_and_after_it_and_twice(sd: Any, memory: Any) -> None:
    arguments, leaves = call_arguments(sd)
    with bd.differentiable(sd, memory=memory) as run:
        loss = loss_of(sd(**arguments).images)
        inside = torch.autograd.grad(loss, leaves, retain_graph=True)
    after = torch.autograd.grad(loss, leaves, retain_graph=True)
    loss.backward()
    assert_equal(list(inside), list(after))
    assert_equal([leaf.grad for leaf in leaves], list(after))
    assert run.stats.vjps == 3 * run.stats.calls_forward


@pytest.mark.parametrize("memory", PLANS)
def test_accumulation_over_calls_in_one_block(sd: Any, memory: Any) -> None:
    grads = []
    for ours in (False, True):
        for parameter in sd.unet.parameters():
            parameter.grad = None
        first, second = call_arguments(sd, seed=0)[0], call_arguments(sd, seed=1)[0]
        second["latents"] = first["latents"]
        if ours:
            with bd.differentiable(sd, memory=memory, train="unet", clamp=True):
                losses = [loss_of(sd(**arguments).images) for arguments in (first, second)]
        else:
            losses = [loss_of(plain(sd, **arguments)) for arguments in (first, second)]
        for loss in losses:
            loss.backward()
        grads.append([first["latents"].grad, *(p.grad for p in sd.unet.parameters())])
        sd.vae.zero_grad()
        for parameter in sd.unet.parameters():
            parameter.grad = None
    assert_equal(*grads)


@pytest.mark.parametrize("memory", PLANS)
def test_second_derivatives(sd: Any, memory: Any) -> None:
    def curvature(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        (g,) = torch.autograd.grad(loss_of(images), noise, create_graph=True)
        return torch.autograd.grad(g.square().sum(), noise)[0]

    arguments, _ = call_arguments(sd, steps=2)
    with sdpa_kernel(SDPBackend.MATH):
        expected = curvature(plain(sd, **arguments), arguments["latents"])
        images = bd.differentiable(sd, memory=memory, clamp=True)(**arguments).images
    # Outside the block: the redone calls use the attention of the first ones, which has second derivatives.
    assert torch.equal(curvature(images, arguments["latents"]), expected)
    images = bd.differentiable(sd, memory=memory)(**arguments).images
    with pytest.raises(RuntimeError, match="flash_attention_for_cpu_backward is not implemented"):
        curvature(images, arguments["latents"])


@pytest.mark.parametrize("memory", PLANS)
def test_autocast(sd: Any, memory: Any) -> None:
    arguments, leaves = call_arguments(sd)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(plain(sd, **arguments))
        loss = loss_of(bd.differentiable(sd, memory=memory, train="unet", clamp=True)(**arguments).images)
    targets = [*leaves, *sd.unet.parameters()]
    assert_equal(list(torch.autograd.grad(loss, targets)), list(torch.autograd.grad(expected, targets)))


def test_a_step_callback_sees_and_edits_latents_with_gradients(sd: Any) -> None:
    def halve(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        assert values["latents"].requires_grad
        return {"latents": values["latents"] * 0.5}

    arguments, leaves = call_arguments(sd)
    expected = torch.autograd.grad(loss_of(plain(sd, callback_on_step_end=halve, **arguments)), leaves)
    images = bd.differentiable(sd, "min", clamp=True)(callback_on_step_end=halve, **arguments).images
    assert_equal(list(torch.autograd.grad(loss_of(images), leaves)), list(expected))


def test_the_networks_own_checkpointing_may_be_on(sd: Any) -> None:
    pipe = tiny_sd()
    images, grads = reference(pipe)
    pipe.unet.enable_gradient_checkpointing()
    for memory in ("min", "max"):
        ours, found, _ = differentiated(pipe, memory)
        assert torch.equal(ours, images)
        assert_equal(found, grads)


def test_a_compiled_network_is_run_uncompiled() -> None:
    pipe = tiny_sd()
    arguments, leaves = call_arguments(pipe)
    expected = torch.autograd.grad(loss_of(plain(pipe, **arguments)), leaves)
    pipe.unet = torch.compile(pipe.unet)
    images = bd.differentiable(pipe, "min", clamp=True)(**arguments).images
    assert_equal(list(torch.autograd.grad(loss_of(images), leaves)), list(expected))


# ---------------------------------------------------------------------------- memory


def smallest(pipe: Any, train: str | None) -> int:
    arguments, _ = call_arguments(pipe, steps=6)
    with pytest.raises(BudgetError, match="smallest budget") as error:
        bd.differentiable(pipe, memory=1, train=train)(**arguments)
    return int(str(error.value).split("smallest budget")[1].split("(")[1].split(" ")[0])


def peak(pipe: Any, memory: Any, train: str | None, steps: int = 6) -> tuple[int, Any]:
    for network in (v for v in vars(pipe).values() if isinstance(v, torch.nn.Module)):
        network.zero_grad(set_to_none=True)
    arguments, _ = call_arguments(pipe, steps=steps)
    with LiveStorages() as live:
        run = bd.differentiable(pipe, memory=memory, train=train)
        run(**arguments).images.square().mean().backward()
    return live.peak, run.stats


@pytest.mark.parametrize("train", [None, "denoiser"])
@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3])
def test_live_tensor_bytes_stay_within_the_budget(build: Any, train: str | None) -> None:
    pipe = build()
    train = train and denoiser(pipe)[0]
    least, redone = smallest(pipe, train), []
    for factor in (1.0, 2.5, 6.5):
        budget = int(least * factor)
        used, stats = peak(pipe, budget, train)
        assert used <= 1.05 * budget
        redone.append(stats.calls_redone)
        assert stats.calls_redone == 6 - stats.calls_kept
    assert redone[0] == 6
    assert redone == sorted(redone, reverse=True)
    assert redone[-1] == 0
    with pytest.raises(BudgetError):
        peak(pipe, int(0.97 * least), train)


def test_min_is_flat_in_the_number_of_steps() -> None:
    pipe = tiny_sd()
    few, many = peak(pipe, "min", "unet", steps=4)[0], peak(pipe, "min", "unet", steps=16)[0]
    # What each step adds is the latents, and a scheduler's few copies of them (guidance doubles some).
    assert many - few <= 12 * 12 * (4 * LATENT * LATENT * 4)
    assert many < 1.25 * few < 0.4 * peak(pipe, "max", "unet", steps=16)[0]


@pytest.mark.parametrize(("train", "kept"), [(False, 0), (True, 1)])
def test_stats_of_a_run(sd: Any, train: bool, kept: int) -> None:
    import diffusers

    sd.scheduler = diffusers.DDIMScheduler.from_config(sd.scheduler.config)
    _, _, run = differentiated(sd, "min", train=train, steps=5)
    stats = run.stats
    # The decoder is the last call, and is kept; beside it the last network call, where the trained weights'
    # gradients will need more room than the decoder.
    assert (stats.calls_forward, stats.calls_redone, stats.calls_kept, stats.vjps) == (5, 5 - kept, kept, 5)
    assert (stats.decodes, stats.decodes_redone) == (1, 0)
    assert stats.seconds == stats.seconds_forward + stats.seconds_backward > stats.seconds_redone > 0
    assert stats.as_dict()["network_calls"] == 10 - kept
