"""Views of pipelines as people set them up: with LoRA, in half precision, differentiated more than once, with sound's
own scheduler; and what is refused is said of views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, StateChangedError, UnsupportedError
from backdrift.pipelines.capture import Capture
from backdrift.pipelines.refusals import undecorated_call
from tiny_conditioned import CASES, normal, picture, text
from tiny_families import tiny_pixart, tiny_stable_audio
from tiny_pipelines import embeds_for, noise_for, tiny_controlnet, tiny_flux, tiny_sd3, tiny_sdxl
from viewed_calls import apart, ddim, gradients, leaves_of, sentences, view_of, waves, with_scheduler

GRADIENTS = [bd.Plain(), bd.Exact("min"), bd.SymplecticAdjoint()]


def pixart(pipe: Any) -> dict[str, Any]:
    return {**sentences(pipe), "height": 16, "width": 16}


def adapted(pipe: Any, network: str, targets: list[str]) -> dict[str, Tensor]:
    """Two adapters on a pipeline's network, the second active; its weights."""
    from peft import LoraConfig

    torch.manual_seed(0)
    module = getattr(pipe, network)
    for name, rank in (("idle", 1), ("active", 2)):
        module.add_adapter(LoraConfig(r=rank, target_modules=targets, init_lora_weights=False), name)
    module.set_adapter("active")
    return {name: p for name, p in module.named_parameters() if "lora" in name and ".active." in name}


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_lora_gets_the_gradient_of_plain_autograd_through_the_pipelines_own_loop(
    name: str, gradient: Any
) -> None:
    if name == "sdxl":
        pipe: Any = tiny_sdxl()
        weights, call = adapted(pipe, "unet", ["to_q", "to_v"]), text(pipe)
    else:
        pipe = tiny_flux()
        weights, call = adapted(pipe, "transformer", ["to_k", "proj_out"]), text(pipe)
    more = {"num_inference_steps": 3}
    state = undecorated_call(type(pipe))(pipe, **call, **more, output_type="latent").images
    expected = gradients(state, weights)
    view = bd.as_denoiser(pipe, **call, **more, train="lora")
    x0 = bd.sample(view.model, view.x_T, view.cond, grid=view.grid(), gradient=gradient).x0
    assert float((x0 - state).detach().abs().max()) < 1e-4 * float(state.abs().max())
    assert apart(gradients(x0, weights), expected) < 1e-4
    assert min(float(g.norm()) for g in expected.values()) > 0
    idle = [p for part in pipe.components.values() for p in parameters(part, ".idle.")]
    assert idle
    assert all(p.grad is None for p in idle)


def parameters(part: Any, word: str) -> list[Tensor]:
    return [p for n, p in part.named_parameters() if word in n] if isinstance(part, torch.nn.Module) else []


def test_the_adapters_of_a_views_making_stay_its_own() -> None:
    pipe = tiny_sdxl()
    adapted(pipe, "unet", ["to_q"])
    call = {**text(pipe), "num_inference_steps": 2}
    view = bd.as_denoiser(pipe, **call)
    with torch.no_grad():
        before = bd.sample(view.model, view.x_T, view.cond, grid=view.grid()).x0
        pipe.unet.set_adapter("idle")
        assert torch.equal(bd.sample(view.model, view.x_T, view.cond, grid=view.grid()).x0, before)
        other = bd.as_denoiser(pipe, **call)
        now = bd.sample(other.model, other.x_T, other.cond, grid=other.grid()).x0
    assert not torch.allclose(now, before, rtol=1e-3)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("name", ["sdxl", "sdxl, EDM", "pixart"])
def test_a_network_in_bfloat16_keeps_state_and_gradient_in_float32(name: str, gradient: Any) -> None:
    """Its own arithmetic has 8 bits: a run in float32 is as near as these say, and no part of the state is rounded."""
    build: Any = {
        "sdxl": tiny_sdxl,
        "sdxl, EDM": lambda: with_scheduler(tiny_sdxl, "EDMEulerScheduler"),
        "pixart": lambda: ddim(tiny_pixart),
    }[name]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = build().to(dtype)
        call = pixart(pipe) if name == "pixart" else text(pipe)
        embeds = {k: v.to(dtype) if isinstance(v, Tensor) and "mask" not in k else v for k, v in call.items()}
        view = bd.as_denoiser(pipe, **embeds, num_inference_steps=3)
        x = (normal(*view.x_T.shape, seed=4) * float(view.x_T.float().std())).requires_grad_()
        seen: list[torch.dtype] = []
        handle = next(iter(view.model.network.modules())).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].dtype)
        )
        solution = bd.sample(view.model, x, view.cond, grid=view.grid(), gradient=gradient)
        (slope,) = torch.autograd.grad((normal(*x.shape, seed=8) * solution.x0).sum(), x)
        handle.remove()
        assert solution.x0.dtype == slope.dtype == torch.float32
        assert set(seen) == ({torch.float32} if "EDM" in name else {dtype})
        results.append((solution.x0.detach(), slope))
    (x0, slope), (rounded, approximate) = results
    assert not torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(approximate, approximate.bfloat16().float())
    for found, true in ((rounded, x0), (approximate, slope)):
        assert 0 < float((found - true).norm() / true.norm()) < 0.1


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("name", ["img2img", "inpainting, 9 channels"])
def test_a_view_serves_any_number_of_backward_passes(name: str, gradient: Any) -> None:
    build, arguments = CASES[name]
    pipe = build()
    call = arguments(pipe)
    leaves = leaves_of(call)
    call |= leaves

    def found(view: Any, seed: int) -> list[Tensor]:
        x0 = bd.sample(view.model, view.x_T, view.cond, grid=view.grid(), gradient=gradient).x0
        return list(torch.autograd.grad((normal(*x0.shape, seed=seed) * x0).sum(), list(leaves.values())))

    view = view_of(pipe, call)
    for seed in range(3):
        assert all(map(torch.equal, found(view, seed), found(view_of(pipe, call), seed)))
    with torch.no_grad():
        leaves["image"].mul_(0.5)
    with pytest.raises(StateChangedError, match="make the view again"):
        found(view, 3)


