"""Families of pipelines as hosts: what each gives its networks and does with their outputs, and how it decodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, UnsupportedError
from backdrift.pipelines.capture import Capture
from backdrift.pipelines.captured import CapturedHost
from backdrift.pipelines.decoding import Decoder
from tiny_conditioned import CASES, SIZE, normal, picture, text, tokens
from tiny_families import tiny_animatediff, tiny_pixels, tiny_wan
from tiny_pipelines import (
    TOKENS,
    WIDTH,
    tiny_controlnet,
    tiny_flux,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
)

N = 3


def seeded(**more: Any) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(0), "num_inference_steps": N, **more}


def prepared(name: str) -> tuple[Any, dict[str, Any]]:
    build, arguments = CASES[name]
    pipe = build()
    return pipe, arguments(pipe)


def latents_of(pipe: Any, arguments: dict[str, Any], take: Any = None) -> Tensor:
    kind = {} if type(pipe).__name__ == "DDPMPipeline" else {"output_type": "latent"}
    if not kind:
        kind = {"output_type": "np"}
    torch.manual_seed(3)  # some draw the control picture's latents from the global generator
    if take is None:
        return torch.as_tensor(pipe(**seeded(**arguments, **kind)).images)
    with Capture(pipe, take):
        return torch.as_tensor(pipe(**seeded(**arguments, **kind)).images)


def plain(host: CapturedHost) -> Tensor:
    return host.step(host.x, host.evaluate(host.x))


@pytest.mark.parametrize("name", CASES)
def test_what_a_host_says_elsewhere_is_what_the_pipeline_does_there(name: str) -> None:
    """The plain run is the pipeline's own; and from a state that is changed, evaluate() knows what the loop will do."""
    pipe, arguments = prepared(name)
    found: list[CapturedHost] = []

    def keep(host: CapturedHost) -> Tensor:
        found.append(host)
        return plain(host)

    expected = latents_of(pipe, arguments)
    assert torch.equal(latents_of(pipe, arguments, keep), expected)
    steps = len(found)
    away = 0.1 * normal(*found[1].x.shape, seed=9)

    def moved(host: CapturedHost) -> Tensor:
        found.append(host)
        return plain(host) + (away if host.index == 0 else 0)

    latents_of(pipe, arguments, moved)
    before, after = found[1], found[steps + 1]
    shift = after.x - before.x
    assert float(shift.abs().max()) > 0.05
    if name != "inpainting, 4 channels":  # puts the known part back
        torch.testing.assert_close(shift, away, rtol=0, atol=1e-5)
    said, done = before.evaluate(after.x), after.evaluate(after.x)
    torch.testing.assert_close(said.output, done.output, rtol=1e-4, atol=1e-5)
    assert float((said.output - before.evaluate(before.x).output).abs().max()) > 1e-3
    if done.more is not None:
        assert said.more is not None
        torch.testing.assert_close(said.more, done.more, rtol=1e-4, atol=1e-5)
    guided = name != "pixels" and (not name.startswith("flux") or name == "flux, true guidance")
    assert (done.more is not None) == guided
    # The continuation from there: its first call made by the network, at the time unrounded.
    model, cond, scale, times = before.continuation(before.evaluate(before.x))
    fresh = model.output(scale * after.x, times[0], cond)
    rounded = 0.1 if name == "sana" else 1e-3  # its scheduler makes whole numbers of 1000 sigma
    torch.testing.assert_close(fresh, done.output, rtol=rounded, atol=rounded)
    # Its gradient is the network's: a directional difference in float32 is good to some digits.
    z = (scale * after.x).requires_grad_()
    weight, step = normal(*z.shape, seed=6), 1e-2 * normal(*z.shape, seed=7)
    (slope,) = torch.autograd.grad((weight * model.output(z, times[0], cond)).sum(), z)
    with torch.no_grad():
        up, down = (model.output(z + s * step, times[0], cond) for s in (1, -1))
    difference = float((weight.double() * (up.double() - down)).sum() / 2)
    assert float((slope * step).sum()) == pytest.approx(difference, rel=2e-2, abs=2e-4)


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "sd3", "flux", "flux kontext", "pixart", "sana", "inpainting, 9 channels"]
)
def test_decoding_is_the_pipelines_own(name: str) -> None:
    pipe, arguments = prepared(name)
    if name == "sdxl":
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 0.9, 1.0, 1.1])
    pipe.vae.register_to_config(scaling_factor=0.4)
    with torch.no_grad():
        pictures = bd.differentiable(pipe)(**seeded(**arguments)).images
    with Capture(pipe) as capture:
        latents = pipe(**seeded(**arguments, output_type="latent")).images
    assert capture.last is not None
    decoded = capture.last.decode(latents.requires_grad_())
    torch.testing.assert_close(decoded, pictures, rtol=0, atol=1e-5)
    (slope,) = torch.autograd.grad(decoded.square().sum(), latents)
    assert bool(slope.isfinite().all())
    assert float(slope.abs().max()) > 0
    assert all(p.grad is None for p in pipe.vae.parameters())
    given = Capture(pipe, decode=lambda x: x[:, :2])
    with given:
        pipe(**seeded(**arguments, output_type="latent"))
    assert given.last is not None
    with pytest.raises(InputError, match="decoding"):
        given.last.decode(latents)


