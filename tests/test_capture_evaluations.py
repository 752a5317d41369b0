"""What a captured step says of the network: evaluations, and the run's continuation with its gradient."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, UnsupportedError
from backdrift.pipelines.capture import Capture
from backdrift.pipelines.captured import CapturedHost
from captured_runs import GUIDANCE, RUNS, call, pipeline, plain, scheduler
from tiny_pipelines import noise_for, tiny_sd, tiny_sd3


def hosts(pipe: Any, **kwargs: Any) -> list[CapturedHost]:
    found: list[CapturedHost] = []

    def take(host: CapturedHost) -> Tensor:
        found.append(host)
        return plain(host)

    with Capture(pipe, take, prompts=["a b"]):
        call(pipe, noise_for(pipe).to(pipe.dtype), **kwargs)
    return found


def by_hand(pipe: Any, x: Tensor, t: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """The guided output of a UNet pipeline and what guidance is made of."""
    with torch.no_grad():
        uncond, cond = (pipe.unet(x, t, encoder_hidden_states=p[None]).sample for p in prompts)
    return uncond + GUIDANCE * (cond - uncond), cond - uncond


def test_an_evaluation_elsewhere_is_the_networks_own() -> None:
    pipe = tiny_sd().to(torch.float64)
    prompts = torch.cat(pipe.encode_prompt("a b", "cpu", 1, True)[::-1])
    host = hosts(pipe)[1]
    t = pipe.scheduler.timesteps[1]
    for x in (host.x, host.x + 0.3):
        evaluation = host.evaluate(x)
        output, more = by_hand(pipe, x, t, prompts)
        torch.testing.assert_close(evaluation.output, output, rtol=0, atol=1e-12)
        assert evaluation.more is not None
        assert evaluation.guidance_scale == GUIDANCE
        torch.testing.assert_close(evaluation.more, more, rtol=0, atol=1e-12)
        x0 = (x - host.start.sigma * output) / host.start.alpha
        torch.testing.assert_close(evaluation.x0, x0, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="shape"):
        host.evaluate(host.x[:, :3])


def test_guidance_that_is_rescaled_is_known_and_other_guidance_refused() -> None:
    pipe = tiny_sd()
    host = hosts(pipe, guidance_rescale=0.7)[1]
    combination = host._network.combination
    assert (combination.scale, combination.rescale) == (GUIDANCE, 0.7)
    x = host.x.clone()
    known = host.evaluate(x).output
    fresh = host._network(x, None)  # by the network, not by what is known
    torch.testing.assert_close(fresh, known, rtol=0, atol=1e-5)

    with Capture(pipe) as capture:
        pipe.unet.register_forward_hook(lambda module, args, out: (out[0] ** 3,))  # behind what is taken down
        call(pipe, noise_for(pipe))
    assert capture.last is not None
    with pytest.raises(UnsupportedError, match="rule"):
        capture.last.evaluate(capture.last.x)


def test_without_guidance_there_is_nothing_more() -> None:
    evaluation = (host := hosts(tiny_sd(), guidance_scale=1.0)[1]).evaluate(host.x)
    assert evaluation.more is None
    assert evaluation.difference("epsilon") is None
    assert host.prompts == ["a b"]


@pytest.mark.parametrize(("name", "config"), [RUNS[0], RUNS[5], RUNS[7]])
def test_an_euler_step_of_the_continuation_is_the_schedulers(name: str, config: dict[str, Any]) -> None:
    found = hosts(pipeline(name, config))
    for host, following in zip(found, [*found[1:], None], strict=True):
        continuation = host.continuation(host.evaluate(host.x))
        first, second = continuation.times[:2]
        z = bd.sample(
            continuation.model, continuation.scale * host.x, continuation.cond, grid=[first, second]
        ).x0
        scale = 1.0 if following is None else following.continuation(following.evaluate(following.x)).scale
        torch.testing.assert_close(z, scale * plain(host), rtol=1e-4, atol=1e-5)


def test_the_continuation_gives_the_network_the_time_of_the_noise() -> None:
    """Karras' levels lie between the trained steps; the scheduler tells the network the nearest ones."""
    pipe = tiny_sd().to(torch.float64)
    pipe.scheduler = scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    host = hosts(pipe)[1]
    model, cond, scale, times = host.continuation(host.evaluate(host.x))
    prompts = torch.cat(pipe.encode_prompt("a b", "cpu", 1, True)[::-1])
    assert times[0] != round(times[0])
    assert float(model.schedule.rho(times[0])) == pytest.approx(host.start.sigma / host.start.alpha, rel=1e-6)
    between, _ = by_hand(pipe, host.x, torch.tensor(times[0], dtype=torch.float64), prompts)
    rounded, _ = by_hand(pipe, host.x, pipe.scheduler.timesteps[1], prompts)
    torch.testing.assert_close(model.output(scale * host.x, times[0], cond), between, rtol=0, atol=1e-12)
    torch.testing.assert_close(host.evaluate(host.x).output, rounded, rtol=0, atol=1e-12)
    assert float((between - rounded).abs().max()) > 1e-9


