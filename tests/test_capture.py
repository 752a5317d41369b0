"""A pipeline's own loop as hosts: levels and the schedulers' arithmetic, runs to the last bit, gradients in float64."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, UnsupportedError
from backdrift.pipelines.capture import Capture
from backdrift.pipelines.captured import CapturedHost
from backdrift.pipelines.levels import levels_of
from tiny_pipelines import noise_for, tiny_sd, tiny_sd3

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4
GUIDANCE = 3.0
Edit = Callable[[CapturedHost], Tensor]


def scheduler(name: str, **config: Any) -> Any:
    import diffusers

    common = {} if name.startswith("Flow") else BETAS
    if name in ("DDIMScheduler", "DDPMScheduler"):
        common = {**common, "clip_sample": False}
    return getattr(diffusers, name)(**{**common, **config})


def call(pipe: Any, noise: Tensor, **kwargs: Any) -> Tensor:
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    return pipe("a b", latents=noise, **{**options, **kwargs}).images


def plain(host: CapturedHost) -> Tensor:
    return host.step(host.x, host.evaluate(host.x))


# -- levels -------------------------------------------------------------------------------------------------------

DETERMINISTIC = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "set_alpha_to_one": False}),
    ("DDIMScheduler", {"timestep_spacing": "linspace"}),  # leads elsewhere than the next step starts
    ("DDIMScheduler", {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {"prediction_type": "v_prediction"}),
    ("UniPCMultistepScheduler", {"disable_corrector": list(range(STEPS)), "final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"prediction_type": "sample", "timestep_spacing": "leading"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
]


@pytest.mark.parametrize(("name", "config"), DETERMINISTIC)
def test_levels_are_the_schedulers_own(name: str, config: dict[str, Any]) -> None:
    own = scheduler(name, **config)
    own.set_timesteps(STEPS)
    levels = levels_of(own)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = levels.starts[0].alpha * x0 + levels.starts[0].sigma * eps
    for i, t in enumerate(own.timesteps):
        start, end, seen = levels.starts[i], levels.ends[i], levels.seen(i)
        x = start.alpha * x0 + start.sigma * eps
        z = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
        torch.testing.assert_close(z, levels.scales[i] * x, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(z, seen.alpha * x0 + seen.sigma * eps, rtol=1e-6, atol=1e-6)
        # The schedule, at the time of the start, has the level that the network sees.
        assert float(levels.schedule.alpha(levels.times[i])) == pytest.approx(seen.alpha, rel=1e-5)
        assert float(levels.schedule.sigma(levels.times[i])) == pytest.approx(seen.sigma, rel=1e-5)
        exact = {"epsilon": eps, "sample": x0, "flow_prediction": eps - x0}
        exact["v_prediction"] = seen.alpha * eps - seen.sigma * x0
        after = own.step(exact[levels.prediction], t, x).prev_sample
        torch.testing.assert_close(after.double(), end.alpha * x0 + end.sigma * eps, rtol=0, atol=3e-5)
    # Where the last step leads: the schedule's clean end exactly where sigma is 0.
    last = levels.ends[-1]
    assert float(levels.schedule.sigma(levels.times[-1])) == pytest.approx(last.sigma, abs=1e-5)
    assert all(a > b for a, b in pairwise(levels.times_from(0)))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    ],
)
def test_levels_of_steps_that_draw_noise(name: str, config: dict[str, Any]) -> None:
    """With exact outputs, what a step makes of (x0, eps) and its own noise has the next level's two scales."""
    own = scheduler(name, **config)
    own.set_timesteps(STEPS)
    levels = levels_of(own)
    shape = (1, 1, 8, 8)
    first, other = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    for i, t in enumerate(own.timesteps[:-1]):
        start, end = levels.starts[i], levels.ends[i]

        def step(x0: Tensor, eps: Tensor, t: Tensor = t, i: int = i, start: Any = start) -> Tensor:
            own._step_index, own._begin_index = None, i
            own.lower_order_nums = 0
            generator = torch.Generator().manual_seed(1)
            own.scale_model_input(x0, t)
            x = start.alpha * x0 + start.sigma * eps
            return own.step(eps, t, x, generator=generator).prev_sample.double()

        zero = torch.zeros(shape, dtype=torch.float64)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        drawn = step(zero, zero)
        if name.startswith("DPM"):  # draws in float32
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
        fresh = float((drawn * noise).sum() / (noise * noise).sum())
        torch.testing.assert_close(drawn, fresh * noise, rtol=0, atol=1e-5)
        torch.testing.assert_close(step(first, zero) - drawn, end.alpha * first, rtol=0, atol=1e-4)
        kept = float(((step(zero, other) - drawn) * other).sum() / (other * other).sum())
        assert math.hypot(fresh, kept) == pytest.approx(end.sigma, rel=1e-4)


def test_times_are_the_trained_steps_or_those_of_the_noise() -> None:
    own = scheduler("DPMSolverMultistepScheduler")
    own.set_timesteps(STEPS)
    assert levels_of(own).times == (*map(float, own.timesteps), -1.0)
    own = scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    own.set_timesteps(STEPS)
    levels = levels_of(own)
    for t, rounded, sigma in zip(levels.times, own.timesteps, own.sigmas, strict=False):
        assert float(levels.schedule.rho(t)) == pytest.approx(float(sigma), rel=1e-6)
        assert abs(t - float(rounded)) <= 0.51
    assert any(t != round(t) for t in levels.times)
    own = scheduler("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    own.set_timesteps(STEPS)
    assert levels_of(own).starts[0] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("DPMSolverSinglestepScheduler", {}),
        ("LCMScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
    ],
)
def test_other_schedulers_are_refused_by_name(name: str, config: dict[str, Any]) -> None:
    own = scheduler(name, **config)
    own.set_timesteps(STEPS)
    with pytest.raises(UnsupportedError, match=name):
        levels_of(own)


