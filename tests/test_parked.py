"""Latents and other arguments of calls that wait in host memory: the same bits, and fewer of them on the device.

The device is the CPU, where copies are made, let go and brought back as on a card. Where bytes are counted, the host's
copies are NumPy arrays, which PyTorch's allocator does not know.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import backdrift as bd
from backdrift import parking
from backdrift.errors import StateChangedError
from backdrift.memory import Ledger, MemoryPlan
from backdrift.pipelines.parts import in_parts
from backdrift.planning.choices import candidates
from small_jobs import PIPELINES, call_of, gradients, measured
from tiny_pipelines import tiny_controlnet, tiny_sd

CALLS, ROWS, WIDTH = 5, 64, 6
ARGUMENT = ROWS * WIDTH * 8


class Traffic:
    """Counts what goes to the host and comes back, and keeps the host's copies where PyTorch does not count them."""

    def __init__(self) -> None:
        self.away = self.back = self.nbytes = 0

    def to_host(self, tensor: torch.Tensor) -> Any:
        self.away += 1
        self.nbytes += tensor.nbytes
        words = tensor.contiguous().view(-1).view(torch.uint8).numpy().copy()
        return words, tensor.shape, tensor.stride(), tensor.dtype

    def to_device(self, kept: Any, device: torch.device) -> torch.Tensor:
        self.back += 1
        words, shape, stride, dtype = kept
        made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return made.copy_(torch.from_numpy(words).view(dtype).view(shape))


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    found = Traffic()
    monkeypatch.setattr(parking, "to_host", found.to_host)
    monkeypatch.setattr(parking, "to_device", found.to_device)
    return found


