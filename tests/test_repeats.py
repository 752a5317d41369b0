"""Networks with state of their own, which a redone call finds changed: noticed; and no alarm at what only rounds."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.ambient import Ambient
from backdrift.errors import StateChangedError
from backdrift.memory import Ledger
from backdrift.repeats import Glimpse, Repeats
from ledger_runs import Net, problem, sample
from problems import ToyNetwork, toy_denoiser, toy_inputs
from toy_runs import GRID, toy_run

SAYS = "did not repeat itself in the backward pass.*% off, where rounding explains"


class Hidden(nn.Module):
    """A network with state that neither its arguments nor its weights show; of which kind, by name."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind
        self.calls, self.cache = 0, None
        self.generator = torch.Generator().manual_seed(3)
        self.numbers = numpy.random.default_rng(3)

    def forward(self, *args: Any) -> Tensor:
        out = self.inner(*args)
        self.calls += 1
        if self.kind == "counter":
            return out * (1 + 0.01 * self.calls)
        if self.kind == "generator":
            return out + 0.1 * torch.randn(out.shape, generator=self.generator, dtype=out.dtype)
        if self.kind == "numpy":
            return out + 0.1 * torch.from_numpy(self.numbers.standard_normal(out.shape)).to(out)
        if self.kind == "random":
            return out * random.random()
        if self.kind == "cache":  # of the last call
            mean, self.cache = self.cache, out.detach()
            return out if mean is None else out + 0.5 * mean
        return out


