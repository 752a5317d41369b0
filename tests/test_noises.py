"""The replayable noise: known bits, known statistics, one path under every grid, batch and dtype."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from backdrift.errors import InputError
from backdrift.noises import Brownian, GivenNoise
from backdrift.noises.brownian import LEVELS, angle
from backdrift.noises.normals import normals, row_keys, stream
from backdrift.schedules import EDM, VP, Flow
from problems import SCHEDULES

ROWS = 20000


def test_the_bits_are_splitmix64s() -> None:
    """The first outputs of the published generator from state 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
             16408922859458223821]  # fmt: skip
    found = stream(torch.tensor(1234567), torch.arange(5))
    assert [int(value) % 2**64 for value in found] == known


def test_numbers_are_standard_normal_and_independent() -> None:
    """By label, by row and by place: moments and correlations within five of their standard errors."""
    n = 100
    z = normals(row_keys([0] * n, range(n)), range(n), stream(torch.tensor(0), torch.arange(n)))
    assert z.shape == (n, n, n)
    for power, value, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - value) < 5 * math.sqrt(spread / z.numel()), power
    sort = z.flatten().sort().values
    levels = (torch.arange(len(sort), dtype=torch.float64) + 0.5) / len(sort)
    # Kolmogorov–Smirnov: 1.95 is its 0.1 % point.
    assert float((torch.special.ndtr(sort) - levels).abs().max()) * math.sqrt(len(sort)) < 1.95
    for dim in range(3):
        product = z * z.roll(1, dim)
        assert abs(float(product.mean())) < 5 / math.sqrt(z.numel())
        # Squares too: a generator may be uncorrelated and still dependent.
        both = (z**2 - 1) * (z.roll(1, dim) ** 2 - 1)
        assert abs(float(both.mean())) < 5 * 2 / math.sqrt(z.numel())


