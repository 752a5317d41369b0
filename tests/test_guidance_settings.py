"""Guidance as users set it: impossible settings refused, strengths and sub-grids by hand, the trace, what it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift.errors import InputError, MissingGradientError
from backdrift.guidance import Constant, Relative
from backdrift.guidance.subgrids import subgrid
from backdrift.guidance.when import When
from backdrift.host import Level
from backdrift.schedules import VP, Flow
from guided_runs import RHOS, guided_run
from pictured import bright, denoiser, start, times_at


def detached(images: Tensor) -> Tensor:
    return images.detach().sum((1, 2, 3))


def one_number(images: Tensor) -> Tensor:
    return images.sum()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: bd.SymplecticAdjointGuidance(bright, 5, start=0.3, stop=0.9),
            "n = 5 is more than the 4 steps",
        ),
        (lambda: bd.SymplecticAdjointGuidance(bright, 1, steps=[3, 10]), "step 10 is out of range"),
        (lambda: bd.SymplecticAdjointGuidance(bright, 1, steps=[True] * 3), "mask has 3 values"),
        (lambda: bd.SymplecticAdjointGuidance(bright, 1, 0.31, 0.39), "no step of 10 lies between"),
        (lambda: bd.SymplecticAdjointGuidance(bright, 1, repeats=[1, 2]), "repeats has 2 numbers"),
        (lambda: bd.SymplecticAdjointGuidance(bright, [1, 2]), "n has 2 numbers"),
        (lambda: bd.SymplecticAdjointGuidance(one_number), "one value per sample"),
        (lambda: bd.SymplecticAdjointGuidance(detached), "does not depend on the picture"),
        (lambda: bd.SymplecticAdjointGuidance(bright, seed=[1, 2, 3], repeats=2), "3 seeds for 2 samples"),
    ],
)
def test_bad_input_is_refused_before_any_sampling(make: Any, words: str) -> None:
    model, network = denoiser()
    guidance = make()
    with pytest.raises(InputError, match=words):
        bd.sample(model, start(2), grid=bd.TimeGrid(times_at(VP.linear(), RHOS)), guidance=guidance)
    assert network.calls == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": 0}, "n is a whole number"),
        ({"n": "many"}, "n is a whole number"),
        ({"strength": 0}, "a strength is a positive number"),
        ({"strength": -0.2}, "maximize=True"),
        ({"start": 0.7, "stop": 0.3}, "start < stop"),
        ({"repeats": 0}, "repeats are whole numbers"),
        ({"subgrid": "karras"}, "subgrid must be one of"),
        ({"solver": bd.AdamsBashforth(2)}, "no partner"),
        ({"solver": bd.EDICT()}, "explicit solver"),
        ({"seed": -1}, "seed is a whole number"),
        ({"decode": 3}, "decode must be callable"),
        ({"backward": -1}, "backward is a whole number"),
        ({"backward_rate": 0.0}, "backward_rate must be positive"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        bd.SymplecticAdjointGuidance(bright, **settings)


def test_what_would_get_no_gradient_is_refused() -> None:
    model, network = denoiser()
    x = start(2).requires_grad_()
    guidance = bd.SymplecticAdjointGuidance(bright, 1)
    with pytest.raises(MissingGradientError, match="x_T requires grad"):
        bd.sample(model, x, guidance=guidance)
    with pytest.raises(InputError, match="leave out gradient="):
        bd.sample(model, start(2), guidance=guidance, gradient=bd.Exact())
    assert network.calls == 0
    with torch.no_grad():
        assert bd.sample(model, x, guidance=guidance).x0.isfinite().all()


def test_states_that_are_no_pictures_want_a_decoder() -> None:
    network = torch.nn.Identity()
    model = bd.Denoiser(lambda x, t, c: network(x), VP.linear())
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="give the guidance decode="):
        bd.sample(model, x, guidance=bd.SymplecticAdjointGuidance(bright, 1))
    decoded = bd.SymplecticAdjointGuidance(bright, 1, decode=lambda x0: x0[:, :3] + x0[:, 3:])
    by_loss = bd.SymplecticAdjointGuidance(lambda z: bright(z), 1, decode=lambda x0: x0[:, :3] + x0[:, 3:])
    assert torch.equal(*(bd.sample(model, x, guidance=g).x0 for g in (decoded, by_loss)))
    assert not torch.equal(bd.sample(model, x, guidance=decoded).x0, bd.sample(model, x).x0)


def test_a_video_is_scored_frame_by_frame() -> None:
    """Clean samples decoded to (B, F, 3, H, W): the loss is the mean over the frames, each with its sample's prompt."""
    x, seen = start(2), []

    def of_frames(images: Tensor, prompts: Any) -> Tensor:
        seen.append((len(images), prompts))
        return bright(images)

    def video(x0: Tensor) -> Tensor:
        return torch.stack([x0, 0.5 * x0, x0.flip(-1)], 1)

    options: dict[str, Any] = {"prompts": ["one", "two"], "strip": True}
    framed = bd.SymplecticAdjointGuidance(of_frames, 2, decode=video, **options)
    by_hand = bd.SymplecticAdjointGuidance(
        lambda z: (bright(z) + bright(0.5 * z) + bright(z.flip(-1))) / 3, 2
    )
    torch.testing.assert_close(guided_run(framed, x).x0, guided_run(by_hand, x).x0, rtol=1e-12, atol=1e-13)
    assert seen[-1] == (6, ["one"] * 3 + ["two"] * 3)
    assert framed.trace.strip(1).shape == (4, 3, 2, 2)


