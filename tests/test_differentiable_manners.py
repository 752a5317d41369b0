"""`differentiable` leaves the user's pipeline alone, notices changes, and refuses what it cannot do."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import backdrift as bd
from backdrift.errors import (
    BudgetError,
    InputError,
    MissingGradientError,
    StateChangedError,
    UnsupportedError,
)
from pipeline_calls import assert_equal, call_arguments, loss_of, plain
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_flux, tiny_sd, tiny_sd_img2img, tiny_sdxl


def with_lora(pipe: Any, text: bool = False) -> Any:
    from peft import LoraConfig

    torch.manual_seed(7)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=layers, init_lora_weights=False))
    if text:
        names = ["q_proj", "v_proj"]
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    return pipe


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_pictures_are_a_tensor_whatever_was_asked(output_type: str, return_dict: bool) -> None:
    pipe = tiny_sd()
    arguments, _ = call_arguments(pipe)
    run = bd.differentiable(pipe, "min")
    out = run(output_type=output_type, return_dict=return_dict, **arguments)
    images = out.images if return_dict else out[0]
    assert images.shape == (1, 3, PICTURE, PICTURE)
    assert images.requires_grad
    (copy,) = run.pil
    assert isinstance(copy, PIL.Image.Image)
    pixels = images.detach().clamp(0, 1)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(copy) / 255 - pixels).max() <= 0.5 / 255 + 1e-6


def test_only_clamp_clamps_and_both_agree_inside() -> None:
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.mul_(8)  # saturate some pixels
    free = bd.differentiable(pipe, "min")(**call_arguments(pipe)[0]).images
    cut = bd.differentiable(pipe, "min", clamp=True)(**call_arguments(pipe)[0]).images
    assert free.min() < 0
    assert free.max() > 1
    assert torch.equal(free.clamp(0, 1), cut)
    arguments, _ = call_arguments(pipe)
    assert torch.equal(plain(pipe, **arguments), cut)


def test_latents_come_back_when_asked_for() -> None:
    pipe = tiny_sd()
    arguments, _ = call_arguments(pipe)
    expected = type(pipe).__call__.__wrapped__(pipe, output_type="latent", **arguments).images
    run = bd.differentiable(pipe, "min")
    latents = run(output_type="latent", **call_arguments(pipe)[0]).images
    assert torch.equal(latents, expected)
    assert latents.requires_grad
    assert run.stats.decodes == 0
    with pytest.raises(InputError, match="latent"):
        _ = run.pil


def test_the_safety_checker_runs_beside_the_pictures() -> None:
    pipe = tiny_sd(safety_checker=True)
    pipe.safety_checker.concept_embeds_weights.fill_(-2.0)  # below any cosine: it flags everything
    with torch.no_grad():
        blackened = plain(pipe, **call_arguments(pipe)[0])
    assert not blackened.any()
    arguments, leaves = call_arguments(pipe)
    run = bd.differentiable(pipe, "min", clamp=True)
    out = run(**arguments)
    assert out.nsfw_content_detected == run.flagged == [True]
    pipe.safety_checker = None
    unchecked, free = call_arguments(pipe)
    expected = plain(pipe, **unchecked)
    assert torch.equal(out.images, expected)
    found = torch.autograd.grad(loss_of(out.images), leaves)
    assert_equal(list(found), list(torch.autograd.grad(loss_of(expected), free)))
    assert bd.differentiable(pipe, "min")(**arguments).nsfw_content_detected is None


# ---------------------------------------------------------------------------- the user's pipeline is left alone


def state_of(pipe: Any) -> list[Any]:
    parts = dict(vars(pipe))
    flags = [p.requires_grad for m in parts.values() if isinstance(m, nn.Module) for p in m.parameters()]
    modes = [c.training for m in parts.values() if isinstance(m, nn.Module) for c in m.modules()]
    ids = {k: id(v) for k, v in parts.items()}
    return [type(pipe), ids, flags, modes, dict(pipe.scheduler.__dict__), dict(pipe.config)]


@pytest.mark.parametrize("fail", [False, True])
def test_everything_is_as_it_was_also_after_an_exception(fail: bool) -> None:
    pipe = tiny_sd()
    pipe.scheduler.set_timesteps(7)
    pipe.unet.train()
    before = state_of(pipe)

    def stop(*_: Any) -> dict[str, Any]:
        if fail:
            raise KeyError("stop")
        return {}

    arguments, _ = call_arguments(pipe)
    arguments["callback_on_step_end"] = stop
    try:
        with bd.differentiable(pipe, "min", train="unet"):
            assert type(pipe).__name__ == "StableDiffusionPipeline"
            assert pipe(**arguments).images.requires_grad
    except KeyError:
        assert fail
    after = state_of(pipe)
    assert [a for a, b in zip(after, before, strict=True) if str(a) != str(b)] == []
    plainly = pipe(**{k: v for k, v in arguments.items() if k != "callback_on_step_end"}, output_type="pt")
    assert not plainly.images.requires_grad


def test_blocks_nest_and_the_inner_one_counts() -> None:
    pipe = tiny_sd()
    with bd.differentiable(pipe, "max") as outer:
        with bd.differentiable(pipe, "min") as inner:
            pipe(**call_arguments(pipe)[0])
        pipe(**call_arguments(pipe, steps=2)[0])
    assert (inner.stats.calls_forward, outer.stats.calls_forward) == (3, 2)
    assert not hasattr(type(pipe), "_backdrift_base")


def test_no_grad_inside_the_block_is_respected() -> None:
    pipe = tiny_sd()
    with bd.differentiable(pipe, "min"), torch.no_grad():
        out = pipe(**call_arguments(pipe)[0]).images
    assert isinstance(out, torch.Tensor)
    assert not out.requires_grad


def test_inference_mode_is_refused() -> None:
    pipe = tiny_sd()
    with pytest.raises(InputError, match="inference_mode"), torch.inference_mode():
        bd.differentiable(pipe, "min")(**call_arguments(pipe)[0])


def test_transforms_of_torch_func_are_refused_and_forward_mode_is_right() -> None:
    pipe = tiny_sd()
    arguments = {k: v.detach() if torch.is_tensor(v) else v for k, v in call_arguments(pipe)[0].items()}
    latents = arguments.pop("latents")

    def value(x: torch.Tensor) -> torch.Tensor:
        return loss_of(bd.differentiable(pipe, memory="min", clamp=True)(latents=x, **arguments).images)

    for transformed in (torch.func.grad(value), torch.func.vmap(value)):
        with pytest.raises(UnsupportedError, match=r"torch\.func"):
            transformed(latents)
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        along = forward_ad.make_dual(latents, torch.ones_like(latents))
        ours = forward_ad.unpack_dual(value(along)).tangent
        theirs = forward_ad.unpack_dual(loss_of(plain(pipe, latents=along, **arguments))).tangent
    assert theirs != 0
    assert torch.equal(ours, theirs)


def test_saving_inside_the_block_names_the_real_class(tmp_path: Any) -> None:
    pipe = tiny_sd()
    with bd.differentiable(pipe, "min"):
        pipe.save_pretrained(tmp_path)
    assert '"StableDiffusionPipeline"' in (tmp_path / "model_index.json").read_text()
    assert pickle.dumps(type(pipe))


def test_a_copy_made_inside_the_block_is_an_ordinary_pipeline() -> None:
    pipe = tiny_sd()
    with bd.differentiable(pipe, "min"):
        copies = [copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), copy.copy(pipe)]
    arguments, _ = call_arguments(pipe)
    expected = pipe(output_type="np", **arguments).images
    for one in copies:
        assert type(one) is type(pipe)
        arguments, _ = call_arguments(pipe)
        assert np.array_equal(one(output_type="np", **arguments).images, expected)


@pytest.mark.parametrize("shared", [True, False])
def test_threads_do_not_disturb_each_other(shared: bool) -> None:
    """One thread differentiates, one samples with its own plan, one calls the pipeline as ever."""
    first = tiny_sd()
    pipes = [first, first if shared else tiny_sd(seed=0), first]
    plans: list[Any] = ["min", "max", None]
    alone, leaves = call_arguments(first, steps=4)
    expected = list(torch.autograd.grad(loss_of(plain(first, **alone)), leaves))
    barrier, results = threading.Barrier(3), {}

    def work(i: int) -> None:
        pipe, arguments = pipes[i], call_arguments(pipes[i], steps=4)
        barrier.wait()
        for _ in range(2):
            if plans[i] is None:
                own = {**arguments[0], "generator": None}
                results[i] = pipe(output_type="pt", **own).images.requires_grad
                continue
            with bd.differentiable(pipe, plans[i], clamp=True):
                images = pipe(**arguments[0]).images
            results[i] = list(torch.autograd.grad(loss_of(images), arguments[1]))

    if shared:  # a plain call changes the pipeline's scheduler, which two plain calls could not share either
        plans[2] = "min"
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_equal(results[0], expected)
    assert_equal(results[1], expected)
    if shared:
        assert_equal(results[2], expected)
    else:
        assert results[2] is False
    assert not hasattr(type(first), "_backdrift_base")


# ---------------------------------------------------------------------------- what is trained


def test_train_selects_by_component_pattern_and_lora() -> None:
    pipe = with_lora(tiny_sd(), text=True)
    pipe.unet.requires_grad_(True)
    names = {f"unet.{n}" for n, _ in pipe.unet.named_parameters()}
    assert set(bd.differentiable(pipe, train="unet").trained) == names
    pattern = set(bd.differentiable(pipe, train="unet.*attn2*").trained)
    assert pattern == {n for n in names if "attn2" in n} != set()
    lora = set(bd.differentiable(pipe, train="lora").trained)
    everything = [
        f"{part}.{n}" for part in ("unet", "text_encoder") for n, _ in getattr(pipe, part).named_parameters()
    ]
    assert lora == {n for n in everything if ".lora_" in n}
    assert any(n.startswith("text_encoder.") for n in lora)
    both = bd.differentiable(pipe, train=["vae", "unet.conv_in.*"]).trained
    assert "unet.conv_in.weight" in both
    assert "vae.decoder.conv_in.weight" in both


def test_only_the_selected_weights_get_gradients() -> None:
    pipe = tiny_sd()
    arguments, _ = call_arguments(pipe)
    with bd.differentiable(pipe, "min", train="unet.*attn2*") as run:
        loss_of(pipe(**arguments).images).backward()
    got = {f"unet.{n}" for n, p in pipe.unet.named_parameters() if p.grad is not None}
    assert got == set(run.trained)
    assert all(p.grad is None for p in [*pipe.vae.parameters(), *pipe.text_encoder.parameters()])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("unett", r"did you mean 'unet'"),
        ("lora", "no active LoRA adapter"),
        ("unet.*nothing*", "names no weight"),
        ("vae", "requires_grad=False"),
    ],
)
def test_a_selection_of_nothing_is_refused(train: str, message: str) -> None:
    pipe = tiny_sd()
    pipe.vae.requires_grad_(False)
    with pytest.raises(InputError, match=message):
        bd.differentiable(pipe, train=train)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("memory", ["min", 900_000, "max"])
def test_lora_gradients_have_the_bits_of_plain_autograd(memory: Any, scale: float | None) -> None:
    pipe = with_lora(tiny_sd())
    weights = [p for n, p in pipe.unet.named_parameters() if "lora_" in n]
    extra = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    arguments, leaves = call_arguments(pipe)
    targets = [*leaves, *weights]
    expected = torch.autograd.grad(loss_of(plain(pipe, **arguments, **extra)), targets)
    with bd.differentiable(pipe, memory, train="lora", clamp=True):
        loss = loss_of(pipe(**arguments, **extra).images)
    assert_equal(list(torch.autograd.grad(loss, targets, retain_graph=True)), list(expected))
    assert_equal(list(torch.autograd.grad(loss, targets)), list(expected))


def test_text_encoder_lora_is_trained_through_a_prompt() -> None:
    pipe = with_lora(tiny_sd(), text=True)
    weights = [p for n, p in pipe.text_encoder.named_parameters() if "lora_" in n]
    noise, size = noise_for(pipe), {"height": PICTURE, "width": PICTURE, "num_inference_steps": 3}
    expected = torch.autograd.grad(loss_of(plain(pipe, prompt="a red 7", latents=noise, **size)), weights)
    run = bd.differentiable(pipe, "min", train="lora", clamp=True)
    loss = loss_of(run("a red 7", latents=noise, **size).images)
    assert_equal(list(torch.autograd.grad(loss, weights)), list(expected))


def test_fused_lora_is_refused() -> None:
    pipe = with_lora(tiny_sd())
    pipe.fuse_lora()
    with pytest.raises(UnsupportedError, match="unfuse_lora"):
        bd.differentiable(pipe, train="lora")


# ---------------------------------------------------------------------------- changes between the passes


@pytest.mark.parametrize("memory", ["min", "max", 10**7])
@pytest.mark.parametrize("train", [None, "unet"])
def test_an_edited_weight_is_named(memory: Any, train: str | None) -> None:
    pipe = tiny_sd()
    loss = loss_of(bd.differentiable(pipe, memory, train=train)(**call_arguments(pipe)[0]).images)
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight.add_(1e-3)
    with pytest.raises(StateChangedError, match=r"unet\.mid_block\.resnets\.0\.conv1\.weight was modified"):
        loss.backward()


@pytest.mark.parametrize("memory", ["min", "max", 10**7])
def test_a_changed_flag_of_a_trained_weight_is_named(memory: Any) -> None:
    pipe = tiny_sd()
    loss = loss_of(bd.differentiable(pipe, memory, train="unet")(**call_arguments(pipe)[0]).images)
    pipe.unet.conv_in.weight.requires_grad_(False)
    with pytest.raises(StateChangedError, match=r"unet\.conv_in\.weight had requires_grad=True"):
        loss.backward()


@pytest.mark.parametrize("change", ["disable", "fuse", "unload", "scale", "add"])
@pytest.mark.parametrize("memory", ["min", "max"])
def test_changed_adapters_are_noticed(memory: str, change: str) -> None:
    pipe = with_lora(tiny_sd()) if change != "add" else tiny_sd()
    loss = loss_of(bd.differentiable(pipe, memory)(**call_arguments(pipe)[0]).images)
    if change == "disable":
        pipe.unet.disable_adapters()
    elif change == "fuse":
        pipe.fuse_lora()
    elif change == "unload":
        pipe.unload_lora_weights()
    elif change == "scale":
        pipe.unet.set_adapters("default", 0.5)
    else:
        with_lora(pipe)
    with pytest.raises(StateChangedError, match="adapters changed"):
        loss.backward()


@pytest.mark.parametrize("memory", ["min", 900_000, "max"])
def test_modes_and_dtypes_may_change_after_the_call(memory: Any) -> None:
    pipe = tiny_sd()
    for block in pipe.unet.modules():
        if isinstance(block, nn.Dropout):
            block.p = 0.3
    pipe.unet.train()
    results = []
    for ours in (False, True):
        torch.manual_seed(2)
        arguments, leaves = call_arguments(pipe)
        run = bd.differentiable(pipe, memory, clamp=True)
        images = run(**arguments).images if ours else plain(pipe, **arguments)
        if ours:
            pipe.unet.eval()
            pipe.unet.requires_grad_(False)
            pipe.unet.to(torch.float64)
            torch.manual_seed(99)
        results.append(list(torch.autograd.grad(loss_of(images), leaves)))
    assert_equal(*results)


def test_a_half_precision_decoder_that_upcasts_itself() -> None:
    """SDXL moves a float16 decoder to float32 for its call and back; a redo must see float32 again."""
    pipe = tiny_sdxl()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    arguments, leaves = call_arguments(pipe)
    with bd.differentiable(pipe, "min", clamp=True) as run:
        first = loss_of(pipe(**arguments).images)
        second = loss_of(pipe(**call_arguments(pipe)[0]).images)  # drops the first call's decoder
    assert pipe.vae.dtype == torch.float16
    found = torch.autograd.grad(first, leaves)
    assert run.stats.decodes_redone == 1
    # Plain autograd fails here; the same numbers in a decoder that stays float32 are the reference.
    with pytest.raises(RuntimeError, match="Float but found Half"):
        torch.autograd.grad(loss_of(plain(pipe, **arguments)), leaves)
    pipe.vae.to(torch.float32)
    expected = torch.autograd.grad(loss_of(plain(pipe, **arguments)), leaves)
    assert_equal(list(found), list(expected))
    second.backward()


# ---------------------------------------------------------------------------- what cannot work


def test_a_tensor_that_gets_no_gradient_is_named() -> None:
    pipe = tiny_sd()
    arguments, _ = call_arguments(pipe)
    with pytest.raises(MissingGradientError, match="negative_prompt_embeds"):
        bd.differentiable(pipe, "min")(guidance_scale=1.0, **arguments)

    def cut(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"].detach()} if i == 2 else {}

    with pytest.raises(MissingGradientError, match="latents"):
        bd.differentiable(pipe, "min")(callback_on_step_end=cut, **arguments)


def test_a_tensor_that_gets_no_gradient_is_named_also_when_another_call_of_its_kind_went_well() -> None:
    """A second pipeline's cut, or a second callback's, was missed: calls were looked through once per class."""
    run = bd.differentiable(tiny_sd(), "min")

    def cut(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"].detach()} if i == 2 else {}

    arguments, _ = call_arguments(run.pipe)
    run(callback_on_step_end=lambda pipe, i, t, values: values, **arguments)
    with pytest.raises(MissingGradientError, match="latents"):
        run(callback_on_step_end=cut, **arguments)
    run(**arguments)
    other = tiny_sd()
    other.unet.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"].detach()},
        ),
        with_kwargs=True,
    )
    with pytest.raises(MissingGradientError, match="prompt_embeds"):
        bd.differentiable(other, "min")(**arguments)


def bare(name: str, module: str = "") -> Any:
    """An instance of a diffusers pipeline class without its parts: enough to be refused by its class."""
    import importlib

    import diffusers

    cls = getattr(importlib.import_module(module) if module else diffusers, name)
    pipe = cls.__new__(cls)
    from diffusers.image_processor import VaeImageProcessor

    vars(pipe)["image_processor"] = VaeImageProcessor()
    return pipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LEditsPPPipelineStableDiffusion", r"__call__ calls detach\(\)"),
        ("StableDiffusionAttendAndExcitePipeline", r"detach\(\)"),
        ("StableDiffusionDiffEditPipeline", r"detach\(\)"),
        ("SemanticStableDiffusionPipeline", r"detach\(\)"),
        ("StableDiffusionPix2PixZeroPipeline", r"detach\(\)"),
        ("WanAnimatePipeline", r"detach\(\)"),
        ("KandinskyV22CombinedPipeline", "made of other pipelines"),
    ],
)
def test_pipelines_that_cut_the_gradient_are_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as error:
        bd.differentiable(bare(name), "min")
    assert name in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "FluxPipeline",
        "StableDiffusionXLInpaintPipeline",
        "PixArtSigmaPipeline",
        "WanPipeline",
        "IFPipeline",  # its text is encoded under no_grad, which the run undoes
        "Kandinsky5I2IPipeline",
    ],
)
def test_ordinary_pipelines_are_not_refused(name: str) -> None:
    from backdrift.pipelines.refusals import check_pipeline

    check_pipeline(bare(name))


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="not a diffusers pipeline"):
        bd.differentiable(nn.Linear(1, 1))

    class OnnxStableDiffusionPipeline:
        pass

    with pytest.raises(UnsupportedError, match="ONNX"):
        bd.differentiable(OnnxStableDiffusionPipeline())


def test_other_refusals_say_what_to_do() -> None:
    pipe = tiny_sd()
    with pytest.raises(BudgetError, match="allowed"):
        bd.differentiable(pipe, memory="lots")
    with pytest.raises(TypeError, match="num_steps"):
        bd.differentiable(tiny_flux())(num_steps=3)
    with pytest.raises(ValueError, match="have to be divisible by 8"):
        bd.differentiable(pipe)("a 7", height=15, width=16)
    from diffusers import StableDiffusionInpaintPipeline

    inpaint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(UnsupportedError, match="padding_mask_crop"):
        bd.differentiable(inpaint)(padding_mask_crop=2, **embeds_for(pipe))


def test_the_start_image_is_not_detached_on_its_way() -> None:
    pipe = tiny_sd_img2img()
    arguments, _ = call_arguments(pipe)
    images = bd.differentiable(pipe, "min")(**arguments).images
    (grad,) = torch.autograd.grad(loss_of(images), arguments["image"])
    assert grad.abs().sum() > 0
