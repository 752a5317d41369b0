"""Members of a batch guide themselves: numbers of steps and strengths of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError
from backdrift.guidance import (
    DPS,
    LGD,
    MPGD,
    TFG,
    Adaptive,
    Constant,
    FreeDoM,
    Relative,
    UniversalGuidance,
)
from backdrift.guidance.when import When
from backdrift.schedules import VP
from pictured import bright, denoiser, start, times_at
from tiny_pipelines import tiny_sd

RHOS = [8.0, 5.0, 3.2, 2.1, 1.4, 0.9, 0.55, 0.3, 0.15, 0.06]
TIMES = times_at(VP.linear(), RHOS)


def sampled(guidance: Any, x: Tensor, cond: Tensor | None = None) -> Tensor:
    model, _ = denoiser(VP.linear(), "epsilon", 2.0)
    cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64) if cond is None else cond
    return bd.sample(model, x, cond, grid=bd.TimeGrid(TIMES), form="exponential", guidance=guidance).x0


EVERY: dict[str, Any] = {
    "sag": lambda **more: bd.SymplecticAdjointGuidance(bright, 3, **more),
    "adaptive": lambda **more: bd.SymplecticAdjointGuidance(
        bright, Adaptive(0.02, 6), subgrid="uniform", **more
    ),
    "freedom": lambda **more: FreeDoM(bright, **more),
    "dps": lambda **more: DPS(bright, 0.1, **more),
    "lgd": lambda **more: LGD(bright, 0.2, 3, **more),
    "universal": lambda **more: UniversalGuidance(bright, 0.5, 2, **more),
    "universal, relative": lambda **more: UniversalGuidance(bright, Relative(0.3), 2, Relative(0.1), **more),
    "mpgd": lambda **more: MPGD(bright, **more),
    "tfg": lambda **more: TFG(bright, 0.1, 0.1, 0.2, 3, 2, **more),
    "tfg, relative": lambda **more: TFG(bright, Relative(0.1), Relative(0.1), 0.2, 3, 2, **more),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_gives_what_its_members_would_give_alone(name: str) -> None:
    """Samples that differ much: the first is near the data, the last one far away; with time travel."""
    x = start(3) * torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64).view(3, 1, 1, 1)
    cond = torch.linspace(-0.5, 1.0, 3, dtype=torch.float64).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    options: dict[str, Any] = {"repeats": 2, "start": 0.1, "stop": 0.8}
    whole = sampled(EVERY[name](seed=[3, 1, 4], **options), x, cond)
    for i, seed in enumerate([3, 1, 4]):
        alone = sampled(EVERY[name](seed=[seed], **options), x[i : i + 1], cond[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-10, atol=1e-11)


def test_each_sample_takes_as_many_steps_as_it_needs() -> None:
    x = start(2) * torch.tensor([0.05, 6.0], dtype=torch.float64).view(2, 1, 1, 1)
    guidance = EVERY["adaptive"](start=0.0, stop=1.0)
    sampled(guidance, x)
    ns = [entry.n for entry in guidance.trace.entries]
    apart = [n for n in ns if isinstance(n, list)]
    assert apart
    for entry in guidance.trace.entries:
        if isinstance(entry.n, list):
            assert entry.calls.vjps == sum(set(entry.n))
            assert entry.decodes == len(set(entry.n))


def test_adaptive_estimates_near_the_end_of_the_run() -> None:
    """Where as many steps are asked for as are left, there is no room for one more to compare with: n stays large."""
    for subgrid in ("paper", "uniform"):
        guidance = bd.SymplecticAdjointGuidance(
            bright, Adaptive(1e-9, 8), start=0.0, stop=1.0, subgrid=subgrid, repeats=2, strength=0.01
        )
        sampled(guidance, start(1))
        left = [len(RHOS) - entry.index for entry in guidance.trace.entries]
        assert [entry.n for entry in guidance.trace.entries] == [min(8, n) for n in left]


def test_adaptive_settings_are_whole_numbers() -> None:
    for most in (0, 2.5, True):
        with pytest.raises(InputError, match="most >= 1"):
            Adaptive(0.1, most)  # type: ignore[arg-type]


# -- strengths -------------------------------------------------------------------------------------

BY_STRENGTH: dict[str, Any] = {
    "sag": lambda s: bd.SymplecticAdjointGuidance(bright, 2, strength=s),
    "sag, a list": lambda s: bd.SymplecticAdjointGuidance(
        bright, 2, strength=list(s.value) if isinstance(s.value, tuple) else s.value
    ),
    "freedom": lambda s: FreeDoM(bright, s, repeats=1),
    "dps": lambda s: DPS(bright, s),
    "lgd": lambda s: LGD(bright, s, 1, 0.0),
    "universal": lambda s: UniversalGuidance(bright, s, repeats=1),
    "universal, backward": lambda s: UniversalGuidance(bright, 0, 2, s, repeats=1),
    "mpgd": lambda s: MPGD(bright, s),
    "tfg": lambda s: TFG(bright, s, s, 0.0, 2),
}


@pytest.mark.parametrize("name", BY_STRENGTH)
@pytest.mark.parametrize("kind", [Relative, Constant])
def test_each_sample_has_a_strength_of_its_own(name: str, kind: Any) -> None:
    if name == "sag, a list" and kind is Constant:
        pytest.skip("a list is relative")
    x, make = start(3), BY_STRENGTH[name]
    found = sampled(make(kind([0.1, 0.0, 0.3])), x)
    for i, w in ((0, 0.1), (2, 0.3)):
        torch.testing.assert_close(
            found[i : i + 1], sampled(make(kind(w)), x[i : i + 1]), rtol=1e-10, atol=1e-11
        )
    torch.testing.assert_close(found[1:2], sampled(None, x[1:2]), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", BY_STRENGTH)
def test_strengths_for_another_batch_are_refused_before_sampling(name: str) -> None:
    model, network = denoiser(VP.linear(), "epsilon", 2.0)
    with pytest.raises(InputError, match="2 strengths for 3 samples"):
        bd.sample(model, start(3), grid=bd.TimeGrid(TIMES), guidance=BY_STRENGTH[name](Relative([0.1, 0.2])))
    assert network.calls == 0


@pytest.mark.parametrize("value", [0, -1, float("nan"), True, "0.2", [], [0.0, 0.0], [0.1, -0.1], [[0.1]]])
def test_strengths_that_are_none(value: Any) -> None:
    for kind in (Relative, Constant, FreeDoM):
        with pytest.raises(InputError, match="a strength is a positive number"):
            FreeDoM(bright, value) if kind is FreeDoM else kind(value)


# -- relative strengths in the presets -------------------------------------------------------------


@pytest.mark.parametrize("to", ["guidance", "epsilon", "velocity"])
def test_relative_presets_are_each_other_where_they_meet(to: Any) -> None:
    """With every rule's gradient brought to one size, rules with the same direction are the same."""
    x, w = start(2), Relative(0.15, to)
    span: dict[str, Any] = {"start": 0.2, "stop": 0.8, "repeats": 2, "seed": [1, 2]}
    freedom = sampled(FreeDoM(bright, w, **span), x)
    torch.testing.assert_close(sampled(DPS(bright, w, **span), x), freedom, rtol=1e-11, atol=1e-12)
    only = TFG(bright, w, 0, 0.0, 1, rho_schedule="constant", **span)
    torch.testing.assert_close(sampled(only, x), freedom, rtol=1e-11, atol=1e-12)
    mean = TFG(bright, 0, w, 0.0, 1, mu_schedule="constant", **span)
    torch.testing.assert_close(sampled(mean, x), sampled(MPGD(bright, w, **span), x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", ["dps", "universal", "universal, backward", "tfg"])
def test_relative_presets_do_not_see_the_losss_scale(name: str, weight: float) -> None:
    x, loss = start(2), lambda images: weight * bright(images)
    w = Relative(0.1)
    make = {
        "dps": lambda f: DPS(f, w),
        "universal": lambda f: UniversalGuidance(f, w, 2, w, repeats=1),
        "universal, backward": lambda f: UniversalGuidance(f, 0, 3, w, repeats=1),
        "tfg": lambda f: TFG(f, w, w, 0.0, 3),
    }[name]
    torch.testing.assert_close(sampled(make(loss), x), sampled(make(bright), x), rtol=1e-9, atol=1e-10)


def test_relative_universal_guidance_changes_eps_by_its_share() -> None:
    """One DDIM step by hand."""
    x, w, s = start(2), 0.4, 2.0
    model, network = denoiser(VP.linear(), "epsilon", s)
    cond = torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    run = bd.sample(
        model, x, cond, grid=bd.TimeGrid(TIMES), form="exponential", trajectory=True,
        guidance=UniversalGuidance(bright, Relative(w), steps=[2], repeats=1),
    ).trajectory  # fmt: skip
    (a, sg), (a2, sg2) = [
        (float(VP.linear().alpha(t)), float(VP.linear().sigma(t))) for t in (TIMES[2], TIMES[3])
    ]
    leaf = run[2].detach().requires_grad_()
    t = torch.full((2,), TIMES[2], dtype=torch.float64)
    more = network(leaf, t, cond) - network(leaf, t, model.uncond)
    eps = network(leaf, t, model.uncond) + s * more
    (g,) = torch.autograd.grad(bright((leaf - sg * eps) / a).sum(), leaf)

    def size(z: Tensor) -> Tensor:
        return z.square().mean((1, 2, 3), keepdim=True).sqrt()

    pushed = (eps + w * s * size(more) * g / size(g)).detach()
    wanted = a2 * (leaf.detach() - sg * pushed) / a + sg2 * pushed
    torch.testing.assert_close(run[3], wanted, rtol=1e-11, atol=1e-12)


# -- repeats by parts of the run -------------------------------------------------------------------


def test_repeats_by_parts_of_the_run() -> None:
    freedom = When.of(0.3, 0.7, None, ((0.3, 3), (0.6, 1)))
    assert freedom.attempts(100) == [1] * 30 + [3] * 30 + [1] * 40  # its code's 70 > index >= 40
    assert When.of(0.0, 1.0, None, [[0.5, 2]]).attempts(4) == [1, 1, 2, 2]
    assert When.of(0.0, 1.0, [1, 3], ((0.0, 2), (0.5, 4))).attempts(4) == [1, 2, 1, 4]
    for bad in (((0.5, 2), (0.3, 1)), ((0.5, 0),), ((1.0, 2),), ((0.1, 2.5),), ((0.5, 2), 3), (("a", 2),)):
        with pytest.raises(InputError, match="repeats"):
            When.of(0.0, 1.0, None, bad)  # type: ignore[arg-type]


def test_published_repeats_by_name() -> None:
    attempts = FreeDoM(bright, repeats="published").when.attempts(100)
    assert attempts == [1] * 30 + [3] * 30 + [1] * 40
    attempts = bd.SymplecticAdjointGuidance(bright, repeats="published").when.attempts(100)
    assert attempts == [1] * 40 + [2] * 30 + [1] * 30  # appendix B.1
    with pytest.raises(InputError, match="'published'"):
        FreeDoM(bright, repeats="often")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 2.0}, "n is a whole number"),
        ({"repeats": 2.0}, "repeats are whole numbers"),
        ({"repeats": []}, "repeats are whole numbers"),
        ({"steps": 5}, "steps are numbers"),
        ({"steps": []}, "steps are different numbers"),
        ({"steps": [0, 1, 0, 1]}, "True, False"),
        ({"start": "a"}, "start < stop"),
        ({"strip": -5}, "strip must be"),
        ({"strip": "yes"}, "strip must be"),
        ({"seed": 1.5}, "seed is a whole number"),
        ({"decode_chunk_size": 0}, "decode_chunk_size must be"),
        ({"decode_chunk_size": False}, "decode_chunk_size must be"),
        ({"maximize": "no"}, "maximize"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bd.SymplecticAdjointGuidance(bright, **settings)


def test_the_first_call_waits_until_all_is_checked() -> None:
    """Also where a picture makes the run shorter, and where times are given: before the network is called."""
    from test_capture_families import picture
    from tiny_pipelines import tiny_controlnet, tiny_sd_img2img

    def refused(pipe: Any, guidance: Any, words: str, **call: Any) -> None:
        calls: list[int] = []
        pipe.unet.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(bd.errors.BackdriftError, match=words):
            bd.guide(pipe, "a", guidance, num_inference_steps=8, **call)
        assert not calls

    def of(n: int, **more: Any) -> Any:
        return bd.SymplecticAdjointGuidance(lambda z: z.square().mean((1, 2, 3)), n, **more)

    refused(tiny_controlnet(), of(7), "n = 7 is more than", image=picture())
    refused(tiny_sd_img2img(), of(1, steps=[5]), "out of range", image=picture(), strength=0.5)
    refused(tiny_sd(), of(1, seed=[1, 2, 3]), "3 seeds for 1 samples")
    refused(tiny_sd(), of(1, strength=[0.1, 0.2]), "2 strengths for 1 samples")
    pipe = tiny_sd()
    import diffusers

    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    refused(pipe, of(1), "HeunDiscreteScheduler")


def test_a_call_with_times_of_its_own_counts_those() -> None:
    import diffusers

    pipe = tiny_sd()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe(
        "a", num_inference_steps=9, output_type="latent"
    )  # what it remembers of this call is not the next one's
    guidance = bd.SymplecticAdjointGuidance(
        lambda z: z.square().mean((1, 2, 3)), 1, steps=[1], repeats=[1, 2, 1, 1]
    )
    bd.guide(pipe, "a", guidance, timesteps=[900, 600, 300, 100])
    assert guidance.trace.total == 4
    assert len(guidance.trace.entries) == 2