def test_subgrids() -> None:
    schedule = VP.discrete(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64))
    times = [float(t) for t in range(990, -1, -10)] + [-1.0]  # a sampler's 100 calls, and the clean end
    assert subgrid("paper", 4, times[30:], schedule) == [690.0, 460.0, 230.0, 0.0, -1.0]
    # Of 69 calls those number 0, 22.7, 45.3 and 68, rounded down.
    assert subgrid("paper", 4, times[31:], schedule) == [680.0, 460.0, 230.0, 0.0, -1.0]
    assert subgrid("paper", 1, times[30:], schedule) == [690.0, -1.0]
    assert subgrid("paper", 4, times[97:], schedule) == [20.0, 10.0, 0.0, -1.0]
    assert subgrid("uniform", 4, times[19:], schedule) == [800.0, 600.0, 400.0, 200.0, -1.0]
    lams = schedule.lam(subgrid("logsnr", 4, times[30:-1], schedule)[:-1])
    assert lams.diff().tolist() == pytest.approx([float(lams[-1] - lams[0]) / 3] * 3)
    assert subgrid("uniform", 3, [0.0, -1.0], schedule) == [0.0, -1.0]
    with pytest.raises(InputError, match="alpha is 0"):
        subgrid("logsnr", 3, [1.0, 0.5, 0.25, 0.0], Flow())


def test_when() -> None:
    assert When(0.3, 0.7).guided(100) == list(range(30, 70))  # the paper's 70 to 31, counted down
    assert When(steps=(5, 2)).guided(8) == [2, 5]
    assert When(steps=(False, True, True)).guided(3) == [1, 2]
    assert When(0.5, 1.0, repeats=3).attempts(4) == [1, 1, 3, 3]
    assert When(0.5, 1.0, repeats=(2, 1, 1, 3)).attempts(4) == [2, 1, 1, 3]


def test_strengths_by_hand() -> None:
    from backdrift.host import Evaluation

    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    more = torch.tensor([[0.6, 0.8], [1.0, 1.0]], dtype=torch.float64)
    evaluation = Evaluation(z, 2 * z, "epsilon", Level(0.8, 0.6), 0.5, more, 7.5)
    pull = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    rms_more, rms_pull = [math.sqrt(0.5), 1.0], [1.0, math.sqrt(2)]
    wanted = [0.2 * 7.5 * m / p for m, p in zip(rms_more, rms_pull, strict=True)]
    assert Relative(0.2)(evaluation, pull).flatten().tolist() == pytest.approx(wanted)
    eps = [2 * math.sqrt(12.5), 2 * math.sqrt(2.0)]
    wanted = [0.1 * e / p for e, p in zip(eps, rms_pull, strict=True)]
    assert Relative(0.1, "epsilon")(evaluation, pull).flatten().tolist() == pytest.approx(wanted)
    x0 = (z - 0.6 * 2 * z) / 0.8
    velocity = (2 * z - x0).pow(2).mean(1).sqrt().tolist()
    wanted = [0.1 * v / p for v, p in zip(velocity, rms_pull, strict=True)]
    assert Relative(0.1, "velocity")(evaluation, pull).flatten().tolist() == pytest.approx(wanted)
    assert Constant(3.0)(evaluation, pull).flatten().tolist() == [3.0, 3.0]


def test_the_trace_tells_what_was_done() -> None:
    seen: list[Any] = []
    guidance = bd.SymplecticAdjointGuidance(bright, 2, repeats=2, callback=seen.append, strip=True)
    guided_run(guidance, start(2))
    trace = guidance.trace
    assert seen == trace.entries
    assert [(e.index, e.attempt) for e in trace.entries] == [(i, k) for i in range(3, 7) for k in range(2)]
    assert len(trace.loss) == 4
    assert trace.entries[0].t == pytest.approx(times_at(VP.linear(), RHOS)[3])
    assert all(len(e.loss) == len(e.strength) == len(e.pull) == 2 for e in trace.entries)
    assert trace.strip().shape == (4, 3, 2, 2)
    assert trace.as_dict()["calls_forward"] == 6 + 8 * 2


def test_memory_does_not_grow_with_n() -> None:
    """Bytes of activations alive at once in a guided step, counted at the network's own layers."""
    from live_bytes import LiveBytes

    peaks = []
    for n in (1, 8):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 256, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(256, 256, 1),
            torch.nn.GELU(), torch.nn.Conv2d(256, 3, 3, padding=1),
        ).requires_grad_(False)  # fmt: skip
        model = bd.Denoiser(lambda x, t, c, network=network: network(x), VP.linear())
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        guidance = bd.SymplecticAdjointGuidance(
            lambda z: z.pow(2).mean((1, 2, 3)), n, steps=[1], subgrid="uniform"
        )
        bd.sample(model, x, grid=bd.TimeGrid("uniform", 10), guidance=guidance)  # warm
        with LiveBytes() as live:
            bd.sample(model, x, grid=bd.TimeGrid("uniform", 10), guidance=guidance)
        peaks.append(live.peak)
    assert peaks[1] <= 1.05 * peaks[0]