# -- runs ---------------------------------------------------------------------------------------------------------

RUNS = [
    ("DDIMScheduler", {}),
    ("DDPMScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DEISMultistepScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


def pipeline(name: str, config: dict[str, Any]) -> Any:
    pipe = tiny_sd3() if name.startswith("Flow") else tiny_sd()
    pipe.scheduler = scheduler(name, **config)
    return pipe


@pytest.mark.parametrize(("name", "config"), RUNS)
def test_a_run_that_nothing_changes_is_the_pipelines_own(name: str, config: dict[str, Any]) -> None:
    pipe = pipeline(name, config)
    noise = noise_for(pipe)
    torch.manual_seed(5)
    expected = call(pipe, noise)
    random = torch.get_rng_state()
    seen: list[tuple[int, int]] = []

    def twice(host: CapturedHost) -> Tensor:
        seen.append((host.index, host.total))
        evaluation = host.evaluate(host.x)
        host.step(host.x + 1, host.evaluate(host.x + 1))
        return host.step(host.x, evaluation)

    for take in (plain, twice):
        torch.manual_seed(5)
        with Capture(pipe, take):
            assert torch.equal(call(pipe, noise), expected)
        assert torch.equal(torch.get_rng_state(), random)
    assert seen == [(i, STEPS) for i in range(STEPS)]


@pytest.mark.parametrize(("name", "config"), RUNS)
def test_a_callback_gets_the_same(name: str, config: dict[str, Any]) -> None:
    """Changing each state after its step, in a callback, is changing it in the step."""
    pipe = pipeline(name, config)
    noise = noise_for(pipe)

    def changed(host: CapturedHost) -> Tensor:
        x = host.x + 0.01
        return host.step(x, host.evaluate(x)) + 0.02

    def at_end(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        host = capture.last
        assert host is not None
        assert (host.index, host.total) == (i, STEPS)
        return {"latents": changed(host)}

    torch.manual_seed(5)
    with Capture(pipe, changed):
        expected = call(pipe, noise)
    torch.manual_seed(5)
    with Capture(pipe) as capture:
        assert torch.equal(call(pipe, noise, callback_on_step_end=at_end), expected)
    torch.manual_seed(5)
    assert not torch.equal(call(pipe, noise), expected)


def test_a_capture_in_the_middle_of_a_run_counts_on() -> None:
    pipe = tiny_sd()
    found: list[Any] = []

    def at_end(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            found.append(Capture(pipe, done=i + 1))
        elif i > 1:
            found.append((i, found[0].last.index, found[0].last.total))
        return {}

    call(pipe, noise_for(pipe), callback_on_step_end=at_end)
    found[0].detach()
    assert found[1:] == [(2, 2, STEPS), (3, 3, STEPS)]


def test_a_loss_draws_its_own_numbers_in_every_step() -> None:
    """Taking a step again must not put back the global generator that a loss draws from."""
    pipe, drawn = tiny_sd(), []

    def take(host: CapturedHost) -> Tensor:
        drawn.append(float(torch.rand(())))
        return plain(host)

    with Capture(pipe, take):
        call(pipe, noise_for(pipe))
    assert len(set(drawn)) == STEPS


@pytest.mark.parametrize("raised", [False, True])
def test_afterwards_the_pipeline_is_as_before(raised: bool) -> None:
    pipe = tiny_sd()

    def look() -> Any:
        hooks = [
            len(getattr(pipe.unet, f"_forward_{kind}"))
            for kind in ("hooks", "pre_hooks", "hooks_with_kwargs")
        ]
        flags = [p.requires_grad for p in pipe.unet.parameters()]
        return (
            type(pipe),
            type(pipe.scheduler),
            set(vars(pipe)),
            set(vars(pipe.scheduler)),
            set(vars(pipe.unet)),
            hooks,
            flags,
        )

    call(pipe, noise_for(pipe))
    before = look()

    def take(host: CapturedHost) -> Tensor:
        if raised:
            raise ZeroDivisionError
        return plain(host)

    try:
        with Capture(pipe, take):
            call(pipe, noise_for(pipe))
    except ZeroDivisionError:
        assert raised
    assert look() == before
    capture = Capture(pipe)
    with pytest.raises(InputError, match="already"):
        Capture(pipe)
    del capture
    gc.collect()
    assert look() == before


def test_a_copy_of_the_pipeline_leaves_it_alone() -> None:
    pipe = tiny_sd()
    noise = noise_for(pipe)
    expected = call(pipe, noise)
    own = type(pipe.scheduler)
    with Capture.of_clone(pipe, plain) as capture, torch.no_grad():
        assert torch.equal(call(capture.pipe, noise), expected)
        assert type(pipe.scheduler) is own
        assert not pipe.unet._forward_hooks
        assert torch.equal(call(pipe, noise), expected)


def test_threads_with_copies_do_not_disturb_each_other() -> None:
    pipe = tiny_sd()

    def run(shift: float) -> Tensor:
        def take(host: CapturedHost) -> Tensor:
            x = host.x + shift
            return host.step(x, host.evaluate(x))

        with Capture.of_clone(pipe, take) as capture, torch.no_grad():
            return call(capture.pipe, noise_for(pipe))

    shifts = [0.01 * i for i in range(4)]
    alone = [run(shift) for shift in shifts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, shifts))
    assert all(map(torch.equal, alone, together))
    assert len({float(x.sum()) for x in alone}) == 4


# -- evaluations --------------------------------------------------------------------------------------------------


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
