"""The trace of a truncated call of a pipeline, and clipping on the way."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from pipeline_calls import loss_of
from tiny_pipelines import (
    embeds_for,
    noise_for,
)
from truncated_calls import N, arguments, lora, prepared


def test_the_trace_holds_the_norms_of_the_gradients_at_the_latents() -> None:
    pipe, _ = prepared("sd-ddim")
    noise, embeds = noise_for(pipe).requires_grad_(), embeds_for(pipe)
    kept: list[Tensor] = []

    def keep(own: Any, i: int, t: Any, kwargs: Any) -> Any:
        kept.append(kwargs["latents"])
        return kwargs

    run = bd.differentiable(pipe, "min")
    assert run.trace.latents == [None]
    images = run(**embeds, **arguments(pipe, noise), callback_on_step_end=keep).images
    assert run.trace.latents == [None] * (N + 1)
    assert run.trace.steps == tuple(range(N))
    loss = loss_of(images)
    known = [g.norm().item() for g in torch.autograd.grad(loss, [noise, *kept], retain_graph=True)]
    loss.backward()
    assert run.trace.latents == pytest.approx(known, rel=1e-5)
    assert run.trace.growth == pytest.approx([a / b for a, b in itertools.pairwise(known)], rel=1e-5)
    assert all(norm is not None and norm > 0 for norm in run.trace.eps)
    assert not run.trace.exploding
    assert not run.trace.clipped
    assert "through" in run.trace.as_dict()
    assert "growth" in repr(run.trace)


def test_eps_and_adjoint_are_tied_by_the_schedulers_step() -> None:
    """DDIM with eta = 0 is x' = p x + q eps with known p and q, so the gradient at eps is q times that at x'."""
    pipe, _ = prepared("sd-ddim")
    noise, embeds = noise_for(pipe).requires_grad_(), embeds_for(pipe)
    run = bd.differentiable(pipe, "min")
    loss_of(run(**embeds, **arguments(pipe, noise)).images).backward()
    alphas = pipe.scheduler.alphas_cumprod.double()
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(N)
    times = scheduler.timesteps.tolist()
    for i, t in enumerate(times):
        before = t - scheduler.config.num_train_timesteps // N
        a, b = alphas[t], alphas[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
        q = (1 - b).sqrt() - (b / a * (1 - a)).sqrt()
        assert run.trace.eps[i] == pytest.approx(abs(q.item()) * run.trace.latents[i + 1], rel=1e-4)


def test_clipping_bounds_the_adjoint_at_every_boundary() -> None:
    pipe, _ = prepared("sd-euler")
    generator = torch.Generator().manual_seed(3)
    noise = torch.cat([noise_for(pipe), 3 * torch.randn(1, 4, 8, 8, generator=generator)]).requires_grad_()
    embeds = {k: torch.cat([v, v]) for k, v in embeds_for(pipe).items()}
    free = bd.differentiable(pipe, "min", train="lora", clamp=True)
    plain = loss_of(free(**embeds, **arguments(pipe, noise)).images)
    exact = torch.autograd.grad(plain, [noise, *lora(pipe)])
    limit = min(norm for norm in free.trace.latents[1:] if norm) / 40
    run = bd.differentiable(pipe, "min", train="lora", clamp=True, through=bd.All(clip_step=limit))
    seen: list[Tensor] = []

    def look(own: Any, i: int, t: Any, kwargs: Any) -> Any:
        kwargs["latents"].register_hook(seen.append)  # behind the run's own hook
        return kwargs

    loss = loss_of(run(**embeds, **arguments(pipe, noise), callback_on_step_end=look).images)
    found = torch.autograd.grad(loss, [noise, *lora(pipe)])
    norms = torch.stack(seen).flatten(2).norm(dim=2)  # what each step's end handed on, sample by sample
    assert bool((norms <= limit * (1 + 1e-6)).all())
    assert N in run.trace.clipped  # at the others where a step has made it grow again
    torch.testing.assert_close(norms[0], torch.full((2,), limit), rtol=1e-6, atol=0)
    assert not torch.allclose(found[1], exact[1], rtol=0.1)
    # A limit that nothing reaches changes no bit.
    run = bd.differentiable(pipe, "min", train="lora", clamp=True, through=bd.All(clip_step=1e9))
    loss = loss_of(run(**embeds, **arguments(pipe, noise)).images)
    torch.testing.assert_close(torch.autograd.grad(loss, [noise])[0], exact[0], rtol=0, atol=0)
    assert run.trace.clipped == ()