def test_network_calls_are_counted() -> None:
    host = hosts(tiny_sd())[0]
    for _ in range(2):
        host.step(host.x, host.evaluate(host.x))
    assert host.calls == 1  # the loop's own
    host.evaluate(host.x + 1)
    assert host.calls == 2


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize(
    "gradient", [bd.SymplecticAdjoint(), bd.Exact(), bd.Plain()], ids=lambda g: type(g).__name__
)
def test_the_gradient_through_the_continuation(family: str, gradient: Any) -> None:
    """Against plain autograd through a loop written out by hand, and against finite differences, in float64."""
    pipe = (tiny_sd() if family == "sd" else tiny_sd3()).to(torch.float64)
    host = hosts(pipe)[1]
    times = host.continuation(host.evaluate(host.x)).times
    weight = torch.randn(host.x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        model, cond, scale, times = host.continuation(host.evaluate(x))
        x0 = bd.sample(model, scale * x, cond, grid=times, gradient=gradient).x0
        return (weight * x0.sin()).sum()

    x = host.x.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(x), x)
    by_hand_x = host.x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((weight * _loop(pipe, family, by_hand_x, times).sin()).sum(), by_hand_x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        slope = (value(host.x + 1e-6 * direction) - value(host.x - 1e-6 * direction)) / 2e-6
    assert float((found * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


def _loop(pipe: Any, family: str, x: Tensor, times: tuple[float, ...]) -> Tensor:
    if family == "sd":
        schedule: Any = bd.VP.discrete(pipe.scheduler.alphas_cumprod)
        conds = [{"encoder_hidden_states": p} for p in pipe.encode_prompt("a b", "cpu", 1, True)]
    else:
        schedule = bd.Flow()
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt("a b", "a b", "a b", device="cpu")
        conds = [
            {"encoder_hidden_states": e, "pooled_projections": p}
            for e, p in ((embeds, pooled), (negative, negative_pooled))
        ]
    network = pipe.unet if family == "sd" else pipe.transformer
    names = ("sample", "timestep") if family == "sd" else ("hidden_states", "timestep")
    for t, after in pairwise(times):
        told = torch.full((1,), t if family == "sd" else 1000 * t, dtype=torch.float64)
        cond, uncond = (network(**{names[0]: x, names[1]: told}, **c).sample for c in conds)
        output = uncond + GUIDANCE * (cond - uncond)
        a, s, b, r = (
            float(v)
            for v in (schedule.alpha(t), schedule.sigma(t), schedule.alpha(after), schedule.sigma(after))
        )
        x = b / a * (x - s * output) + r * output if family == "sd" else x + (after - t) * output
    return x
