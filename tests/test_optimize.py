"""The optimisation loop against closed forms, its refusals, and the same bits after a kill."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import killed_run
from backdrift import optimize
from backdrift.descent.best import BestSoFar
from backdrift.descent.measure import Measured
from backdrift.descent.variables import gaussian_prior
from backdrift.errors import (
    BudgetError,
    InputError,
    MissingGradientError,
    NonFiniteError,
    UnsupportedError,
)
from backdrift.run import Run
from linear_pipeline import linear_pipeline, picture_matrix, start
from tiny_pipelines import noise_for, tiny_sd, tiny_sd3, tiny_sdxl

TARGET = 0.3


def distance(images: Tensor) -> Tensor:
    return (images - TARGET).square().flatten(1).sum(1)


def descend(pipe: Any, out: Path, loss: Any = distance, **kwargs: Any) -> Run:
    given = {"num_inference_steps": 2, "steps": 3, "progress": False} | kwargs
    return optimize(pipe, given.pop("prompt", "a 2"), loss, out=out, **given)


# -- known answers ------------------------------------------------------------------------------------------


def test_gradient_descent_on_the_noise_is_the_closed_form(tmp_path: Path) -> None:
    """x_{j+1} = x_j - lr Mᵀ(M x_j/2 + 1/2 - t), every sample as if it were alone."""
    pipe, noise, lr = linear_pipeline(), start(3), 0.4
    matrix = picture_matrix(pipe, 2)
    run = descend(pipe, tmp_path / "a", noise=noise, batch_size=3, steps=6, optimizer="sgd", lr=lr)
    x, losses = noise.double(), []
    for _ in range(7):
        image = torch.einsum("ij,njhw->nihw", matrix, x) / 2 + 0.5
        losses.append((image - TARGET).square().flatten(1).sum(1))
        last = x
        x = x - lr * torch.einsum("ji,njhw->nihw", matrix, image - TARGET)
    assert torch.allclose(run.best.tensors["noise"].double(), last, rtol=0, atol=2e-6)
    assert torch.allclose(run.best.images.double(), image, rtol=0, atol=2e-6)
    recorded = torch.tensor([entry["per_sample"] for entry in run.record["iterations"]], dtype=torch.float64)
    assert torch.allclose(recorded, torch.stack(losses), rtol=1e-5)
    assert run.best.loss == pytest.approx(losses[-1].mean().item(), rel=1e-5)
    first = run.record["iterations"][0]
    gradient = torch.einsum(
        "ji,njhw->nihw", matrix, torch.einsum("ij,njhw->nihw", matrix, noise.double()) / 2 + 0.2
    )
    assert first["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_gradient_descent_on_weights_is_the_closed_form_and_the_pipeline_comes_back(tmp_path: Path) -> None:
    """One step: the picture is (x - W x/4)/2 + 1/2, so dL/dW = -1/4 · mean over samples of Σ (image - t) xᵀ."""
    pipe, noise, lr = linear_pipeline(), start(2), 0.01
    before = pipe.unet.weight.detach().clone()
    kwargs = {
        "over": "unet",
        "noise": noise,
        "batch_size": 2,
        "num_inference_steps": 1,
        "optimizer": "sgd",
        "lr": lr,
    }
    run = descend(pipe, tmp_path / "a", steps=1, **kwargs)
    image = torch.einsum("ij,njhw->nihw", picture_matrix(pipe, 1), noise.double()) / 2 + 0.5
    gradient = -0.25 * torch.einsum("nihw,njhw->ij", image - TARGET, noise.double()) / 2
    assert run.record["best"]["iteration"] == 1
    assert torch.allclose(run.best.tensors["unet.weight"].double(), before - lr * gradient, rtol=0, atol=1e-6)
    assert torch.equal(pipe.unet.weight, before)
    assert pipe.unet.weight.grad is None


def test_adamw_follows_torch_s_own(tmp_path: Path) -> None:
    pipe, noise = linear_pipeline(), start()
    kwargs = {"optimizer_kwargs": {"weight_decay": 0.1}, "lr_schedule": "cosine", "clip_grad": 0.7}
    run = descend(pipe, tmp_path / "a", noise=noise, steps=4, lr=0.1, **kwargs)
    matrix, x = picture_matrix(pipe, 2), noise.double().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=0.1, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.zero_grad()
        distance(torch.einsum("ij,njhw->nihw", matrix, x) / 2 + 0.5).sum().backward()
        torch.nn.utils.clip_grad_norm_([x], 0.7)
        optimizer.step()
        schedule.step()
    assert torch.allclose(run.best.tensors["noise"].double(), x.detach(), rtol=0, atol=2e-6)
    assert [entry["lr"] for entry in run.record["iterations"]] == pytest.approx([*rates, 0.0])


def test_chunks_and_company_do_not_change_a_sample_s_path(tmp_path: Path) -> None:
    pipe, noise = linear_pipeline(), start(3)
    whole = descend(pipe, tmp_path / "a", noise=noise, batch_size=3, clip_grad=0.5)
    parts = descend(pipe, tmp_path / "b", noise=noise, batch_size=3, clip_grad=0.5, chunk=2)
    alone = descend(pipe, tmp_path / "c", noise=noise[1:2], clip_grad=0.5)
    assert torch.allclose(whole.best.tensors["noise"], parts.best.tensors["noise"], rtol=0, atol=1e-6)
    assert torch.allclose(whole.best.tensors["noise"][1:2], alone.best.tensors["noise"], rtol=0, atol=1e-6)


def test_a_budget_leaves_room_for_the_loss(tmp_path: Path) -> None:
    class Heavy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3 * 16 * 16, 10_000)  # 31 MB

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images.flatten(1)).square().mean(1)

    light = descend(tiny_sd(), tmp_path / "light", steps=1, num_inference_steps=2, memory="20MB")
    assert light.finished
    with pytest.raises(BudgetError, match=r"smallest budget that works is .* needed at the loss"):
        descend(tiny_sd(), tmp_path / "heavy", Heavy(), steps=1, num_inference_steps=2, memory="20MB")


def test_the_prior_is_the_chi_density_s_and_pulls_the_norm_to_it(tmp_path: Path) -> None:
    noise = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.7
    r = noise.norm(dim=1)
    log_p = 29 * r.log() - r.square() / 2 - 14 * math.log(2) - math.lgamma(15)
    best = 29 * math.log(math.sqrt(29)) - 14.5 - 14 * math.log(2) - math.lgamma(15)
    assert torch.allclose(gaussian_prior(noise), best - log_p, rtol=1e-12)
    # A loss that hardly pulls: the prior alone brings the norm from 1.5 times to sqrt(d - 1).
    pipe, wide = linear_pipeline(), start() * 1.5
    run = descend(
        pipe,
        tmp_path / "a",
        lambda x: 1e-6 * distance(x),
        noise=wide,
        noise_prior=1.0,
        optimizer="sgd",
        lr=0.4,
        steps=30,
    )
    assert run.best.tensors["noise"].norm().item() == pytest.approx(math.sqrt(wide.numel() - 1), rel=1e-4)
    assert run.record["iterations"][0]["prior"] == pytest.approx(gaussian_prior(wide).item(), rel=1e-5)


def test_the_best_of_every_sample_is_kept() -> None:
    best = BestSoFar()
    scores = torch.tensor([[3.0, 1.0], [2.0, 5.0], [4.0, 0.5]])
    for i, row in enumerate(scores):
        values = {"noise": torch.full((2, 3), float(i))}
        found = Measured(torch.full((2, 3, 4, 4), float(i)), row, {}, torch.tensor([i == 1, i == 1]))
        best.offer(i, values, found, row, row)
    assert best.iterations.tolist() == [1, 2]
    assert best.flagged.tolist() == [True, False]
    assert best.values["noise"][:, 0].tolist() == best.images[:, 0, 0, 0].tolist() == [1.0, 2.0]
    assert best.record(False)["per_sample"] == [{"iteration": 1, "loss": 2.0}, {"iteration": 2, "loss": 0.5}]
    assert best.loss == 1.25


def test_a_sample_that_is_good_enough_is_kept_as_it_is() -> None:
    best = BestSoFar(enough=1.0)
    scores = torch.tensor([[3.0, 1.0], [1.5, 0.2], [0.9, 0.1], [0.3, 2.0]])
    for i, row in enumerate(scores):
        found = Measured(torch.full((2, 3, 4, 4), float(i)), row, {}, torch.tensor([False, False]))
        best.offer(i, {"noise": torch.full((2, 3), float(i))}, found, row, row)
    assert best.iterations.tolist() == [2, 0]
    assert best.images[:, 0, 0, 0].tolist() == [2.0, 0.0]
    assert best.scores.tolist() == pytest.approx([0.9, 1.0])


def test_the_heldout_score_decides_what_is_best_and_when_to_stop(tmp_path: Path) -> None:
    """The loss falls throughout; the held-out score has its minimum at iteration 2."""
    pipe, seen = linear_pipeline(), []

    def judge(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.full((len(images),), abs(len(seen) - 1 - 2.0))

    run = descend(pipe, tmp_path / "a", noise=start(), heldout=judge, patience=3, steps=20)
    assert run.record["status"] == "stopped early"
    assert "no improvement in 3 iterations" in run.record["message"]
    assert [e["heldout"] for e in run.record["iterations"]] == [2, 1, 0, 1, 2, 3]
    assert run.record["best"]["iteration"] == 2
    assert torch.equal(run.best.images, seen[2])
    losses = [e["loss"] for e in run.record["iterations"]]
    assert losses == sorted(losses, reverse=True)


def test_enough_stops_at_the_first_score_that_is_small_enough(tmp_path: Path) -> None:
    pipe, noise = linear_pipeline(), start()
    whole = descend(pipe, tmp_path / "a", noise=noise, steps=8)
    limit = whole.record["iterations"][5]["loss"]
    run = descend(pipe, tmp_path / "b", noise=noise, steps=8, enough=limit)
    assert len(run.record["iterations"]) == 6
    assert run.best.loss == limit


def test_a_minibatch_goes_through_every_example_once_an_epoch(tmp_path: Path) -> None:
    pipe = linear_pipeline()
    run = descend(
        pipe,
        tmp_path / "a",
        prompt=["a", "b", "c"],
        over="unet",
        noise=start(3),
        minibatch=2,
        steps=6,
        lr=1e-3,
    )
    batches = [entry["examples"] for entry in run.record["iterations"]]
    assert [len(b) for b in batches] == [2, 1, 2, 1, 2, 1, 2]
    for epoch in range(3):
        assert sorted(batches[2 * epoch] + batches[2 * epoch + 1]) == [0, 1, 2]
    assert len({str(b) for b in batches}) > 2  # shuffled afresh
    assert run.best.images.shape[0] == 3
    with torch.no_grad():  # the pictures and the loss of the best are those of all examples
        pipe.unet.weight.copy_(run.best.tensors["unet.weight"])
    image = torch.einsum("ij,njhw->nihw", picture_matrix(pipe, 2), start(3).double()) / 2 + 0.5
    assert run.best.loss == pytest.approx(distance(image).mean().item(), rel=1e-5)


def test_prompts_reach_a_loss_that_wants_them(tmp_path: Path) -> None:
    got = []

    def loss(images: Tensor, prompts: list[str]) -> Tensor:
        got.append(list(prompts))
        return distance(images)

    descend(linear_pipeline(), tmp_path / "a", loss, prompt=["x", "y"], noise=start(2), steps=1)
    assert got == [["x", "y"], ["x", "y"]]


# -- every kind of variable on real pipelines ---------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3, tiny_sdxl])
@pytest.mark.parametrize("over", ["noise", "prompt_embeds"])
def test_first_step_is_minus_lr_times_plain_autograd_s_gradient(tmp_path: Path, make: Any, over: str) -> None:
    pipe, lr = make(), 0.5
    noise = noise_for(pipe)
    run = descend(pipe, tmp_path / "a", noise=noise, over=over, optimizer="sgd", lr=lr, steps=1, resume=False)
    assert run.record["best"]["iteration"] == 1
    from backdrift.descent.subject import encode_prompt

    embeds = {k: v.detach() for k, v in encode_prompt(pipe, ["a 2"]).items()}
    leaf = (noise if over == "noise" else embeds["prompt_embeds"]).clone().requires_grad_()
    call = {"latents": noise, **embeds} | {("latents" if over == "noise" else "prompt_embeds"): leaf}
    call |= {"num_inference_steps": 2, "output_type": "pt"}
    pipe.image_processor.config.do_normalize  # noqa: B018  (the decoded range is [-1, 1])
    pipe.image_processor.denormalize = lambda x: x / 2 + 0.5  # unclamped
    with torch.enable_grad():
        images = type(pipe).__call__.__wrapped__(pipe, **call).images
        (gradient,) = torch.autograd.grad(distance(images).sum(), leaf)
    assert torch.allclose(run.best.tensors[over], leaf.detach() - lr * gradient, rtol=0, atol=1e-6)


def test_a_new_lora_is_exported_for_diffusers_and_removed(tmp_path: Path) -> None:
    pipe = tiny_sd()
    names = [k for k, _ in pipe.unet.named_parameters()]
    run = descend(pipe, tmp_path / "a", over="lora", rank=2, lr=0.05, steps=3)
    assert [k for k, _ in pipe.unet.named_parameters()] == names
    assert run.best.loss < run.record["iterations"][0]["loss"]
    other = tiny_sd()
    other.load_lora_weights(str(run.folder / "lora"))
    from backdrift import differentiable, noise

    with differentiable(other), torch.no_grad():
        images = other("a 2", latents=noise(other), num_inference_steps=2).images
    assert torch.equal(images, run.best.images)


def test_a_lora_needs_a_lora(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="carries no active LoRA"):
        descend(tiny_sd(), tmp_path / "a", over="lora")
    with pytest.raises(InputError, match="rank=2"):
        descend(tiny_sd(), tmp_path / "a", over="noise", rank=2)


def with_loras(active: list[str], weights: list[float]) -> Any:
    """Two adapters, "ours" on fewer layers than a new one gets."""
    from peft import LoraConfig

    pipe = tiny_sd()
    torch.manual_seed(5)
    for name, layers in (("first", ["to_q", "to_v"]), ("ours", ["to_k"])):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False)
        pipe.unet.add_adapter(config, adapter_name=name)
    pipe.set_adapters(active, weights)
    return pipe


def adapters_of(pipe: Any) -> list[Any]:
    """Everything about the UNet that an adapter can change."""
    layers = [m for m in pipe.unet.modules() if hasattr(m, "merged_adapters")]
    return [
        [(k, p.requires_grad, p.tolist()) for k, p in pipe.unet.named_parameters()],
        [(m.active_adapters, m.disable_adapters, m.scaling) for m in layers],
        list(pipe.unet.peft_config),
    ]


def test_the_active_adapters_are_trained_and_each_is_exported(tmp_path: Path) -> None:
    from backdrift import differentiable, noise

    one = descend(with_loras(["ours"], [0.7]), tmp_path / "one", over="lora", lr=0.05)
    assert one.best.tensors
    assert all(".ours." in name for name in one.best.tensors)  # the other one is loaded, and not active
    assert list(one.record["files"]) == ["lora"]
    both = descend(with_loras(["first", "ours"], [0.3, 0.7]), tmp_path / "both", over="lora", lr=0.05)
    assert {name.split(".")[-2] for name in both.best.tensors} == {"first", "ours"}
    other = tiny_sd()
    for name in ("first", "ours"):
        other.load_lora_weights(str(both.folder / "lora" / name), adapter_name=name)
    other.set_adapters(["first", "ours"], [0.3, 0.7])
    with differentiable(other), torch.no_grad():
        images = other("a 2", latents=noise(other), num_inference_steps=2).images
    torch.testing.assert_close(images, both.best.images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_new_lora_beside_others_leaves_them_active_and_goes_without_a_trace(
    tmp_path: Path, disabled: bool
) -> None:
    from backdrift import differentiable, noise

    pipe = with_loras(["first", "ours"], [0.3, 0.7])
    if disabled:
        pipe.disable_lora()
    before = adapters_of(pipe)
    with differentiable(pipe), torch.no_grad():
        images = pipe("a 2", latents=noise(pipe), num_inference_steps=2).images
    run = descend(pipe, tmp_path / "a", over="lora", rank=2, lr=0.05)
    expected = descend(pipe, tmp_path / "noise", steps=0)  # the pipeline as it is
    assert torch.equal(expected.best.images, images)
    assert run.record["iterations"][0]["loss"] == expected.record["iterations"][0]["loss"]
    assert run.best.loss < run.record["iterations"][0]["loss"]
    assert all(".backdrift." in name for name in run.best.tensors)
    assert any(".to_out.0." in name for name in run.best.tensors)
    assert adapters_of(pipe) == before


def test_adapters_that_cannot_be_trained_are_named(tmp_path: Path) -> None:
    pipe = with_loras(["ours"], [0.7])
    pipe.fuse_lora(adapter_names=["ours"])
    for rank in (None, 2):
        with pytest.raises(UnsupportedError, match=r"'ours' is fused.*unfuse_lora"):
            descend(pipe, tmp_path / f"fused {rank}", over="lora", rank=rank)
    pipe = with_loras(["ours"], [0.7])
    pipe.disable_lora()
    with pytest.raises(InputError, match="no active LoRA"):
        descend(pipe, tmp_path / "off", over="lora")
    with pytest.raises(InputError, match="alone, not in a list"):
        descend(pipe, tmp_path / "list", over=["noise", "unet.conv_in.weight"])


# -- the same bits after a kill -----------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the process that is killed: sums over threads may be rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """The record without what the clock or the number of processes decides."""
    record = json.loads(json.dumps(record))
    for name in ("created", "updated"):
        del record[name]
    for entry in record["iterations"]:
        del entry["seconds"]
    del record["stats"]["seconds"], record["settings"]["checkpoint_every"]
    return record


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("over", "every"), [("noise", 2), ("lora", 1)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, over: str, every: int) -> None:
    command = [sys.executable, killed_run.__file__, str(tmp_path / "killed"), over, "2", str(every)]
    died = subprocess.run(command, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    killed = Run.load(tmp_path / "killed")
    assert killed.record["status"] == "running"
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    whole = killed_run.descend(tmp_path / "whole", over)
    killed = killed_run.descend(tmp_path / "killed", over, every=every)
    for name in ("best", "best_images"):
        for key, value in whole.tensors(name).items():
            assert torch.equal(killed.tensors(name)[key], value), (name, key)
    assert timeless(killed.record) == timeless(whole.record)
    for name, entry in whole.record["pictures"].items():
        assert (killed.folder / entry["path"]).read_bytes() == (whole.folder / entry["path"]).read_bytes(), (
            name
        )


def test_a_failure_keeps_what_was_done_and_the_run_goes_on_after_it(tmp_path: Path) -> None:
    pipe, noise = linear_pipeline(), start()
    whole = descend(pipe, tmp_path / "whole", noise=noise)

    def fail(run: Run, entry: dict[str, Any]) -> None:
        if entry["iteration"] == 1:
            raise RuntimeError("the plug was pulled")

    with pytest.raises(RuntimeError, match="plug"):
        descend(pipe, tmp_path / "a", noise=noise, callback=fail)
    record = Run.load(tmp_path / "a").record
    assert (record["status"], record["message"]) == ("failed", "RuntimeError: the plug was pulled")
    assert len(record["iterations"]) == 2
    again = descend(pipe, tmp_path / "a", noise=noise)
    assert timeless(again.record) == timeless(whole.record)
    assert torch.equal(again.best.tensors["noise"], whole.best.tensors["noise"])


def test_a_finished_run_is_returned_without_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, noise = linear_pipeline(), start()
    first = descend(pipe, tmp_path / "a", noise=noise)

    def never(*args: Any) -> Any:
        raise AssertionError("called")

    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.unet), "forward", never)
        again = descend(pipe, tmp_path / "a", noise=noise)
    assert again.record == first.record
    with pytest.raises(InputError, match="steps: 3 there, 4 given"):
        descend(pipe, tmp_path / "a", noise=noise, steps=4)
    other = linear_pipeline()
    with torch.no_grad():
        other.unet.weight.add_(1e-3)
    with pytest.raises(InputError, match="pipeline"):
        descend(other, tmp_path / "a", noise=noise)


@pytest.mark.parametrize("over", ["unet", "lora"])
def test_weights_of_a_compiled_network_are_optimised(tmp_path: Path, over: str) -> None:
    plain, compiled = tiny_sd(), tiny_sd()
    compiled.unet = torch.compile(compiled.unet)
    rank = 2 if over == "lora" else None
    expected = descend(plain, tmp_path / "plain", over=over, rank=rank, steps=2)
    found = descend(compiled, tmp_path / "compiled", over=over, rank=rank, steps=2)
    assert found.best.tensors.keys() == expected.best.tensors.keys()
    assert all(torch.equal(value, expected.best.tensors[k]) for k, value in found.best.tensors.items())


def test_another_set_up_of_the_same_weights_is_another_run(tmp_path: Path) -> None:
    pipe = with_loras(["ours"], [0.7])
    descend(pipe, tmp_path / "a", steps=0)
    descend(pipe, tmp_path / "a", steps=0)
    changes = [
        lambda: pipe.set_adapters(["ours"], [0.6]),
        lambda: pipe.disable_lora(),
        lambda: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda: pipe.vae.enable_tiling(),
        lambda: pipe.unet.train(),
    ]
    for number, change in enumerate(changes):
        change()
        with pytest.raises(InputError, match="pipeline"):
            descend(pipe, tmp_path / "a", steps=0)
        descend(pipe, tmp_path / f"changed {number}", steps=0)


def test_another_target_is_another_run(tmp_path: Path) -> None:
    from backdrift.losses import MSE

    pipe, noise, target = linear_pipeline(), start(), torch.full((3, 8, 8), 0.5)
    descend(pipe, tmp_path / "a", MSE(target), noise=noise, steps=1)
    descend(pipe, tmp_path / "a", MSE(target.clone()), noise=noise, steps=1)
    with pytest.raises(InputError, match="loss_tensors"):
        descend(pipe, tmp_path / "a", MSE(target + 0.1), noise=noise, steps=1)


def test_the_sampler_s_own_noise_is_the_same_in_every_iteration(tmp_path: Path) -> None:
    pipe, torch_state = linear_pipeline(), torch.get_rng_state()
    run = descend(
        pipe, tmp_path / "a", noise=start(2), batch_size=2, lr=1e-12, pipeline_kwargs={"noisy": 0.3}, steps=2
    )
    rows = [entry["per_sample"] for entry in run.record["iterations"]]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][0] != rows[0][1]
    assert torch.equal(torch.get_rng_state(), torch_state)  # the caller's random state is left alone


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda x: torch.ones(len(x), requires_grad=True), InputError, "does not depend on the pictures"),
        (lambda x: distance(x.detach()), InputError, "does not depend on the pictures"),
        (lambda x: x.round().flatten(1).mean(1), InputError, "exactly zero"),
        (lambda x: distance(x).mean(), InputError, "one value per sample"),
        (lambda x: distance(x) / 0, NonFiniteError, "Iteration 0.*NaN or infinity in the loss"),
        (lambda x: (x - x.detach()).abs().sqrt().flatten(1).sum(1), NonFiniteError, "gradient of the loss"),
    ],
)  # fmt: skip
def test_losses_that_cannot_be_descended(
    tmp_path: Path, loss: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        descend(linear_pipeline(), tmp_path / "a", loss, noise=start(2), batch_size=2)
    assert Run.load(tmp_path / "a").record["status"] == "failed"


def test_a_loss_that_blows_up_keeps_the_best_so_far(tmp_path: Path) -> None:
    calls = []

    def loss(images: Tensor) -> Tensor:
        calls.append(1)
        return distance(images) * (float("nan") if len(calls) == 3 else 1.0)

    with pytest.raises(NonFiniteError, match="Iteration 2"):
        descend(linear_pipeline(), tmp_path / "a", loss, noise=start())
    run = Run.load(tmp_path / "a")
    assert run.record["best"]["iteration"] == 1
    assert run.best.loss == run.record["iterations"][1]["loss"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 12}, "height=12"),
        ({"height": 0}, "height=0"),
        ({"prompt": "a 2 a 2 a 2 a 2 a 2"}, "tokens"),
        ({"prompt": []}, "no prompt"),
        ({"steps": -1}, "steps=-1"),
        ({"lr": 0.0}, "lr=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"clip_grad": -1.0}, "clip_grad"),
        ({"optimizer": "adam w"}, "Did you mean 'adamw'"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"optimizer_kwargs": {"nesterovv": True}}, "nesterovv"),
        ({"lr_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"over": "unett"}, "matches no weight"),
        ({"over": "prompt_embeds", "noise_prior": 1.0}, "noise_prior"),
        ({"minibatch": 1}, "minibatch"),
        ({"heldout_prompts": ["b"]}, "heldout_prompts"),
        ({"noise": torch.zeros(2, 4, 8, 8)}, "2 rows for 1"),
        ({"pipeline_kwargs": {"latents": 1}}, "latents"),
        ({"pipeline_kwargs": {"guidance": 1}}, "takes no 'guidance'"),
        ({"loss": "mseee"}, "mseee"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_sampling(
    tmp_path: Path, kwargs: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(type(pipe.unet), "forward", never)
    with pytest.raises(InputError, match=message):
        descend(pipe, tmp_path / "a", **kwargs)


def test_weights_the_pictures_do_not_depend_on_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingGradientError, match=r"vae\.encoder"):
        descend(tiny_sd(), tmp_path / "a", over=["vae.encoder.conv_in.*", "unet.conv_in.*"])