def test_a_tensor_with_a_graph_of_its_own_is_gone_through_as_the_user_says() -> None:
    """The view's part serves again and again; the user's own is freed by his first backward pass unless he keeps it."""
    pipe = tiny_sdxl()
    factor = torch.ones(()).requires_grad_()
    embeds = embeds_for(pipe)
    embeds["prompt_embeds"] = (embeds["prompt_embeds"] * factor).square()
    view = bd.as_denoiser(pipe, **embeds, latents=noise_for(pipe), num_inference_steps=2)

    def loss() -> Tensor:
        return bd.sample(view.model, view.x_T, view.cond, grid=view.grid(), gradient=bd.Exact("min")).x0.sum()

    found = [torch.autograd.grad(loss(), factor, retain_graph=i < 2)[0] for i in range(3)]
    assert float(found[0]) != 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss(), factor)


def test_a_trained_text_encoder_is_gone_through_again_until_it_is_changed() -> None:
    pipe = tiny_sdxl()
    name, weight = next((n, p) for n, p in pipe.text_encoder.named_parameters() if n.endswith("fc1.weight"))
    call = {"prompt": "a b", "guidance_scale": 3.0, "latents": noise_for(pipe), "num_inference_steps": 2}
    train = [f"text_encoder.{name}", "unet.conv_in.weight"]
    view = bd.as_denoiser(pipe, **call, train=train)

    def slope() -> Tensor:
        x0 = bd.sample(view.model, view.x_T, view.cond, grid=view.grid(), gradient=bd.Exact("min")).x0
        return torch.autograd.grad(x0.square().sum(), weight)[0]

    assert torch.equal(slope(), slope())
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(0.9)  # the network itself may be stepped on
    assert float(slope().abs().max()) > 0
    with torch.no_grad():
        weight.mul_(0.9)
    with pytest.raises(StateChangedError, match="make the view again"):
        slope()


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_the_view_of_sound_says_what_its_own_scheduler_makes_of_the_network(prediction: str) -> None:
    """Stable Audio's scheduler tells its network an angle; it samples with noise of its own, so no run is compared."""
    pytest.importorskip("torchsde")  # the scheduler's
    pipe = with_scheduler(
        tiny_stable_audio, "CosineDPMSolverMultistepScheduler", prediction_type=prediction, sigma_min=0.3
    )
    call = waves(pipe)
    view = bd.as_denoiser(pipe, **call, num_inference_steps=4)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    assert torch.allclose(view.grid().nodes(view.model.schedule).float(), scheduler.sigmas)
    latents = normal(1, 3, 16, seed=5)
    for sigma in (0.3, 2.0, 80.0):
        level, x = torch.tensor(sigma), sigma * latents
        told = torch.tensor([2 / torch.pi * torch.atan(level)])
        halves = []
        for cond in (view.model.uncond, view.cond):
            more = {k: v for k, v in cond.items() if isinstance(v, Tensor)}
            halves.append(by_hand(pipe, x / (level**2 + scheduler.config.sigma_data**2).sqrt(), told, more))
        output = halves[0] + 3.0 * (halves[1] - halves[0])
        expected = scheduler.precondition_outputs(x, output, level)
        with torch.no_grad():
            found = view.model.denoised(x, sigma, view.cond)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises((UnsupportedError, InputError), match="sound"):
        view.decode(latents)


def by_hand(pipe: Any, x: Tensor, told: Tensor, cond: dict[str, Tensor]) -> Tensor:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    tokens = x.shape[2] + cond["global_hidden_states"].shape[1]
    rotary = get_1d_rotary_pos_embed(
        pipe.rotary_embed_dim, tokens, use_real=True, repeat_interleave_real=False
    )
    with torch.no_grad():
        return pipe.transformer(x, told, **cond, rotary_embedding=rotary, return_dict=False)[0]


def test_a_refusal_is_of_what_was_asked_for() -> None:
    """Guidance and views read a pipeline's steps by the same code."""
    guess: Any = (tiny_controlnet, lambda pipe: {**embeds_for(pipe), "image": picture(), "guess_mode": True})
    skipped: Any = (
        tiny_sd3,
        lambda pipe: {
            **text(pipe), "skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0,
            "skip_layer_guidance_stop": 2.0,
        },
    )  # fmt: skip
    for build, arguments in (guess, skipped):
        pipe = build()
        call = {**arguments(pipe), "num_inference_steps": 3}
        with pytest.raises(UnsupportedError, match="has no view") as seen:
            bd.as_denoiser(pipe, **call)
        assert "guided" not in str(seen.value)
        with (
            Capture(pipe, lambda host: host.evaluate(host.x).output),
            pytest.raises(UnsupportedError, match="cannot be guided") as heard,
        ):
            pipe(**call)
        assert "view" not in str(heard.value)
