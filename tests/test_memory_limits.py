"""The memory plan at its ends: a decoder beside the last network call under "min", and a budget that is too small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backdrift.errors import BudgetError
from backdrift.memory import Ledger
from live_bytes import LiveBytes

CALLS = 5


class Counted(nn.Module):
    """A layer stack with weights of ``width²`` numbers a layer; counts the times it is really run."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Run:
    """``CALLS`` network calls and a decoder after them, under a ledger or (None) plainly."""

    def __init__(self, *, trained: bool, rows: int = 64, width: int = 256) -> None:
        torch.manual_seed(0)
        self.network, self.decoder = Counted(width, 4), Counted(width, 2)
        self.network.requires_grad_(trained)
        self.decoder.requires_grad_(False)
        self.x = torch.randn(rows, width, requires_grad=True)

    def sample(self, ledger: Ledger | None, role: str = "decoder") -> torch.Tensor:
        x = self.x
        for _ in range(CALLS):
            out = self.network(x) if ledger is None else ledger.call(self.network, x, modules=self.modules)
            x = x - 0.1 * out
        if ledger is None:
            return self.decoder(x)
        picture = ledger.call(self.decoder, x, modules=[("decoder", self.decoder)], role=role)  # type: ignore[arg-type]
        ledger.finish()
        return picture

    @property
    def modules(self) -> list[tuple[str, nn.Module]]:
        return [("network", self.network)]

    def gradients(self, ledger: Ledger | None, role: str = "decoder") -> list[torch.Tensor | None]:
        leaves = [self.x, *self.network.parameters()]
        for leaf in leaves:
            leaf.grad = None
        self.sample(ledger, role).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    def peak(self, role: str) -> int:
        with LiveBytes() as live:
            self.gradients(Ledger("min"), role)
        return live.peak


def equal(left: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(left, right, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trained", "rows", "kept"),
    [
        (True, 64, 1),  # the weights' gradients outweigh the decoder's activations
        (True, 512, 0),  # the activations outweigh the gradients
        (False, 64, 0),  # there are no gradients whose room the decoder could use
    ],
)
def test_min_keeps_the_last_call_beside_a_decoder_only_where_that_raises_no_peak(
    trained: bool, rows: int, kept: int
) -> None:
    run, ledger = Run(trained=trained, rows=rows), Ledger("min")
    found = run.gradients(ledger)
    assert ledger.stats.calls_kept == kept
    assert ledger.stats.network_calls == run.network.runs == 2 * CALLS - kept
    assert equal(found, run.gradients(None))
    # With another role the decoder drops every call before it: the peak that is promised.
    run.peak("other")  # warms up
    assert run.peak("decoder") <= run.peak("other") + 2 * torch.get_rng_state().nbytes


def test_one_network_call_has_no_gradients_before_it_that_a_decoder_could_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "CALLS", 1)
    run, ledger = Run(trained=True), Ledger("min")
    assert equal(run.gradients(ledger), run.gradients(None))
    assert ledger.stats.network_calls == 2


def test_the_gradient_may_be_taken_twice_beside_a_kept_call() -> None:
    run, ledger = Run(trained=True), Ledger("min")
    loss = run.sample(ledger).square().sum()
    first = torch.autograd.grad(loss, run.x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, run.x)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, torch.autograd.grad(run.sample(None).square().sum(), run.x)[0])


def least(run: Run, budget: int) -> int:
    with pytest.raises(BudgetError, match="smallest budget that works is") as error:
        run.gradients(Ledger(budget, defer=True))
    return int(str(error.value).split("smallest budget that works is")[1].split("(")[1].split(" ")[0])


@pytest.mark.parametrize("trained", [True, False])
def test_a_refused_run_makes_one_call_of_each_kind_and_names_what_the_whole_run_needs(trained: bool) -> None:
    run = Run(trained=trained)
    needed = least(run, 1)
    assert (run.network.runs, run.decoder.runs) == (1, 1)
    assert equal(run.gradients(Ledger(needed, defer=True)), run.gradients(None))
    run.network.runs = 0
    assert least(run, int(0.98 * needed)) == needed  # named the same wherever the shortage begins


def test_a_decoder_that_does_not_fit_is_refused_by_the_same_figure() -> None:
    run = Run(trained=False)
    run.decoder = Counted(256, 40)
    run.decoder.requires_grad_(False)
    needed = least(run, 1)
    run.network.runs = run.decoder.runs = 0
    assert least(run, int(0.9 * needed)) == needed
    assert (run.network.runs, run.decoder.runs) == (CALLS, 1)
    assert equal(run.gradients(Ledger(needed, defer=True)), run.gradients(None))


def test_what_a_run_stumbles_over_after_a_shortage_does_not_hide_it() -> None:
    run = Run(trained=False)

    def sample(ledger: Ledger, stumble: bool = True) -> None:
        with ledger.run():
            ledger.call(run.network, run.x, modules=run.modules)
            if stumble:
                raise ValueError("the pipeline's own")

    with pytest.raises(BudgetError, match="smallest budget that works") as caught:
        sample(Ledger(1, defer=True))
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(BudgetError):
        sample(Ledger(1, defer=True), stumble=False)
    with pytest.raises(ValueError, match="own"):
        sample(Ledger("min", defer=True))


def test_the_run_goes_on_with_outputs_of_its_own_after_a_shortage() -> None:
    run, seen = Run(trained=False), []

    def in_place(x: torch.Tensor) -> torch.Tensor:
        out = run.network(x)
        seen.append(out)
        return out

    ledger, x = Ledger(1, defer=True), run.x
    outs = [ledger.call(in_place, x, modules=run.modules) for _ in range(3)]
    assert len(seen) == 1
    outs[1].zero_()  # what a scheduler may do with an output must not show in the next one
    assert torch.equal(outs[2], seen[0])
    with pytest.raises(BudgetError):
        ledger.finish()
