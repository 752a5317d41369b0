"""The denoiser: guidance in one call or two, exact times, dtypes, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift import nests
from backdrift.denoiser import Denoiser
from backdrift.errors import InputError
from backdrift.sampling import sample
from backdrift.schedules import VP, Flow
from backdrift.solvers import Euler, Midpoint
from problems import GaussianNetwork, ToyNetwork, condition, scaled_linear_table, start_state, toy_inputs


class Recorder:
    """A network that is linear in its conditioning, and notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Any]] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.seen.append((x, t, cond))
        return 0.5 * x + (cond["a"] if cond is not None else 0.0)


X = torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=torch.float64)
COND = {"a": torch.tensor([[1.0, 1.0], [2.0, 0.5]], dtype=torch.float64)}
UNCOND = {"a": torch.tensor([[0.25, -1.0]], dtype=torch.float64)}


def test_guidance_is_one_batched_call_uncond_first() -> None:
    network = Recorder()
    model = Denoiser(network, VP.linear(), guidance_scale=3.0, uncond=UNCOND)
    out = model(X, 0.5, COND)
    torch.testing.assert_close(out, 0.5 * X + 3 * COND["a"] - 2 * UNCOND["a"], rtol=1e-14, atol=1e-14)
    assert (model.nfe, len(network.seen)) == (1, 1)
    x, t, cond = network.seen[0]
    assert torch.equal(x, torch.cat([X, X]))
    assert torch.equal(t, torch.full((4,), 0.5, dtype=torch.float64))
    assert torch.equal(cond["a"], torch.cat([UNCOND["a"].expand(2, 2), COND["a"]]))


@pytest.mark.parametrize(
    "uncond",
    [None, {"a": UNCOND["a"], "b": 1}, {"a": UNCOND["a"][0]}, {"a": UNCOND["a"].float()}],
    ids=["none", "keys", "dimensions", "dtype"],
)
def test_conditionings_that_share_no_batch_take_two_calls(uncond: Any) -> None:
    network = Recorder()
    model = Denoiser(network, VP.linear(), guidance_scale=3.0, uncond=uncond)
    expected = 0.5 * X + 3 * COND["a"] - 2 * (uncond["a"] if uncond else 0.0)
    torch.testing.assert_close(model(X, 0.5, COND), expected, rtol=1e-6, atol=1e-14)
    assert (model.nfe, len(network.seen)) == (2, 2)


