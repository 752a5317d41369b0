"""Everything a call takes can be a target: adapters, scales, control pictures, image prompts, start pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from traps import Trap

import backdrift as bd
from backdrift.errors import InputError
from tiny_pipelines import (
    PICTURE,
    WIDTH,
    embeds_for,
    noise_for,
    tiny_controlnet,
    tiny_flux,
    tiny_sd,
    tiny_sd_img2img,
)

TRAP = Trap(
    "LoRA and other peft adapters, ControlNet, IP-Adapter, start pictures, guidance scale and LoRA scale as targets",
    "works where nothing else stands in the way; a LoRA scale of exactly 1 and Flux's guidance lose their gradient.",
)
SIZE = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 2}


def loss_of(images: Tensor) -> Tensor:
    return (images * torch.linspace(-1, 1, images.numel()).reshape(images.shape)).sum()


def assert_bits(pipe: Any, leaves: list[Tensor], arguments: dict[str, Any], train: Any = None) -> None:
    """Plain autograd through the undecorated call, against ours under two plans."""
    generator = torch.Generator().manual_seed(1)
    call = type(pipe).__call__.__wrapped__
    expected = call(pipe, output_type="pt", generator=generator, **arguments).images
    theirs = torch.autograd.grad(loss_of(expected), leaves)
    assert all(g.abs().sum() > 0 for g in theirs)
    for memory in ("min", "max"):
        with bd.differentiable(pipe, memory, train=train, clamp=True):
            images = pipe(generator=generator.manual_seed(1), **arguments).images
        ours = torch.autograd.grad(loss_of(images), leaves)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def with_adapters(pipe: Any, *names: str, **settings: Any) -> Any:
    from peft import LoraConfig

    torch.manual_seed(7)
    for name in names:
        layers = ["to_q", "to_v"]
        config = LoraConfig(r=2, lora_alpha=3, target_modules=layers, init_lora_weights=False, **settings)
        pipe.unet.add_adapter(config, adapter_name=name)
    return pipe


@TRAP.handled("LoRA weights, of several adapters at different weights, and DoRA")
@pytest.mark.parametrize("kind", ["two", "dora"])
def test_adapters(kind: str) -> None:
    pipe = with_adapters(tiny_sd(), "one", "two") if kind == "two" else None
    pipe = pipe or with_adapters(tiny_sd(), "one", use_dora=True)
    if kind == "two":
        pipe.unet.set_adapters(["one", "two"], [0.3, 1.7])
    weights = [p for n, p in pipe.unet.named_parameters() if "lora_" in n]
    assert len(weights) > 4
    assert_bits(pipe, weights, {**embeds_for(pipe), "latents": noise_for(pipe), **SIZE}, train="lora")


def scale_arguments(pipe: Any, scale: Any) -> dict[str, Any]:
    return {
        **embeds_for(pipe),
        "latents": noise_for(pipe),
        **SIZE,
        "cross_attention_kwargs": {"scale": scale},
    }


@TRAP.handled(
    "the LoRA scale, `cross_attention_kwargs={'scale': tensor}`: the gradient of finite differences, at 1 too"
)
@pytest.mark.parametrize("value", [0.4, 1.0, 0.0])
def test_lora_scale(value: float) -> None:
    pipe = with_adapters(tiny_sd().to(torch.float64), "one")
    pipe.unet.to(torch.float64)
    scale = torch.tensor(value, dtype=torch.float64, requires_grad=True)

    def loss_at(scale: Any) -> Tensor:
        arguments = scale_arguments(pipe, scale)
        arguments |= {k: v.double() for k, v in arguments.items() if isinstance(v, Tensor)}
        return loss_of(bd.differentiable(pipe, "min")(**arguments).images)

    (grad,) = torch.autograd.grad(loss_at(scale), scale)
    with torch.no_grad():
        slope = (loss_at(value + 1e-5) - loss_at(value - 1e-5)) / 2e-5
    assert grad.item() == pytest.approx(slope.item(), rel=1e-6)
    assert all(type(s) is float for m in pipe.unet.modules() for s in getattr(m, "scaling", {}).values())


@TRAP.handled("the guidance scale, also where it is embedded (Flux)")
@pytest.mark.parametrize("build", [tiny_sd, tiny_flux])
def test_guidance_scale(build: Any) -> None:
    pipe = build()
    if build is tiny_flux:
        from diffusers import FluxTransformer2DModel

        torch.manual_seed(0)
        pipe.transformer = FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True)
    pipe.to(torch.float64)
    tensors = {
        k: v.double() for k, v in {**embeds_for(pipe), "latents": noise_for(pipe)}.items() if v is not None
    }

    def loss_at(scale: Any) -> Tensor:
        return loss_of(bd.differentiable(pipe, "min")(**tensors, **SIZE, guidance_scale=scale).images)

    scale = torch.tensor(3.5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss_at(scale), scale)
    h = 1e-4 if build is tiny_flux else 1e-5  # Flux rounds a thousand times the scale to float32
    with torch.no_grad():
        slope = (loss_at(3.5 + h) - loss_at(3.5 - h)) / (2 * h)
    assert grad.item() == pytest.approx(slope.item(), rel=0.02 if build is tiny_flux else 1e-6)
    if build is tiny_sd:
        arguments = {**embeds_for(pipe), "latents": noise_for(pipe)}
        bits = tiny_sd()
        number = torch.tensor(3.5, requires_grad=True)
        assert_bits(bits, [number], {**arguments, **SIZE, "guidance_scale": number})


@TRAP.refused("a guidance scale of 1 or less that requires grad, or one of many numbers")
@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.tensor([2.0, 3.0])])
def test_guidance_that_is_left_out_is_refused(value: Tensor) -> None:
    pipe = tiny_sd()
    run = bd.differentiable(pipe)
    arguments = {**embeds_for(pipe), "latents": noise_for(pipe), **SIZE}
    with pytest.raises(InputError, match=r"start above 1|one number"):
        run(**arguments, guidance_scale=value.clone().requires_grad_())
    assert run.stats.calls_forward == 0


@TRAP.handled("a ControlNet's picture and its weights (`train='controlnet'`)")
def test_controlnet() -> None:
    pipe = tiny_controlnet()
    picture = torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weights = list(pipe.controlnet.controlnet_cond_embedding.parameters())
    arguments = {**embeds_for(pipe), "latents": noise_for(pipe), "image": picture, **SIZE}
    assert_bits(pipe, [picture, *weights], arguments, train="controlnet")


@TRAP.handled("start pictures of image to image")
def test_start_picture() -> None:
    pipe = tiny_sd_img2img()
    picture = torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    arguments = {**embeds_for(pipe), "image": picture, "strength": 0.7, "num_inference_steps": 3}
    assert_bits(pipe, [picture], arguments)


def with_ip_adapter(pipe: Any, tokens: int = 4) -> Any:
    """An IP-Adapter with random weights, loaded as from its file."""
    generator, unet = torch.Generator().manual_seed(9), pipe.unet
    layers: dict[str, Tensor] = {}
    key = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{key}.{part}.weight"] = torch.randn(hidden, WIDTH, generator=generator)
            key += 2
    projection = {
        "proj.weight": torch.randn(tokens * WIDTH, WIDTH, generator=generator),
        "proj.bias": torch.zeros(tokens * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    pipe.set_ip_adapter_scale(0.6)
    return pipe


@TRAP.handled("an IP-Adapter's image embeddings, and its weights")
def test_ip_adapter() -> None:
    pipe = with_ip_adapter(tiny_sd())
    image = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
    weights = [p for n, p in pipe.unet.named_parameters() if "to_k_ip" in n or "to_v_ip" in n]
    assert weights
    assert all(isinstance(p, nn.Parameter) for p in weights)
    arguments = {**embeds_for(pipe), "latents": noise_for(pipe), "ip_adapter_image_embeds": [image], **SIZE}
    assert_bits(pipe, [image, *weights], arguments, train="unet")
