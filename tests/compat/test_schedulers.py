"""Schedulers: rounded times, state, steps without a gradient."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from traps import Trap

import backdrift as bd
from backdrift.errors import UnsupportedError
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_ddim, tiny_sd, tiny_sd3, tiny_sd_img2img

TRAP = Trap(
    "Schedulers that round or truncate times, keep state over the steps, or whose `step` is not differentiable",
    "silent loss of exactness.",
)
SIZE = {"height": PICTURE, "width": PICTURE}
OF_UNETS = [
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
OF_FLOWS = ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]


def arguments_for(pipe: Any, steps: int = 4) -> tuple[dict[str, Any], list[Tensor]]:
    given = {k: v.requires_grad_() for k, v in embeds_for(pipe).items()}
    given["latents"] = noise_for(pipe).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    return {**given, **SIZE, "num_inference_steps": steps, "generator": generator}, list(given.values())


def loss_of(images: Tensor) -> Tensor:
    return (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum()


def gradients(images: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(images), leaves))


@TRAP.handled(
    "every scheduler of diffusers for pictures, after earlier calls have left their state in it; the run works on a "
    "copy, and the user's own keeps its state"
)
@pytest.mark.parametrize("name", OF_UNETS + OF_FLOWS)
def test_bits_with_a_scheduler_that_has_been_used(name: str) -> None:
    pipe = tiny_sd3() if name in OF_FLOWS else tiny_sd()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    arguments, leaves = arguments_for(pipe)
    call = type(pipe).__call__.__wrapped__
    torch.manual_seed(3)  # for what is drawn without the generator
    expected = call(pipe, output_type="pt", **arguments).images
    theirs = gradients(expected, leaves)
    before = str(pipe.scheduler.__dict__)
    for memory in ("min", "max"):
        arguments["generator"].manual_seed(3)
        torch.manual_seed(3)
        images = bd.differentiable(pipe, memory, clamp=True)(**arguments).images
        assert torch.equal(images, expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients(images, leaves), theirs, strict=True))
    assert str(pipe.scheduler.__dict__) == before


class Rounding(diffusers.DDIMScheduler):
    """Its samples have eight bits."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        (sample,) = super().step(*args, **{**kwargs, "return_dict": False})[:1]
        return ((sample * 32).round() / 32,)


class Detaching(diffusers.DDIMScheduler):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        return super().step(model_output, timestep, sample.detach(), **kwargs)


class Hiding(diffusers.DDIMScheduler):
    """No word in its code tells that it cuts the graph."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        return super().step(model_output, timestep, sample.data, **kwargs)


class Fine(diffusers.DDIMScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


@TRAP.refused(
    "a step that detaches, rounds or reads `.data`, in a scheduler from elsewhere: its code is searched, and it is "
    "compared with finite differences once"
)
@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Rounding, "gradient that is .*% off finite differences"),
        (Hiding, "gradient that is .*% off finite differences"),
        (Detaching, "cuts the gradient: step uses detach"),
    ],
)
def test_a_step_with_a_wrong_gradient_is_refused(cls: Any, message: str) -> None:
    pipe = tiny_sd()
    pipe.scheduler = cls.from_config(tiny_ddim().config)
    with pytest.raises(UnsupportedError, match=message) as error:
        bd.differentiable(pipe)
    assert cls.__name__ in str(error.value)
    assert "DDIMScheduler.from_config" in str(error.value)
    pipe.scheduler = tiny_ddim()
    run = bd.differentiable(pipe)
    pipe.scheduler = cls.from_config(tiny_ddim().config)
    with pytest.raises(UnsupportedError, match=message):
        run(**arguments_for(pipe)[0])
    assert run.stats.calls_forward == 0


def test_a_scheduler_from_elsewhere_that_is_right_is_run() -> None:
    pipe = tiny_sd()
    pipe.scheduler = Fine.from_config(tiny_ddim().config)
    arguments, leaves = arguments_for(pipe)
    expected = type(pipe).__call__.__wrapped__(pipe, output_type="pt", **arguments).images
    images = bd.differentiable(pipe, "min", clamp=True)(**arguments).images
    theirs = gradients(expected, leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients(images, leaves), theirs, strict=True))


@TRAP.refused(
    "tensors that require grad where a plain number is read: `timesteps=`, `sigmas=`, `strength=` …"
)
@pytest.mark.parametrize("name", ["timesteps", "sigmas", "strength"])
def test_times_have_no_gradient(name: str) -> None:
    pipe = tiny_sd_img2img() if name == "strength" else tiny_sd()
    run = bd.differentiable(pipe, "min")
    value = torch.tensor(0.8) if name == "strength" else torch.tensor([900.0, 400.0])
    arguments = {"image": torch.rand(1, 3, PICTURE, PICTURE)} if name == "strength" else SIZE
    with pytest.raises(UnsupportedError, match=f"{name} requires grad"):
        run(**embeds_for(pipe), **arguments, **{name: value.requires_grad_()})
    assert run.stats.calls_forward == 0


@TRAP.refused("schedulers of discrete tokens")
def test_schedulers_of_tokens_are_refused() -> None:
    for scheduler in (
        diffusers.AmusedScheduler(mask_token_id=5),
        diffusers.VQDiffusionScheduler(num_vec_classes=8),
    ):
        pipe = tiny_sd()
        pipe.scheduler = scheduler
        with pytest.raises(UnsupportedError, match="discrete tokens"):
            bd.differentiable(pipe)