class Net(nn.Module):
    """Its first layer is trained, so autograd saves the argument itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Linear(WIDTH, 24, dtype=torch.float64),
            nn.Linear(24, WIDTH, dtype=torch.float64),
        )

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x) + text))


class Loop:
    """Five calls of a network and one of a decoder; the calls' arguments are made for them, the text is all calls'."""

    def __init__(self, ledger: Ledger | None, parts: int = 1) -> None:
        torch.manual_seed(0)
        self.net, self.decoder = Net(), nn.Sequential(nn.Linear(WIDTH, 12, dtype=torch.float64), nn.Tanh())
        self.start = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
        self.text = torch.randn(ROWS, 24, dtype=torch.float64, requires_grad=True)
        self.ledger, self.parts = ledger, parts
        self.arguments: list[StorageWeakRef] = []
        self.leaves = [self.start, self.text, *self.net.parameters(), *self.decoder.parameters()]

    def call(self, module: nn.Module, role: Any, *args: torch.Tensor) -> torch.Tensor:
        if self.ledger is None:
            return module(*args)
        return self.ledger.call(module, *args, modules=[("net", module)], role=role)

    def run(self, edited: bool = False) -> torch.Tensor:
        x = self.start
        for _ in range(CALLS):
            given = x * 1.5
            self.arguments.append(StorageWeakRef(given.untyped_storage()))
            e = in_parts(
                lambda *a: self.call(self.net, "network part", *a),
                lambda *a: self.call(self.net, "network", *a),
                self.parts,
                (given, self.text),
                {},
            )
            x = x + 0.3 * e
            if edited:
                given.detach().add_(1)
            del given
        return self.call(self.decoder, "decoder", x).square().sum()

    def gradients(self) -> list[torch.Tensor]:
        return list(torch.autograd.grad(self.run(), self.leaves))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("keep", [0, 2, CALLS])
def test_arguments_of_calls_that_are_not_kept_wait_on_the_host(
    keep: int, parts: int, traffic: Traffic
) -> None:
    plain = Loop(Ledger(MemoryPlan("keep", keep=keep)), parts)
    expected = plain.gradients()
    assert traffic.away == 0
    loop = Loop(Ledger(MemoryPlan("keep", keep=keep, park=True)), parts)
    loss = loop.run()
    gone = CALLS - keep
    assert traffic.away == gone * parts  # the text, which all calls have, is not among them
    assert traffic.nbytes == gone * ARGUMENT
    assert [ref.expired() for ref in loop.arguments] == [i < gone for i in range(CALLS)]
    assert loop.ledger is not None
    text, decoder = ROWS * 24 * 8, ARGUMENT
    assert loop.ledger._holdings.arguments == keep * ARGUMENT + text + decoder
    assert all(map(torch.equal, torch.autograd.grad(loss, loop.leaves), expected))
    # Once for the call and once for the weight's gradient, unless the first is still there.
    assert gone * parts <= traffic.back <= 2 * gone * parts
    assert loop.ledger.stats.calls_redone == gone


def test_they_come_back_for_a_second_pass_and_for_second_derivatives(traffic: Traffic) -> None:
    loop, plain = Loop(Ledger(MemoryPlan("keep", keep=0, park=True))), Loop(None)
    loss, known = loop.run(), plain.run()
    for _ in range(2):
        found = torch.autograd.grad(loss, loop.leaves, retain_graph=True)
        true = torch.autograd.grad(known, plain.leaves, retain_graph=True)
        assert all(map(torch.equal, found, true))
    twice = []
    for which, value in ((loop, loss), (plain, known)):
        (first,) = torch.autograd.grad(value, which.start, create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), which.start)[0])
    assert torch.allclose(*twice, rtol=1e-12, atol=0)
    assert traffic.away >= CALLS  # a backward pass may send what it has come past, the decoder's too


def test_an_argument_that_is_edited_before_it_can_be_parked_is_noticed(traffic: Traffic) -> None:
    loss = Loop(Ledger(MemoryPlan("keep", keep=0, park=True))).run(edited=True)
    assert traffic.away == 0
    with pytest.raises(StateChangedError, match="modified in place"):
        loss.backward()


def test_what_has_other_strides_as_a_copy_or_is_the_users_own_stays() -> None:
    x = torch.randn(32, 16, requires_grad=True)
    assert parking.parkable(x * 2)
    assert parking.parkable((x * 2).t())  # dense, in another order
    assert not parking.parkable(x)
    assert not parking.parkable((x * 2)[:, ::2])
    assert not parking.parkable((x[:1] * 2).expand(32, 16))
    assert not parking.parkable(x[0] * 2)
    parked = parking.Parked((x * 2).t())
    again = parked.argument()
    assert (again.shape, again.stride(), again.requires_grad, again.is_leaf) == (
        (16, 32),
        (1, 16),
        True,
        False,
    )
    assert torch.equal(again, (x * 2).t())
    whole = torch.arange(512.0).reshape(4, 128)
    parked = parking.Parked(whole[1:3])
    view = parked.view(whole[2, 3:9])
    assert view is not None
    assert torch.equal(view.tensor(), whole[2, 3:9])
    assert parked.view(whole[2:4]) is None
    assert parked.view(whole[0]) is None
    assert parked.view(whole[1].view(torch.int32)) is None


# ---------------------------------------------------------------------------- on pipelines

CHOICES = [
    bd.Choices(keep=0, latents="cpu"),
    bd.Choices(keep=1, network="block", decoder="block", latents="cpu"),
    bd.Choices(keep=0, guidance="apart", latents="cpu"),
]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_give_the_same_bits(name: str, traffic: Traffic) -> None:
    pipe = PIPELINES[name]()
    call = call_of(pipe, 3, side=16)
    train = "unet" if hasattr(pipe, "unet") else "transformer"
    for choices in CHOICES:
        known, _ = gradients(pipe, call, memory=replace(choices, latents="device"), train=train)
        assert traffic.away == 0
        found, run = gradients(pipe, call, memory=choices, train=train)
        assert all(map(torch.equal, found, known)), choices
        # Flux is called with the user's own noise first, which is there anyway.
        assert traffic.away >= run.stats.calls_redone - (name == "flux") > 0
        assert traffic.back >= traffic.away
        traffic.away = traffic.back = 0


def test_a_control_networks_outputs_wait_too(traffic: Traffic) -> None:
    pipe = tiny_controlnet()
    call = call_of(pipe, 2, side=8, image=torch.rand(1, 3, 16, 16))
    known, _ = gradients(pipe, call, memory=bd.Choices(keep=0))
    found, run = gradients(pipe, call, memory=bd.Choices(keep=0, latents="cpu"))
    assert torch.equal(found[0], known[0])
    assert traffic.away > run.stats.calls_redone


def test_steps_that_carry_no_gradient_have_nothing_to_send(traffic: Traffic) -> None:
    pipe = tiny_sd()
    call = call_of(pipe, 4, side=16)
    for through in ("steps:1,3", "all"):
        known, _ = gradients(pipe, call, memory=bd.Choices(keep=0), through=through)
        found, run = gradients(pipe, call, memory=bd.Choices(keep=0, latents="cpu"), through=through)
        assert torch.equal(found[0], known[0])
        assert traffic.away == run.stats.calls_redone
        traffic.away = 0


JOBS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "flux": (PIPELINES["flux"], 120, {}),
    "control": (tiny_controlnet, 8, {"image": torch.rand(1, 3, 64, 64)}),
}


@pytest.mark.parametrize(("name", "keep"), [("flux", 0), ("control", 0), ("control", 2)])
def test_the_bytes_on_the_device_are_those_planned(name: str, keep: int, traffic: Traffic) -> None:
    build, steps, more = JOBS[name]
    pipe = build()
    call = call_of(pipe, steps, **more)
    choices = bd.Choices(keep=keep, network="resnet", decoder="resnet")
    plans = [bd.plan(pipe, **call, choices=replace(choices, latents=where)) for where in ("device", "cpu")]
    here, there = (plan.peak - plan.job.weights for plan in plans)
    assert there < 0.8 * here  # so that the figure below can tell them apart
    assert there == pytest.approx(measured(pipe, call, memory=plans[1]), rel=0.1)


def test_it_is_weighed_where_there_is_another_place() -> None:
    job = bd.plan(tiny_sd(), 32, 32, 3).job
    found = {(c.latents, c.weights) for c in candidates(job, offload=False, park=True)}
    assert found == {("device", "device"), ("cpu", "device")}
    assert {c.latents for c in candidates(job, offload=False)} == {"device"}
    least = bd.plan(tiny_sd(), 32, 32, 3).least.needs.peak
    _, run = gradients(tiny_sd(), call_of(tiny_sd(), 3, side=16), memory=least)
    assert run.plan is not None
    assert run.plan.choices.latents == "device"  # on a CPU there is none
