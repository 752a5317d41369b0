"""The box around the noise holds for the numbers that are handed in; updates are what their equations say."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from backdrift.descent import Example
from backdrift.recipes.audit_noise import NoiseWithin, Normalized, Signs, box, random_within
from tiny_pipelines import noise_for, tiny_sd

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def some(dtype: torch.dtype) -> Tensor:
    """Noise of every size: ordinary, huge, tiny, zero, and numbers at a distance of tau from zero."""
    ordinary = torch.randn(500, generator=torch.Generator().manual_seed(0))
    odd = torch.tensor([0.0, -0.0, 0.1, -0.1, 0.8, 1e-6, -1e-6, 100.0, 3.9999])
    return torch.cat([ordinary, odd]).to(dtype)[None]


def farthest(x: Tensor, start: Tensor) -> Fraction:
    """The largest distance, in exact arithmetic."""
    pairs = zip(x.flatten().double().tolist(), start.flatten().double().tolist(), strict=True)
    return max(abs(Fraction(a) - Fraction(b)) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.1, 0.8, 0.9, 1e-3])
def test_the_box_is_never_left_in_exact_arithmetic_and_is_as_large_as_it_can_be(
    dtype: torch.dtype, tau: float
) -> None:
    start = some(dtype)
    low, high = box(start, tau)
    assert low.dtype == high.dtype == dtype
    slack = Fraction(1, 2**60) if dtype == torch.float64 else Fraction(0)  # float64's own difference rounds
    for end in (low, high):
        assert farthest(end, start) <= Fraction(tau) + slack * 200
    # Within two units in the last place of the ends: nothing is given away.
    info = torch.finfo(dtype)
    for end, sign in ((low, -1), (high, 1)):
        wanted = start.double() + sign * tau
        allowed = 2.01 * (wanted.abs() * info.eps).clamp_min(info.tiny)
        assert bool(((end.double() - wanted).abs() <= allowed).all())


def test_a_projected_master_stays_inside_after_rounding_to_the_pipelines_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        pipe = tiny_sd().to(dtype=dtype)
        start = noise_for(pipe).to(dtype)
        variable = NoiseWithin(0.3)
        with variable.on(pipe, [Example("a", start)]):
            master = variable.parameters["noise"]
            assert master.dtype == torch.float32
            with torch.no_grad():
                master.add_(torch.randn(master.shape, generator=torch.Generator().manual_seed(1)))
            variable.project()
            handed = variable.call(pipe, [Example("a", start)], [0])["latents"]
        assert handed.dtype == dtype
        assert farthest(handed, start) <= Fraction(0.3)
        assert farthest(handed, start) > Fraction(0.29)


def test_the_start_is_not_what_is_changed() -> None:
    """The authors' clamp compared the noise with itself: start and variable shared their memory."""
    pipe, start = tiny_sd(), noise_for(tiny_sd())
    was, variable = start.clone(), NoiseWithin(0.1)
    with variable.on(pipe, [Example("a", start)]), torch.no_grad():
        for _ in range(30):  # the authors' thirty updates of 0.01 went 0.3 far
            variable.parameters["noise"].add_(0.01)
            variable.project()
        moved = variable.parameters["noise"] - was
    assert torch.equal(start, was)
    assert moved.min() > 0.0999
    assert farthest(variable.parameters["noise"].detach(), was) <= Fraction(0.1)


def test_projection_leaves_what_is_inside_as_it_is() -> None:
    pipe, start = tiny_sd(), noise_for(tiny_sd())
    variable = NoiseWithin(0.5)
    with variable.on(pipe, [Example("a", start)]):
        inside = start + 0.4 * torch.rand(start.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            variable.parameters["noise"].copy_(inside)
        variable.project()
        assert torch.equal(variable.parameters["noise"].detach(), inside)


def test_normalized_updates_move_each_sample_by_its_rate_whatever_the_gradients_size() -> None:
    x = torch.zeros(3, 4, 5, requires_grad=True)
    g = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    x.grad = g * torch.tensor([1.0, 1e-30, 0.0])[:, None, None]
    Normalized([x], lr=0.2).step()
    rms = x.detach().flatten(1).square().mean(1).sqrt()
    assert rms.tolist() == pytest.approx([0.2, 0.2, 0.0], rel=1e-5)
    by_hand = -0.2 * g[0] / g[0].square().mean().sqrt()
    torch.testing.assert_close(x.detach()[0], by_hand)
    torch.testing.assert_close(x.detach()[1], -0.2 * g[1] / g[1].square().mean().sqrt(), rtol=1e-5, atol=0)


def test_sign_updates() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    x.grad = torch.tensor([[2.0, 0.0, -1e-20]])
    Signs([x], lr=0.5).step()
    assert x.tolist() == [[-0.5, 0.0, 0.5]]


def test_random_changes_are_corners_that_depend_on_their_draw_alone() -> None:
    start = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def drawn(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    found = random_within(start, 0.4, [drawn(1), drawn(2), drawn(3)])
    assert farthest(found, start) <= Fraction(0.4)
    assert bool(((found - start).abs() > 0.3999).all())
    up = (found > start).double().mean().item()
    assert abs(up - 0.5) < 4 * 0.5 / start.numel() ** 0.5
    assert torch.equal(random_within(start[1:2], 0.4, [drawn(2)]), found[1:2])
