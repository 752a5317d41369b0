"""A loss on a few pictures at a time: closed forms, refusals, and runs that are planned so."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.descent import Options, variable_for
from backdrift.descent.measure import Measure
from backdrift.descent.subject import make_examples, sampler_call
from backdrift.errors import BudgetError, InputError, MissingGradientError, UnsupportedError
from backdrift.losses import InParts
from backdrift.planning.plan import Plan
from backdrift.planning.timeline import estimate
from live_bytes import LiveBytes
from small_jobs import call_of, gradients
from tiny_pipelines import tiny_sd


def pictures(n: int, side: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.rand(n, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(3))
    return made.requires_grad_()


def square(images: Tensor) -> Tensor:
    return images.square().flatten(1).sum(1)


# ---------------------------------------------------------------------------- the loss alone


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9, None])
def test_values_and_gradient_are_the_closed_form(size: int | None) -> None:
    """``L_i = |x_i|^2``, ``d sum_i c_i L_i / d x_i = 2 c_i x_i``."""
    images, weights = pictures(5), torch.linspace(-1, 2, 5, dtype=torch.float64)
    seen: list[int] = []

    def loss(images: Tensor) -> Tensor:
        seen.append(len(images))
        return square(images)

    values = InParts(loss, size)(images)
    assert torch.allclose(values, square(images), rtol=1e-14)
    (found,) = torch.autograd.grad((weights * values).sum(), images)
    assert torch.allclose(found, 2 * weights.reshape(-1, 1, 1, 1) * images, rtol=1e-14)
    whole = size is None or size >= 5
    checks = [] if whole else [2, 1, 1]  # two pictures together and one by one
    parts = [5] if whole else [min(size or 5, 5 - i) for i in range(0, 5, size or 5)]
    assert seen == checks + parts


def test_each_picture_keeps_its_prompt() -> None:
    def loss(images: Tensor, prompts: Any) -> Tensor:
        return square(images) * torch.tensor([float(p) for p in prompts], dtype=images.dtype)

    images, prompts = pictures(4), ["1", "2", "3", "4"]
    assert torch.allclose(InParts(loss, 1)(images, prompts), loss(images, prompts))
    assert torch.allclose(InParts(loss, 3)(images, "2"), loss(images, ["2"] * 4))


def test_the_graph_of_one_part_is_alive_at_a_time() -> None:
    """Each of ten steps saves as much as a picture, one gradient or two are in flight; the pictures' own stays."""
    n, side = 8, 64
    one = 3 * side * side * 4

    def loss(images: Tensor) -> Tensor:
        for _ in range(10):
            images = images.sin()
        return images.flatten(1).sum(1)

    peaks = []
    for size in (None, 1):
        images, scorer = pictures(n, side, torch.float32), InParts(loss, size)
        torch.autograd.grad(scorer(images).sum(), images)
        with LiveBytes() as live:
            torch.autograd.grad(scorer(images).sum(), images)
        peaks.append(live.peak)
    assert peaks[0] == pytest.approx(11 * n * one, rel=0.05)
    assert peaks[1] == pytest.approx((12 + n) * one, rel=0.05)


