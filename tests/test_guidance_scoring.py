"""How guidance asks a loss: scales of gradients, prompts, references, chunks, and what is found out before sampling."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, NonFiniteError
from backdrift.guidance import Constant, FreeDoM, Relative
from backdrift.guidance.scoring import Scoring, depends, scaled
from backdrift.guidance.strengths import rms
from backdrift.losses import FunctionLoss, GramStyle
from backdrift.schedules import EDM, VP
from pictured import bright, denoiser, start, times_at
from tiny_pipelines import embeds_for, noise_for, tiny_sd, tiny_sdxl

RHOS = [8.0, 5.0, 3.2, 2.1, 1.4, 0.9, 0.55, 0.3, 0.15, 0.06]


def sampled(guidance: Any, x: Tensor) -> Tensor:
    model, _ = denoiser(VP.linear(), "epsilon", 2.0)
    cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    grid = bd.TimeGrid(times_at(VP.linear(), RHOS))
    return bd.sample(model, x, cond, grid=grid, form="exponential", guidance=guidance).x0


# -- scales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e-8, 1.0, 1e8, 1e25, 3e38])
def test_root_mean_squares_of_any_size(size: float) -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64) / 5
    found = rms((x * size).float()).flatten().double() / size
    assert found.tolist() == pytest.approx([math.sqrt(0.5), 0.2 / math.sqrt(2)], rel=1e-6)
    assert rms(torch.zeros(1, 4)).item() == 0


def test_the_root_mean_square_has_its_usual_bits() -> None:
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rms(x), x.flatten(1).square().mean(1).sqrt().view(4, 1, 1))


@pytest.mark.parametrize("weight", [1e-30, 1e-20, 1e-8, 1e8, 1e30])
def test_a_relative_strength_does_not_see_the_losss_scale(weight: float) -> None:
    """In float32, where squares of 1e-20 are 0 and those of 1e20 infinite."""

    def picture(by: float) -> Tensor:
        model = bd.Denoiser(lambda x, t, cond: 0.9 * x, VP.linear())
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        loss = lambda images: by * (images - 0.8).square().mean((1, 2, 3))  # noqa: E731
        guidance = bd.SymplecticAdjointGuidance(loss, 2, decode=lambda x0: x0 / 2 + 0.5)
        grid = bd.TimeGrid("uniform", 8, start=0.9)
        return bd.sample(model, x, grid=grid, guidance=guidance).x0

    torch.testing.assert_close(picture(weight), picture(1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [Relative(50.0), Relative(50.0, "epsilon"), Constant(1.0)])
def test_a_loss_that_is_flat_leaves_the_sampler_alone(strength: Any) -> None:
    x = start(2)
    free = sampled(None, x)
    found = sampled(FreeDoM([(0.0, bright)], strength, repeats=1), x)
    torch.testing.assert_close(found, free, rtol=1e-12, atol=1e-12)


def test_scaling_is_by_powers_of_two_and_each_samples_own() -> None:
    x = torch.tensor([[1e-9, -3e-7], [5.0, 2.0], [0.0, 0.0]])
    large, factors = scaled(x)
    assert torch.equal(large / factors[:, None], x)
    assert factors.log2().tolist() == [21.0, -3.0, 0.0]
    largest = large.abs().amax(1)
    assert ((largest[:2] >= 0.5) & (largest[:2] < 1)).all()


@pytest.mark.parametrize("weight", [1e-3, 1e-6])
def test_a_pipeline_in_half_precision_follows_a_small_gradient(weight: float) -> None:
    """A mean over pixels pulls each by about 1e-6 and less, where float16 ends: the direction must be float32's."""
    pulls = []
    for dtype, by in ((torch.float32, 1.0), (torch.float16, weight)):
        pipe = tiny_sd().to(dtype)
        embeds = {k: v.to(dtype) for k, v in embeds_for(pipe).items()}
        seen: list[Tensor] = []

        class Keep(bd.guidance.Guidance):
            pass

        def rule(attempt: Any, seen: list[Tensor] = seen) -> Tensor:
            seen.append(attempt.estimate(n=2).pull / by)  # noqa: B023
            return attempt.take()

        loss = lambda images: by * images.square().mean((1, 2, 3))  # noqa: E731, B023
        call: dict[str, Any] = {"height": 16, "width": 16, "latents": noise_for(pipe).to(dtype)}
        bd.guide(pipe, None, Keep(rule, loss, steps=[2]), num_inference_steps=6, **embeds, **call)
        pulls.append(seen[0].flatten())
    alike = torch.nn.functional.cosine_similarity(pulls[0], pulls[1], dim=0)
    assert alike > 0.999
    assert float(pulls[1].norm() / pulls[0].norm()) == pytest.approx(1, abs=0.05)