KINDS = ["counter", "generator", "numpy", "random", "cache"]
METHODS: dict[str, Any] = {
    "exact": lambda: bd.Exact("min"),
    "exact, a budget": lambda: bd.Exact("8KiB"),
    "recompute": bd.SymplecticAdjoint,
    "stored": lambda: bd.SymplecticAdjoint("stored"),
    "continuous": bd.ContinuousAdjoint,
    "deis": lambda: bd.AdjointDEIS(2, "M"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_whole_runs_notice_it(method: str, kind: str) -> None:
    with pytest.raises(StateChangedError, match=f"a call of Hidden {SAYS}.*counter of its calls.*Plain"):
        toy_run(METHODS[method](), Hidden(ToyNetwork(), kind))


@pytest.mark.parametrize("solver", [bd.McCallumFoster(bd.Heun()), bd.EDICT(), bd.ReversibleHeun()], ids=repr)
def test_reversible_runs_notice_it_at_the_end_that_they_know(solver: Any) -> None:
    with pytest.raises(StateChangedError, match=SAYS):
        toy_run(bd.Reversible(), Hidden(ToyNetwork(), "counter"), solver)
    toy_run(bd.Reversible(), Hidden(ToyNetwork(), "nothing"), solver)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_each_half_of_a_guided_call_is_looked_at(scale: float) -> None:
    settings = {"guidance_scale": scale, "uncond": None if scale == 1 else toy_inputs()[1]}
    with pytest.raises(StateChangedError, match=SAYS):
        toy_run(bd.Exact("min"), Hidden(ToyNetwork(), "counter"), **settings)
    toy_run(bd.Exact("min"), Hidden(ToyNetwork(), "nothing"), **settings)


@pytest.mark.parametrize("gradient", [bd.Plain(), bd.Exact("max")], ids=repr)
def test_what_redoes_nothing_raises_nothing(gradient: Any) -> None:
    toy_run(gradient, Hidden(ToyNetwork(), "counter"))


def test_a_kept_call_is_redone_by_a_second_backward_pass() -> None:
    x, cond = toy_inputs()
    model = toy_denoiser(Hidden(ToyNetwork(), "counter"))
    x0 = bd.sample(model, x.requires_grad_(), cond, grid=GRID, gradient=bd.Exact("max")).x0.sum()
    x0.backward(retain_graph=True)
    with pytest.raises(StateChangedError, match=SAYS):
        x0.backward()


@pytest.mark.parametrize("through", [bd.Last(2), bd.Steps([1, 3])], ids=repr)
def test_steps_that_carry_the_gradient(through: Any) -> None:
    for kind in ("counter", "nothing"):
        x, cond = toy_inputs()
        network = Hidden(ToyNetwork(), kind)
        model = toy_denoiser(network)
        how = {"solver": bd.Heun(), "grid": GRID, "gradient": bd.Exact("min"), "through": through}
        loss = bd.sample(model, x, cond, **how).x0.sum()
        if kind == "counter":
            with pytest.raises(StateChangedError, match=SAYS):
                loss.backward()
        else:
            loss.backward()
            assert network.inner.scale.grad is not None


# ---- the memory plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", ["min", 400_000])
def test_a_ledger_notices_it_and_names_the_network(memory: Any, kind: str) -> None:
    net, x, cond = problem()
    loss = sample(Hidden(net, kind), x, cond, Ledger(memory)).square().sum()
    with pytest.raises(StateChangedError, match=f'a call of net {SAYS}.*memory="max"'):
        loss.backward()


def test_a_ledger_that_keeps_all_has_nothing_to_notice() -> None:
    for memory in ("max", 10**8):
        net, x, cond = problem()
        sample(Hidden(net, "counter"), x, cond, Ledger(memory)).square().sum().backward()


class Nested(nn.Module):
    """Returns what a pipeline's networks return: dictionaries, tuples, objects that hold tensors."""

    class Held:
        def __init__(self, sample: Tensor) -> None:
            self.sample, self.note = sample, "text"

    def __init__(self, how: str, kind: str) -> None:
        super().__init__()
        self.net, self.how = Hidden(Net(), kind), how

    def forward(self, x: Tensor, cond: Tensor) -> Any:
        first, out = x * 2, self.net(x, cond)
        made = {
            "tuple": (first, [out]),
            "dictionary": {"first": first, "second": {"out": out}},
            "object": (self.Held(first), self.Held(out)),
            "thirty": [first] * 29 + [out],
            "scalar and empty": (first.mean(), first[:0], out),
            "channels last": out.view(1, 8, 16, 16).to(memory_format=torch.channels_last),
            "half": out.half(),
            "complex": torch.complex(out, out),
        }
        return made[self.how]

    def last(self, made: Any) -> Tensor:
        while not isinstance(made, Tensor):
            values = vars(made) if isinstance(made, self.Held) else made
            values = values.values() if isinstance(values, dict) else values
            made = [x for x in values if not isinstance(x, str)][-1]
        return made


@pytest.mark.parametrize(
    "how",
    ["tuple", "dictionary", "object", "thirty", "scalar and empty", "channels last", "half", "complex"],
)
def test_whatever_a_network_returns_is_looked_into(how: str) -> None:
    for kind in ("counter", "nothing"):
        torch.manual_seed(0)
        net = Nested(how, kind)
        if kind == "counter" and how == "half":
            net.net.kind = "numpy"  # a hundredth is within half precision's half of the digits
        x, cond, ledger = torch.randn(64, 32, requires_grad=True), torch.randn(32), Ledger("min")
        loss = sum(
            net.last(ledger.call(net, x, cond, modules=[("net", net)])).abs().float().square().sum()
            for _ in range(3)
        )
        if kind == "counter":
            with pytest.raises(StateChangedError, match=SAYS):
                loss.backward()
        else:
            loss.backward()


def test_another_number_of_tensors_or_shape_is_told() -> None:
    class Growing(nn.Module):
        def __init__(self, deeper: bool) -> None:
            super().__init__()
            self.deeper, self.calls = deeper, 0

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            out = x.exp()
            return [out, *[out.detach()] * self.calls] if self.deeper else [out, torch.ones(self.calls)]

    told = ((True, "it returned 4 tensors where there were 2"), (False, r"shape \(3,\) where it was \(1,\)"))
    for deeper, says in told:
        net, x, ledger = Growing(deeper), torch.ones(8, requires_grad=True), Ledger("min")
        first = ledger.call(net, x, modules=[("net", net)])[0]
        second = ledger.call(net, x, modules=[("net", net)])[0]
        with pytest.raises(StateChangedError, match=says):
            (first + second).sum().backward()


# ---- no alarm at what only rounds -----------------------------------------------------------------------


def test_the_table_of_what_rounding_explains() -> None:
    """Half the digits, in closed form; autocast and coarser settings for float32 count."""
    here = Ambient([])
    for dtypes, digits in (
        ({torch.float64}, 52),
        ({torch.float32, torch.float64, torch.int64}, 23),
        ({torch.float16, torch.float32}, 10),
        ({torch.bfloat16}, 7),
        ({torch.float32, torch.int8}, 7),
        ({torch.float8_e4m3fn}, 7),
    ):
        assert here.spacing(dtypes) == 2.0**-digits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Ambient([]).spacing({torch.float32}) == 2.0**-7
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert Ambient([]).spacing({torch.float32}) == 2.0**-7
        assert Ambient([]).spacing({torch.float64}) == 2.0**-52
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_tolerance_is_where_it_is_said_to_be(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = torch.randn(2, 4, 32, 32, dtype=torch.float64)
    spacing = Ambient([]).spacing({dtype})

    def compare(factor: float) -> None:
        glimpses = [Glimpse.of(x) for x in (out, out * (1 + factor * math.sqrt(spacing)))]
        Repeats().compare(*glimpses, spacing, "net", "nothing")

    compare(0.99)
    with pytest.raises(StateChangedError, match="net did not repeat itself"):
        compare(1.01)


def test_numbers_that_are_not_finite_are_compared_as_they_are() -> None:
    def off(a: list[float], b: list[float], dtype: torch.dtype = torch.float32) -> float:
        first, second = (Glimpse.of(torch.tensor(x, dtype=dtype)) for x in (a, b))
        assert first is not None
        assert second is not None
        return float(first.off(second))

    nan, inf = math.nan, math.inf
    assert off([nan, 1.0, inf, -inf], [nan, 1.0, inf, -inf]) == 0
    assert not off([nan, 1.0], [2.0, 1.0]) <= 1
    assert not off([2.0, 1.0], [nan, 1.0]) <= 1
    assert not off([inf, 1.0], [-inf, 1.0]) <= 1
    assert off([0.0, 0.0], [0.0, 0.0]) == 0
    assert off([0.0, 0.0], [1e-3, 0.0]) > 1
    assert off([1e30, 1e30], [1e30, 2e30]) == pytest.approx(1 / math.sqrt(2), rel=1e-6)
    # The steps between float16's smallest numbers are no digits of theirs.
    assert off([0.0, 6e-8], [6e-8, 0.0], torch.float16) < 0.03


def test_places_are_spread_over_the_tensor_and_do_not_depend_on_its_strides() -> None:
    x = torch.arange(2 * 4 * 32 * 32, dtype=torch.float64).view(2, 4, 32, 32)
    found = Glimpse.of(x)
    assert found is not None
    b, c, i, j = (torch.unique(v) for v in torch.unravel_index(found.entries[0].long(), x.shape))
    assert (len(b), len(c)) == (2, 4)
    assert min(len(i), len(j)) >= 16  # 64 entries: no row or column over and over
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(Glimpse.of(other).entries, found.entries)  # type: ignore[union-attr]
    one = Glimpse.of(torch.tensor([1.0, 2.0, 3.0]))
    assert one is not None
    assert set(one.entries.flatten().tolist()) == {1.0, 2.0, 3.0}


def test_bytes_of_a_call() -> None:
    for output in (torch.randn(1, 4, 64, 64), [torch.randn(9, 9, dtype=torch.float64)] * 40):
        found = Glimpse.of(output)
        assert found is not None
        assert found.entries.untyped_storage().nbytes() <= 1024


@pytest.mark.parametrize("method", ["exact", "recompute", "stored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_dropout_and_autocast_are_no_alarm(dtype: torch.dtype, method: str) -> None:
    x, cond = toy_inputs(torch.float32)
    network = ToyNetwork(dtype=torch.float32, dropout=0.5).train()
    model, gradient = toy_denoiser(network), METHODS[method]()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        solution = bd.sample(model, x.requires_grad_(), cond, solver=bd.RK4(), grid=GRID, gradient=gradient)
    solution.x0.sum().backward()
    assert x.grad is not None


class Layers(nn.Module):
    """A deep network whose even runs add up in another order, as other kernels do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, dtype=dtype) for _ in range(24))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            order = torch.arange(64)
            halves = order.chunk(2) if self.calls % 2 else (order[::2], order[1::2])
            first, second = (x[:, half] @ layer.weight[:, half].T for half in halves)
            moved = first + second
            x = x + nn.functional.silu(nn.functional.layer_norm(moved + layer.bias, (64,)))
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_in_another_order_are_no_alarm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x, ledger = Layers(dtype), torch.randn(16, 64, dtype=dtype, requires_grad=True), Ledger("min")
    first = ledger.call(net, x, modules=[("net", net)])
    assert not torch.equal(net(x), first)  # rounding is seen
    second = ledger.call(net, x, modules=[("net", net)])
    net.calls = 1  # the last one is kept, and the first is redone with even counts
    (first + second).square().sum().backward()
    assert x.grad is not None