@pytest.mark.parametrize(
    "name",
    [
        "inpainting, 9 channels",
        "flux fill",
        "flux kontext",
        "pixart",
        "sd3 controlnet",
        "t2i adapter",
        "img2img",
        "pixels",
    ],
)
def test_guide_takes_pipelines_whose_networks_get_more_than_the_state(name: str) -> None:
    """What the loss is tried on before the first call is the state alone; a pull lowers the finished picture's loss."""
    pipe, arguments = prepared(name)
    arguments.pop("generator", None)
    arguments.pop("output_type", None)
    prompt, steps = arguments.pop("prompt", None), arguments.pop("num_inference_steps", N)

    def dark(images: Tensor) -> Tensor:
        return images.square().mean((1, 2, 3))

    losses = []
    for strength in (1e-6, 0.3):
        guidance = bd.SymplecticAdjointGuidance(
            dark, 1, steps=[1], strength=bd.guidance.Relative(strength, "epsilon")
        )
        found = bd.guide(pipe, prompt, guidance, num_inference_steps=steps, seed=1, **arguments)
        losses.append(float(dark(found.images).sum()))
    assert losses[1] < losses[0]


def test_pixels_need_no_decoder() -> None:
    x = normal(2, 3, 8, 8)
    assert torch.equal(Decoder(tiny_pixels()).of([])(x), x / 2 + 0.5)


def test_videos_are_decoded_frame_by_frame_or_as_the_pipeline_does() -> None:
    pipe, latents = tiny_animatediff(), normal(1, 4, 2, 8, 8)
    decoded = Decoder(pipe).of([])(latents)
    frames = pipe.vae.decode(latents[0].transpose(0, 1) / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(decoded, frames[None], rtol=0, atol=1e-6)
    wan = tiny_wan()
    mean, std = torch.tensor([0.1, -0.2, 0.0, 0.3]), torch.tensor([1.5, 0.7, 1.0, 2.0])
    wan.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    moved = latents * std.view(1, 4, 1, 1, 1) + mean.view(1, 4, 1, 1, 1)
    expected = wan.vae.decode(moved).sample.transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(Decoder(wan).of([])(latents), expected, rtol=0, atol=1e-6)
    with pytest.raises(UnsupportedError, match="AutoencoderKLWan"):
        Decoder(wan).of([])(normal(1, 4, 8, 8))


def test_a_half_precision_autoencoder_that_overflows_is_upcast() -> None:
    pipe = tiny_sdxl()
    latents = normal(1, 4, 8, 8)
    pipe.vae.half()
    pipe.vae.register_to_config(force_upcast=True)
    decoded = Decoder(pipe).of([])(latents)
    assert pipe.vae.dtype == torch.float16
    expected = pipe.vae.float().decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3])
def test_half_precision_keeps_the_pipelines_bits_and_the_state_in_float32(build: Any) -> None:
    pipe = build().to(torch.bfloat16)
    arguments = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in text(pipe).items()}
    expected = latents_of(pipe, arguments)
    found: list[CapturedHost] = []

    def take(host: CapturedHost) -> Tensor:
        found.append(host)
        return plain(host)

    assert torch.equal(latents_of(pipe, arguments, take), expected)
    host = found[1]
    evaluation = host.evaluate(host.x)
    assert {host.x.dtype, evaluation.z.dtype, evaluation.output.dtype, plain(host).dtype} == {torch.float32}
    model, cond, scale, times = host.continuation(evaluation)
    x = host.x.clone().requires_grad_()
    solution = bd.sample(model, scale * x, cond, grid=times, gradient=bd.SymplecticAdjoint())
    (slope,) = torch.autograd.grad(solution.x0.square().sum(), x)
    assert solution.x0.dtype == slope.dtype == torch.float32
    assert bool(slope.isfinite().all())


def test_networks_that_wait_on_the_cpu_are_called_where_they_are() -> None:
    """The "device" is the CPU here; accelerate's hooks are the real ones."""
    pipe, arguments = prepared("sd")
    expected = latents_of(pipe, arguments)
    pipe.enable_model_cpu_offload(device="cpu")

    def take(host: CapturedHost) -> Tensor:
        evaluation = host.evaluate(host.x + 0.1)
        model, cond, scale, times = host.continuation(evaluation)
        x = host.x.clone().requires_grad_()
        with torch.enable_grad():
            pictures = host.decode(bd.sample(model, scale * x, cond, grid=times).x0)
            (slope,) = torch.autograd.grad(pictures.sum(), x)
        assert float(slope.abs().max()) > 0
        return plain(host)

    assert torch.equal(latents_of(pipe, arguments, take), expected)
    assert hasattr(pipe.unet, "_hf_hook")
    with Capture.of_clone(pipe, take) as capture, torch.no_grad():
        assert torch.equal(latents_of(capture.pipe, arguments), expected)


def refused(pipe: Any, arguments: dict[str, Any], match: str) -> None:
    def take(host: CapturedHost) -> Tensor:
        return host.evaluate(host.x).output

    with Capture(pipe, take), pytest.raises(UnsupportedError, match=match):
        pipe(**seeded(**arguments))


def test_what_cannot_be_guided_is_refused_by_name() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = tiny_controlnet()
    refused(pipe, {**text(pipe), "image": picture(), "guess_mode": True}, "guess_mode")
    pipe = tiny_sd3()
    layers = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 2.0}
    refused(pipe, {**text(pipe), **layers}, "3 network outputs")
    wan = tiny_wan()
    refused(
        wan,
        {
            **{k: v for k, v in tokens(1, TOKENS, WIDTH).items() if k.endswith("embeds")},
            **SIZE,
            "num_frames": 1,
        },
        "UniPC",
    )
    pipe = tiny_flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    refused(pipe, text(pipe), "disable_cache")