def test_increments_have_the_path_s_covariance() -> None:
    """Five neighbouring steps of very different lengths: unit variance each, no correlation, kurtosis 3."""
    times = [1.0, 0.7, 0.69, 0.2, 0.02, 0.0]
    x = torch.zeros(ROWS, 1, dtype=torch.float64)
    draw = Brownian(3).path(VP.linear(), times, x)
    steps = torch.cat([draw(x, 1.0, a, b) for a, b in itertools.pairwise(times)], dim=1)
    covariance = steps.T @ steps / ROWS
    assert float((covariance - torch.eye(5)).abs().max()) < 5 * math.sqrt(2 / ROWS)
    assert float((steps.mean(0)).abs().max()) < 5 / math.sqrt(ROWS)
    assert float(((steps**4).mean(0) - 3).abs().max()) < 5 * math.sqrt(96 / ROWS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noises_of_two_steps_add_up_to_that_of_both(name: str) -> None:
    """With standard deviations sqrt(c_a - c_b), c = sigma² / (alpha² + sigma²): W(a, c) = W(a, b) + W(b, c)."""
    schedule = SCHEDULES[name]
    a, m, b = (schedule.t_max * part for part in (0.9, 0.31, 0.044))
    if name == "edm":
        a, m, b = 80.0, 2.0, 0.01
    x = torch.zeros(50, 2, dtype=torch.float64)
    draw = Brownian(0).path(schedule, [a, b], x)
    first, second, both = draw(x, 1.0, a, m), draw(x, 1.0, m, b), draw(x, 1.0, a, b)

    def clock(t: float) -> float:
        return math.sin(math.pi / 2 * round(angle(schedule, t) * 2**LEVELS) / 2**LEVELS) ** 2

    whole = [math.sqrt(clock(s) - clock(t)) for s, t in ((a, m), (m, b), (a, b))]
    torch.testing.assert_close(whole[0] * first + whole[1] * second, whole[2] * both, rtol=0, atol=1e-14)


def test_one_path_in_every_order_batch_and_dtype() -> None:
    schedule, x = Flow(), torch.zeros(6, 3, 2, dtype=torch.float64)
    times = [0.9, 0.5, 0.1]
    draw = Brownian(5).path(schedule, times, x)
    forth = [draw(x, 1.0, 0.9, 0.5), draw(x, 1.0, 0.5, 0.1)]
    again = Brownian(5).path(schedule, times, x)
    back = [again(x, 1.0, 0.5, 0.1), again(x, 1.0, 0.9, 0.5)][::-1]
    fewer = Brownian(5).path(schedule, times, x[:2])
    single = Brownian(5).path(schedule, times, x.float())
    for one, other in zip(forth, back, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(fewer(x[:2], 1.0, 0.9, 0.5), forth[0][:2])
    assert torch.equal(single(x.float(), 1.0, 0.9, 0.5), forth[0].float())
    assert not torch.equal(Brownian(6).path(schedule, times, x)(x, 1.0, 0.9, 0.5), forth[0])
    # A large state is drawn level by level, a small one in one go.
    wide = torch.zeros(1, 70000, dtype=torch.float64)
    torch.testing.assert_close(
        Brownian(5).path(schedule, times, wide)(wide, 1.0, 0.9, 0.5)[0, :6],
        forth[0][0].flatten(),
        rtol=0,
        atol=1e-13,
    )


def test_a_seed_per_row_is_that_row_wherever_it_stands() -> None:
    x, times = torch.zeros(3, 4, dtype=torch.float64), [0.9, 0.1]

    def noise(seed: int | list[int], rows: int) -> Tensor:
        return Brownian(seed).path(Flow(), times, x[:rows])(x[:rows], 1.0, 0.9, 0.1)

    several = noise([7, -1, 2**80], 3)
    for row, seed in enumerate([7, -1, 2**80]):
        assert torch.equal(noise(seed, 1)[0], several[row])
    assert not torch.equal(noise(7, 2)[1], several[1])


def test_schedules_with_the_same_noise_to_signal_ratio_share_the_path() -> None:
    """The flow's t = rho / (1 + rho) and EDM's t = rho are one point of the clock."""
    x = torch.zeros(4, 2, dtype=torch.float64)
    rhos = (3.0, 0.4)
    flow = [rho / (1 + rho) for rho in rhos]
    torch.testing.assert_close(
        Brownian(1).path(Flow(), flow, x)(x, 1.0, *flow),
        Brownian(1).path(EDM(), rhos, x)(x, 1.0, *rhos),
        rtol=0,
        atol=1e-12,
    )


def test_both_ends_of_the_clock_are_ordinary_points() -> None:
    """alpha = 0 at t = 1 and sigma = 0 at t = 0 of the flow: one step over all is W(1), of unit variance."""
    x = torch.zeros(ROWS, 1, dtype=torch.float64)
    whole = Brownian(2).path(Flow(), [1.0, 0.0], x)(x, 1.0, 1.0, 0.0)
    assert abs(float(whole.var()) - 1) < 5 * math.sqrt(2 / ROWS)
    near = Brownian(2).path(Flow(), [1.0, 1e-6], x)(x, 1.0, 1.0, 1e-6)
    assert 0 < float((near - whole).norm() / whole.norm()) < 1e-5


def test_impossible_noise_is_refused() -> None:
    x = torch.zeros(2, 3)
    for seed in (0.5, True, "7", [], [1, 2.0]):
        with pytest.raises(InputError, match="integer"):
            Brownian(seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 seeds for a batch of 2"):
        Brownian([1, 2, 3]).path(Flow(), [0.9, 0.1], x)
    with pytest.raises(InputError, match="too close"):
        Brownian(0).path(EDM(), [1.0, 2e-8, 1e-8], x)
    with pytest.raises(InputError, match="one per step"):
        GivenNoise([torch.zeros(2, 3, dtype=torch.int64)])
    with pytest.raises(InputError, match="one per step"):
        GivenNoise([])
    with pytest.raises(InputError, match="1 noises were given for a run of 2 steps"):
        GivenNoise([x]).path(Flow(), [0.9, 0.5, 0.1], x)
    with pytest.raises(InputError, match=r"noise 1 has shape \(2, 2\)"):
        GivenNoise([x, x[:, :2]]).path(Flow(), [0.9, 0.5, 0.1], x)
    with pytest.raises(InputError, match="not a step of the grid"):
        GivenNoise([x, x]).path(Flow(), [0.9, 0.5, 0.1], x)(x, 1.0, 0.9, 0.1)