# -- in chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_chunks_change_nothing_but_how_many_pictures_are_decoded_together(size: int) -> None:
    x, most = start(4), 0

    def decode(x0: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(x0))
        return x0.tanh()

    def loss(images: Tensor, prompts: Any) -> Tensor:
        return bright(images) * torch.tensor([float(p) for p in prompts], dtype=images.dtype)

    options: dict[str, Any] = {"decode": decode, "prompts": ["1", "2", "3", "4"], "repeats": 2, "strip": True}
    whole = bd.SymplecticAdjointGuidance(loss, 2, **options)
    wanted, most = sampled(whole, x), 0
    chunked = bd.SymplecticAdjointGuidance(loss, 2, decode_chunk_size=size, **options)
    torch.testing.assert_close(sampled(chunked, x), wanted, rtol=1e-12, atol=1e-12)
    assert most == min(size, 4)
    for mine, theirs in zip(chunked.trace.entries, whole.trace.entries, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-12)
        assert mine.preview is not None
        assert theirs.preview is not None
        assert torch.equal(mine.preview, theirs.preview)


def test_a_gradient_by_the_samples_is_that_of_one_graph() -> None:
    """Loss and decoder are differentiated one after the other; plain autograd does both at once."""
    x0 = start(3)
    decode = lambda z: (z.sin() + 0.1 * z.square()).flip(-1)  # noqa: E731
    found = Scoring(FunctionLoss(bright), decode=decode).score(x0, torch.nn.Identity(), None, ranged=False)
    leaf = x0.clone().requires_grad_()
    values = bright(decode(leaf))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    torch.testing.assert_close(found.values, values.detach(), rtol=0, atol=0)
    torch.testing.assert_close(found.pull, gradient, rtol=1e-13, atol=1e-15)
    up = Scoring(FunctionLoss(bright), True, decode).score(x0, torch.nn.Identity(), None, ranged=False)
    assert torch.equal(up.pull, -found.pull)


def test_what_a_graph_reaches() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert depends((a * 2).sum(), a)
    assert not depends((a * 2).sum(), b)
    assert not depends((a.detach() * b).sum(), a)
    assert depends(a, a)


# -- what is found out before sampling -------------------------------------------------------------


def counting(pipe: Any) -> list[int]:
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    return calls


def unseen(images: Tensor) -> Tensor:
    return torch.ones(len(images), requires_grad=True) * 2


def test_a_loss_of_its_own_weights_alone_is_refused() -> None:
    pipe = tiny_sd()
    calls = counting(pipe)
    with pytest.raises(InputError, match="does not depend on the picture"):
        bd.guide(pipe, "a", bd.SymplecticAdjointGuidance(unseen, 1), num_inference_steps=6)
    cut = bd.SymplecticAdjointGuidance(bright, 1, decode=lambda z: z.detach()[:, :3, :2, :2])
    with pytest.raises(InputError, match="decode= detaches"):
        bd.guide(pipe, "a", cut, num_inference_steps=6)
    flat = bd.SymplecticAdjointGuidance(bright, 1, decode=lambda z: z[:, :2])
    with pytest.raises(InputError, match="decode="):
        bd.guide(pipe, "a", flat, num_inference_steps=6)
    assert not calls


def test_a_reference_for_each_picture_of_three() -> None:
    """The rehearsal sees as many pictures as the run."""
    pipe = tiny_sd()
    goals = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    guidance = bd.SymplecticAdjointGuidance(bd.losses.MSE(goals), 1, steps=[3])
    bd.guide(pipe, ["a", "b", "c"], guidance, num_inference_steps=6, guidance_scale=1.0)
    bd.guide(pipe, ["a", "b", "c"], guidance, num_inference_steps=6, guidance_scale=3.0)
    assert len(guidance.trace.loss[0]) == 3