def test_rescaled_guidance_mixes_in_an_output_as_spread_as_the_conditional_one() -> None:
    made = [
        Denoiser(Recorder(), VP.linear(), guidance_scale=3.0, uncond=UNCOND, guidance_rescale=phi)(
            X, 0.5, COND
        )
        for phi in (0.0, 1.0, 0.7)
    ]
    conditional = Denoiser(Recorder(), VP.linear())(X, 0.5, COND)
    torch.testing.assert_close(made[1].std(1), conditional.std(1), rtol=1e-12, atol=0)
    ratio = made[1] / made[0]
    torch.testing.assert_close(ratio[:, :1].expand_as(ratio), ratio, rtol=1e-12, atol=0)
    torch.testing.assert_close(made[2], 0.7 * made[1] + 0.3 * made[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_guidance_means_the_same_in_every_prediction(prediction: str) -> None:
    """Guiding the output and then reading eps is guiding eps: the conversions are affine."""
    schedule, _ = VP.linear(), None
    guided = Denoiser(Recorder(), schedule, prediction, guidance_scale=2.5, uncond=UNCOND)
    plain = Denoiser(Recorder(), schedule, prediction)
    for read in ("__call__", "denoised"):
        with_cond, without = (getattr(plain, read)(X, 0.3, c) for c in (COND, UNCOND))
        expected = without + 2.5 * (with_cond - without)
        torch.testing.assert_close(getattr(guided, read)(X, 0.3, COND), expected, rtol=1e-12, atol=1e-12)


def test_epsilon_and_sample_reassemble_x() -> None:
    x, cond = toy_inputs()
    for prediction in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        model = Denoiser(ToyNetwork(), VP.linear(), prediction)
        alpha, sigma = VP.linear().alpha(0.4), VP.linear().sigma(0.4)
        together = alpha * model.denoised(x, 0.4, cond) + sigma * model(x, 0.4, cond)
        torch.testing.assert_close(together, x, rtol=1e-13, atol=1e-13)


def test_times_are_scaled_and_never_rounded() -> None:
    t = 0.123456789012345
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32)):
        network = Recorder()
        model = Denoiser(network, Flow(), "flow_prediction", time_scale=1000.0)
        model.output(X.to(dtype), t, {"a": COND["a"].to(dtype)})
        assert network.seen[0][1].dtype == expected
        assert torch.equal(network.seen[0][1], torch.full((2,), 1000 * t, dtype=expected))
    network = Recorder()
    model = Denoiser(network, VP.linear(), dtype=torch.bfloat16)
    out = model.output(X.float(), t, None)
    x, times, _ = network.seen[0]
    assert (x.dtype, times.dtype, out.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert float(times[0]) == pytest.approx(t, rel=1e-7)


def test_times_are_rounded_on_request_for_the_network_alone() -> None:
    schedule = VP.discrete(scaled_linear_table(), "spline")
    network = Recorder()
    model = Denoiser(network, schedule, "sample", round_timesteps=True)
    for t, expected in ((417.3, 417.0), (417.5, 418.0), (418.5, 418.0), (998.7, 999.0)):
        eps = model(X, t, COND)
        assert network.seen[-1][1].tolist() == [expected, expected]
        assert network.seen[-1][1].dtype == torch.float64
        # alpha and sigma are those of the exact time.
        x0 = 0.5 * X + COND["a"]
        torch.testing.assert_close(eps, (X - schedule.alpha(t) * x0) / schedule.sigma(t), rtol=1e-12, atol=0)
    flow = Denoiser(network, Flow(), "flow_prediction", time_scale=1000.0, round_timesteps=True)
    flow.output(X, 0.12345, COND)
    assert network.seen[-1][1].tolist() == [123.0, 123.0]


def test_rounded_times_are_the_trained_ones_to_first_order() -> None:
    """On a grid of whole timesteps Euler's run is the same; a method that asks between them is off by the rounding."""
    schedule = VP.discrete(scaled_linear_table(), "spline")
    network = GaussianNetwork(schedule, "epsilon")
    x, times = start_state(schedule, 999.0), [999.0, 700.0, 401.0, 100.0]
    runs = {
        (type(solver), rounded): sample(
            Denoiser(network, schedule, round_timesteps=rounded), x, condition(), solver=solver, grid=times
        ).x0.detach()
        for solver in (Euler(), Midpoint())
        for rounded in (False, True)
    }
    assert torch.equal(runs[Euler, True], runs[Euler, False])
    assert 1e-5 < float((runs[Midpoint, True] - runs[Midpoint, False]).norm()) < 1e-2


def test_a_modules_dtype_is_found() -> None:
    network = ToyNetwork(dtype=torch.float32)
    x, cond = toy_inputs(torch.float32)
    out = Denoiser(network, VP.linear()).output(x.double(), 0.5, cond)
    assert out.dtype == torch.float64
    assert torch.equal(out, network(x, torch.full((2,), 0.5), cond).double())


def test_outputs_may_be_wrapped() -> None:
    for wrap in (lambda out: (out, "more"), lambda out: SimpleNamespace(sample=out)):
        model = Denoiser(lambda x, t, c, wrap=wrap: wrap(2 * x), VP.linear())
        assert torch.equal(model(X, 0.5), 2 * X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Denoiser(3, VP.linear()), "callable"),  # type: ignore[arg-type]
        (lambda: Denoiser(Recorder(), "vp"), "VP.linear"),  # type: ignore[arg-type]
        (lambda: Denoiser(Recorder(), VP.linear(), "eps"), "epsilon, sample"),
        (lambda: Denoiser(Recorder(), VP.linear(), guidance_scale=float("nan")), "guidance_scale"),
        (lambda: Denoiser(Recorder(), VP.linear(), guidance_rescale=1.5), "guidance_rescale"),
        (lambda: Denoiser(Recorder(), VP.linear(), time_scale="1"), "time_scale"),  # type: ignore[arg-type]
        (lambda: Denoiser(Recorder(), VP.linear(), dtype=torch.int8), "floating"),
        (lambda: Denoiser(Recorder(), Flow(), round_timesteps=True), "times up to 1"),
        (lambda: Denoiser(Recorder(), VP.linear(), guidance_scale=2.0)(X, 0.5), "both None"),
        (lambda: Denoiser(lambda x, t, c: torch.cat([x, x], 1), VP.linear())(X, 0.5), "learned variance"),
        (lambda: Denoiser(lambda x, t, c: None, VP.linear())(X, 0.5), "NoneType"),
        (lambda: Denoiser(Recorder(), VP.linear())(X, 1.5), "t = 1.5"),
        (
            lambda: Denoiser(Recorder(), VP.discrete([0.9, 0.7, 0.5, 0.2]), "v_prediction")(X, -1.0),
            "clean end",
        ),
    ],
)
def test_impossible_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_nests_keep_their_shape() -> None:
    a, b = torch.zeros(1), torch.ones(2)
    nest = {"x": [a, (b, "text", None)], "y": 3}
    assert nests.tensors(nest)[1] is b
    doubled = nests.transform(lambda t: 2 * t, nest)
    assert (doubled["y"], doubled["x"][1][1], type(doubled["x"][1])) == (3, "text", tuple)
    assert torch.equal(doubled["x"][1][0], 2 * b)
    assert nests.concatenate({"a": b[None]}, {"a": b[None], "b": 1}, 1) == (False, None)
    assert nests.concatenate([a], [torch.zeros(3)], 2)[0] is False