def test_what_would_be_another_loss_in_parts_is_refused() -> None:
    def together(images: Tensor) -> Tensor:
        return square(images - images.mean(0, keepdim=True))

    def noisy(images: Tensor) -> Tensor:
        return square(images + 1e-6 * torch.randn_like(images))

    state = torch.get_rng_state()
    with pytest.raises(InputError, match="mixes pictures"):
        InParts(together, 1)(pictures(3))
    with pytest.raises(InputError, match="draws random numbers"):
        InParts(noisy, 1)(pictures(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert InParts(together)(pictures(3)).shape == (3,)


def test_weights_of_the_loss_are_not_left_out_in_silence() -> None:
    layer = nn.Linear(3, 1, dtype=torch.float64)

    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.mean((2, 3)))[:, 0]

    judge = Judge()
    with pytest.raises(MissingGradientError, match=r"shape \(1, 3\).*requires_grad_\(False\)"):
        InParts(judge, 1)(pictures(2))
    judge.requires_grad_(False)
    images = pictures(2)
    (found,) = torch.autograd.grad(InParts(judge, 1)(images).sum(), images)
    assert torch.allclose(found, (layer.weight[0] / 64).reshape(1, 3, 1, 1).expand_as(found), rtol=1e-12)


def test_nothing_is_made_up_where_there_is_no_gradient() -> None:
    def constant(images: Tensor) -> Tensor:
        return images.detach().square().flatten(1).sum(1)

    assert not InParts(constant, 1)(pictures(3)).requires_grad
    with torch.no_grad():
        assert not InParts(square, 1)(pictures(3)).requires_grad
    with pytest.raises(InputError, match="at least 1"):
        InParts(square, 0)


# ---------------------------------------------------------------------------- planned


class Waves(nn.Module):
    """Saves 8 numbers for each of a picture's, 12 times; no scratch memory, no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.linspace(0.5, 2, 8).reshape(1, 1, 8, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, :, None] * self.k
        for _ in range(12):
            x = x.sin()
        return x.flatten(1).mean(1)


SIDE, BATCH, STEPS = 64, 4, 2


class Job:
    """One measurement of `optimize`'s own, over the noise."""

    def __init__(self, memory: Any, loss: Any = None) -> None:
        self.pipe, self.loss = tiny_sd(), Waves() if loss is None else loss
        self.examples = make_examples(self.pipe, ["a 2", "b 7", "c 5", "d 1"], SIDE, SIDE, 0)
        call = sampler_call(self.pipe, SIDE, SIDE, STEPS, None, None)
        self.variable = variable_for("noise", None)
        self.objective = lambda images, chosen: self.loss(images)
        stats = dict.fromkeys(("network_calls", "redone", "vjps", "peak_bytes"), 0)
        self.measure = Measure(
            self.pipe, self.variable, Options(memory=memory, call=call), bd.losses.resolve(self.loss), stats
        )

    def __call__(self, gradient: bool = True) -> Any:
        with self.variable.on(self.pipe, self.examples):
            return self.measure(self.examples, range(BATCH), self.objective, gradient=gradient)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    from backdrift.pipelines import choosing

    made, make = [], choosing.make_plan

    def noted(*args: Any, **kwargs: Any) -> Plan:
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(choosing, "make_plan", noted)
    return made


def tight() -> int:
    """A budget in which four pictures are not scored together, and one is."""
    plan = bd.plan(tiny_sd(), SIDE, SIDE, STEPS, batch=BATCH, loss=Waves(), offload=False)
    assert plan.least.choices.loss == 1
    return int(1.02 * plan.least.needs.peak)


def test_optimize_scores_as_its_plan_says(plans: list[Plan]) -> None:
    known = Job("max")()
    job = Job(tight())
    found = job()
    assert plans[-1].choices.loss == 1
    assert torch.allclose(found.losses, known.losses, rtol=1e-4)
    (ours,), (true,) = found.gradients.values(), known.gradients.values()
    assert torch.allclose(ours, true, rtol=1e-3, atol=1e-4 * true.abs().max().item())
    job.measure(job.examples, range(BATCH), job.objective, gradient=False)
    gc.collect()
    with LiveBytes() as live:
        job()
    assert plans[-1].peak - plans[-1].job.weights == pytest.approx(live.peak, rel=0.1)
    assert plans[-1].chosen.needs.tightest == "loss" or live.peak < plans[-1].plain.needs.peak / 2


def test_a_heldout_loss_is_divided_where_the_loss_is(plans: list[Plan]) -> None:
    job, seen = Job(tight()), []
    job()

    def heldout(images: Tensor, chosen: Any) -> Tensor:
        seen.append(len(images))
        return images.flatten(1).mean(1)

    pictures_ = pictures(BATCH, SIDE, torch.float32).detach()
    for _ in range(2):
        found = job.measure.score(heldout, pictures_, job.examples)
        assert torch.allclose(found, pictures_.flatten(1).mean(1))
    assert seen == [2, 1, 1, *[1] * BATCH, *[1] * BATCH]  # two together and one by one, once

    def mixed(images: Tensor, chosen: Any) -> Tensor:
        return heldout(images - images.mean(0), chosen)

    with pytest.raises(InputError, match=r"The held-out loss cannot be evaluated on a few pictures.*mixes"):
        job.measure.score(mixed, pictures_, job.examples, "held-out loss")
    whole = Job("max")
    whole()
    seen.clear()
    whole.measure.score(heldout, pictures_, whole.examples)
    assert seen == [BATCH]


class Judge(Waves):
    """A held-out loss with 4 MiB of weights that needs ten such for each picture, for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(2**20), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.weights.expand(len(images), 10, -1) * images.mean((1, 2, 3))[:, None, None]
        return rows.mean((1, 2))


def test_a_heldout_loss_is_counted(tmp_path: Path, plans: list[Plan]) -> None:
    """Its weights all the time; what it holds while it scores, when the backward pass has ended, in parts if so."""
    pipe, judge = tiny_sd(), Judge()
    without = bd.plan(pipe, SIDE, SIDE, STEPS, batch=BATCH, loss=Waves(), offload=False)
    job = bd.plan(pipe, SIDE, SIDE, STEPS, batch=BATCH, loss=Waves(), heldout=judge, offload=False).job
    one = 10 * 4 * 2**20
    own = sum(t.nbytes for t in (*judge.parameters(), *judge.buffers()))
    assert job.weights == without.job.weights + own
    for parts, size in ((1, None), (BATCH, 1)):
        found = estimate(job, bd.Choices(loss=size))
        beside = job.weights + job.pictures
        assert found.phases["held-out loss"] - beside == pytest.approx(one * BATCH / parts, rel=0.01)
        before = estimate(without.job, bd.Choices(loss=size)).phases
        assert all(found.phases[name] == nbytes + own for name, nbytes in before.items())
    budget = job.weights + job.pictures + 5 * one // 2
    assert budget > without.plain.needs.peak + own  # all but the held-out loss would fit as it is
    ends = []
    for memory in ("max", budget):
        run = bd.optimize(
            tiny_sd(), ["a 2", "b 7", "c 5", "d 1"], Waves(), height=SIDE, width=SIDE, num_inference_steps=STEPS,
            steps=1, optimizer="sgd", lr=1.0, memory=memory, out=tmp_path / str(memory), heldout=Judge(),
            progress=False,
        )  # fmt: skip
        ends.append([entry["heldout"] for entry in run.record["iterations"]])
    assert plans[-1].choices.loss == 1
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)


def test_a_loss_that_mixes_pictures_is_refused_where_the_plan_would_divide_it() -> None:
    class Mixed(Waves):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images - images.mean(0, keepdim=True))

    with pytest.raises(InputError, match="mixes pictures"):
        Job(tight(), Mixed())()


def test_a_whole_run_in_parts_ends_where_the_undivided_one_does(tmp_path: Path, plans: list[Plan]) -> None:
    ends = []
    for memory in ("max", tight()):
        run = bd.optimize(
            tiny_sd(), ["a 2", "b 7", "c 5", "d 1"], Waves(), height=SIDE, width=SIDE, num_inference_steps=STEPS,
            steps=2, optimizer="sgd", lr=1.0, memory=memory, out=tmp_path / str(memory), progress=False,
        )  # fmt: skip
        ends.append(run.record["iterations"][-1]["per_sample"])
    assert plans[-1].choices.loss == 1
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)
    assert ends[0] != pytest.approx([e["loss"] for e in run.record["iterations"][:1]] * 4, rel=1e-6)


def test_invert_scores_as_its_plan_says(tmp_path: Path, plans: list[Plan]) -> None:
    class OnTargets(Waves):
        def forward(self, images: Tensor, examples: Any = ()) -> Tensor:
            return super().forward(images - torch.stack([e.target for e in examples]).to(images))

    pipe = tiny_sd()
    noises = bd.noise(pipe, height=SIDE, width=SIDE, seed=0, batch_size=BATCH)
    targets = pictures(BATCH, SIDE, torch.float32).detach()
    pairs = [
        bd.recipes.Pair(prompt, target, noise=noise[None])
        for prompt, target, noise in zip(["a 2", "b 7", "c 5", "d 1"], targets, noises, strict=True)
    ]
    norms = []
    for memory in ("max", tight() + targets.nbytes):
        run = bd.invert(
            pipe, pairs, n_slots=2, loss=OnTargets(), height=SIDE, width=SIDE, num_inference_steps=STEPS, steps=1,
            memory=memory, out=tmp_path / str(memory), progress=False,
        )  # fmt: skip
        norms.append(run.record["iterations"][0]["grad_norm"])
    assert plans[-1].job.loss is not None
    assert plans[-1].choices.loss == 1
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_run_divides_only_a_loss_that_can_be(plans: list[Plan]) -> None:
    pipe, budget = tiny_sd(), tight()
    call = call_of(pipe, STEPS, side=SIDE // 2, batch=BATCH)
    with pytest.raises(
        BudgetError, match="smallest budget"
    ):  # the user's own call of the loss is out of reach
        gradients(pipe, call, memory=budget, loss=Waves())
    scorer = InParts(Waves())
    found, run = gradients(pipe, call, lambda images: scorer(images).sum(), memory=budget, loss=scorer)
    assert (run.plan.choices.loss, scorer.size) == (1, 1)
    known, run = gradients(pipe, call, lambda images: scorer(images).sum(), memory=2**40, loss=scorer)
    assert (run.plan.choices.loss, scorer.size) == (None, None)
    assert torch.allclose(found[0], known[0], rtol=1e-3, atol=1e-4 * known[0].abs().max().item())
    with pytest.raises(UnsupportedError, match=r"loss=1 .*InParts"):
        bd.differentiable(pipe, memory=bd.Choices(loss=1), loss=Waves())
    bd.differentiable(pipe, memory=bd.Choices(loss=2), loss=scorer)(**call)
    assert scorer.size == 2