@pytest.mark.parametrize("where", ["callback", "sample", "exploding"])
def test_noise_is_not_taken_for_pictures_on_another_scale(where: str) -> None:
    """Networks that know pictures in [0, 1] only: what the rehearsal shows them are decoded noises."""
    style = GramStyle(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    guidance = bd.SymplecticAdjointGuidance(style, 1, 0.3, 0.7)
    if where == "callback":  # Euler's states are as large as their noise
        pipe = tiny_sdxl()
        pipe(**embeds_for(pipe), num_inference_steps=6, height=16, width=16, callback_on_step_end=guidance)
    else:
        schedule = VP.linear() if where == "sample" else EDM()
        model = bd.Denoiser(lambda x, t, cond: 0 * x + 0.5, schedule, "sample")
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        x = x if where == "sample" else 80 * x
        bd.sample(model, x, grid=bd.TimeGrid(times_at(schedule, RHOS)), guidance=guidance)
    assert all(math.isfinite(v) for v in itertools.chain(*guidance.trace.loss))


def test_estimates_on_another_scale_are_still_refused() -> None:
    style = GramStyle(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    guidance = bd.SymplecticAdjointGuidance(style, 1, 0.3, 0.7, decode=lambda z: 200 * z)
    model = bd.Denoiser(lambda x, t, cond: 0 * x + 0.5, VP.linear(), "sample")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="takes pictures in \\[0, 1\\]"):
        bd.sample(model, x, grid=bd.TimeGrid(times_at(VP.linear(), RHOS)), guidance=guidance)


def test_a_sample_that_fails_is_named() -> None:
    def broken(images: Tensor) -> Tensor:
        values = bright(images)
        return torch.where(torch.arange(len(values)) == 1, values * math.nan, values)

    with pytest.raises(NonFiniteError, match=r"the loss of sample 1 \(of 3, from 0\)"):
        sampled(bd.SymplecticAdjointGuidance(broken, 1), start(3))


# -- prompts ---------------------------------------------------------------------------------------


def prompted(seen: list[Any]) -> Any:
    def loss(images: Tensor, prompts: Any) -> Tensor:
        seen.append(prompts)
        return bright(images)

    return loss


def test_a_text_is_one_prompt_for_all() -> None:
    seen: list[Any] = []
    sampled(bd.SymplecticAdjointGuidance(prompted(seen), 1, steps=[4], prompts="a cat"), start(2))
    assert seen == [["a cat", "a cat"]] * 2


def test_prompts_given_to_the_guidance_come_before_the_calls() -> None:
    seen: list[Any] = []
    loss = lambda images, prompts: (seen.append(prompts), images.square().mean((1, 2, 3)))[1]  # noqa: E731
    guidance = bd.SymplecticAdjointGuidance(loss, 1, steps=[3], prompts=["b"])
    bd.guide(tiny_sd(), ["a", "c"], guidance, num_inference_steps=6)
    assert seen == [["b", "b"]] * 2


@pytest.mark.parametrize("prompts", [["a", "b", "c"], ["a", "b"]])
def test_prompts_for_another_number_of_samples_are_refused(prompts: list[str]) -> None:
    guidance = bd.SymplecticAdjointGuidance(prompted([]), 1, prompts=prompts)
    with pytest.raises(InputError, match=f"{len(prompts)} prompts for 1 samples"):
        sampled(guidance, start(1))
    pipe = tiny_sd()
    calls = counting(pipe)
    with pytest.raises(InputError, match="prompts for 1 samples"):
        bd.guide(pipe, "a", guidance, num_inference_steps=6)
    assert not calls


def test_prompts_that_are_no_texts_are_refused() -> None:
    for prompts in (5, [], [1, 2]):
        with pytest.raises(InputError, match="prompts are a text"):
            bd.SymplecticAdjointGuidance(bright, prompts=prompts)  # type: ignore[arg-type]
