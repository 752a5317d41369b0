"""Runs on a device other than the CPU (:mod:`card`): ``python on_a_card.py [ROOM or NAME …]``, all without names.

Prints one JSON object: of each check, null or what went wrong. A process of its own, since the device is there for the
whole process once it has been made.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import backdrift as bd
from backdrift import accelerators, nests
from backdrift.pipelines.refusals import undecorated_call
from card import CARD, DEVICE
from problems import ToyNetwork, toy_denoiser, toy_inputs
from tiny_pipelines import PICTURE, embeds_for, noise_for, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

CHECKS: dict[str, Callable[[], None]] = {}
ROOMS: dict[str, list[str]] = {}
STEPS = 2
PIPELINES = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


def check(work: Callable[[], None]) -> Callable[[], None]:
    CHECKS[work.__name__] = work
    return work


def checks(**cases: Any) -> Callable[[Callable[[Any], None]], None]:
    def register(work: Callable[[Any], None]) -> None:
        for name, case in cases.items():
            CHECKS[f"{work.__name__}: {name}"] = lambda case=case: work(case)  # type: ignore[misc]

    return register


def there(nest: Any) -> Any:
    """A copy on the card, requiring grad where the original does."""
    return nests.transform(lambda x: x.detach().to(DEVICE).requires_grad_(x.requires_grad), nest)


def close(left: Any, right: Any, tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        apart = float((a.cpu() - b.cpu()).abs().max()) / (float(b.abs().max()) or 1.0)
        assert apart <= tolerance, f"tensor {i} is {apart:.2g} off"


def room(name: str) -> None:
    """What follows belongs to it."""
    known = [check for found in ROOMS.values() for check in found]
    if ROOMS:
        ROOMS[list(ROOMS)[-1]] = [check for check in CHECKS if check not in known]
    ROOMS[name] = []


# ---- bd.sample -------------------------------------------------------------------------------------------

room("sample")
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (bd.Plain, {}),
    "exact min": (lambda: bd.Exact("min"), {}),
    "exact max": (lambda: bd.Exact("max"), {}),
    "exact auto": (lambda: bd.Exact("auto"), {}),
    "exact bytes": (lambda: bd.Exact("20KiB"), {}),
    "last": (lambda: bd.Exact("min"), {"through": bd.Steps([1, 3])}),
    "multistep": (lambda: bd.Exact("min"), {"solver": bd.AdamsBashforth(2)}),
    "stochastic": (lambda: bd.Exact("min"), {"solver": bd.Ancestral(), "seed": 3}),
    "symplectic": (bd.SymplecticAdjoint, {"solver": bd.RK4()}),
    "symplectic stored": (lambda: bd.SymplecticAdjoint("stored"), {"solver": bd.Heun()}),
    "continuous": (bd.ContinuousAdjoint, {}),
    "continuous recompute": (lambda: bd.ContinuousAdjoint(trajectory="recompute"), {}),
    "continuous adaptive": (lambda: bd.ContinuousAdjoint(bd.AdaptiveDormandPrince(1e-3, 1e-3)), {}),
    "adaptive": (lambda: bd.Exact("min"), {"solver": bd.AdaptiveDormandPrince(1e-3, 1e-3), "grid": None}),
    "deis 1": (lambda: bd.AdjointDEIS(1), {}),
    "deis 2M": (lambda: bd.AdjointDEIS(2, "M"), {}),
    "deis 2S": (lambda: bd.AdjointDEIS(2, "S", r=0.5), {}),
    "deis sde": (lambda: bd.AdjointDEIS(1), {"solver": bd.ExponentialEuler(), "seed": 3}),
    "reversible": (lambda: bd.Reversible(checkpoints=0), {"solver": bd.McCallumFoster(bd.RK4())}),
    "reversible heun": (bd.Reversible, {"solver": bd.ReversibleHeun()}),
}


def gradients(
    gradient: Any, how: dict[str, Any], place: Callable[[Any], Any], dtype: torch.dtype
) -> list[Tensor]:
    x, cond = toy_inputs(dtype)
    cond["prompt"].requires_grad_()
    x, cond = place(x.requires_grad_()), place(cond)
    uncond = place({**toy_inputs(dtype)[1], "prompt": torch.zeros(2, 3, dtype=dtype)})
    network = ToyNetwork().to(dtype)
    if place is there:
        network.to(DEVICE)
    model = toy_denoiser(network, guidance_scale=2.0, uncond=uncond)
    how = {"grid": bd.TimeGrid("logsnr", steps=4), **how}
    solution = bd.sample(model, x, cond, gradient=gradient, **how)
    loss = (solution.x0 * torch.arange(8.0, dtype=dtype, device=x.device).view(2, 4)).sum()
    loss.backward()
    return [solution.x0.detach(), x.grad, cond["prompt"].grad, *(p.grad for p in network.parameters())]


@checks(**METHODS)
def sample(case: tuple[Any, dict[str, Any]]) -> None:
    """Sample and gradients are those of the CPU."""
    made, how = case
    on_card = gradients(made(), how, there, torch.float64)
    close(on_card, gradients(made(), how, lambda x: x, torch.float64), 1e-9)
    assert all(x.device == DEVICE for x in on_card)


@checks(**{k: v for k, v in METHODS.items() if k not in ("continuous adaptive", "adaptive")})
def sample_without_float64(case: tuple[Any, dict[str, Any]]) -> None:
    """The same on a device that has no float64, such as Apple's."""
    made, how = case
    with no_float64():
        on_card = gradients(made(), how, there, torch.float32)
    close(on_card, gradients(made(), how, lambda x: x, torch.float64), 1e-3)


@contextmanager
def no_float64() -> Iterator[None]:
    CARD.float64 = False
    accelerators.WITHOUT_FLOAT64.add(DEVICE.type)
    try:
        yield
    finally:
        CARD.float64 = True
        accelerators.WITHOUT_FLOAT64.discard(DEVICE.type)


@check
def sample_by_times() -> None:
    """The gradient by the grid's times stays on the CPU, where the times are."""
    found = []
    for place in (there, lambda x: x):
        x, cond = (place(v) for v in toy_inputs())
        network = ToyNetwork()
        start = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
        model = toy_denoiser(network.to(x.device))
        grid = bd.TimeGrid("uniform", steps=3, start=start)
        for gradient in (bd.Plain(), bd.Exact("min"), bd.SymplecticAdjoint(), bd.ContinuousAdjoint()):
            solution = bd.sample(model, x, cond, gradient=gradient, grid=grid, solver=bd.Heun())
            found.append(torch.autograd.grad(solution.x0.sum(), start)[0])
    close(found[:4], found[4:], 1e-9)


@check
def dropout_is_drawn_again() -> None:
    """A redone call draws the card's numbers once more, in autograd's own thread, and leaves the generator alone."""
    found = []
    for gradient in (bd.Plain(), bd.Exact("min"), bd.SymplecticAdjoint()):
        torch.manual_seed(5)
        x, cond = (there(v) for v in toy_inputs())
        network = ToyNetwork(dropout=0.5).to(DEVICE).train()
        solution = bd.sample(
            toy_denoiser(network), x.requires_grad_(), cond, gradient=gradient, grid=bd.TimeGrid(steps=3)
        )
        before = CARD.random.get_state()
        solution.x0.square().sum().backward()
        assert torch.equal(CARD.random.get_state(), before), gradient
        found.append([x.grad, *(p.grad for p in network.parameters())])
    close(found[1], found[0], 0.0)
    close(found[2], found[0], 1e-9)


@checks(exact=lambda: bd.Exact("min"), symplectic=lambda: bd.SymplecticAdjoint("stored"))
def hidden_state_is_noticed_without_waiting(made: Any) -> None:
    """Backward passes over 4 and 12 calls read from the card as often; ``backward()`` itself raises."""

    def run(steps: int, growth: float) -> int:
        x, cond = (there(v) for v in toy_inputs())
        network, calls = ToyNetwork().to(DEVICE), []

        def counting(x: Tensor, t: Tensor, c: Any) -> Tensor:
            calls.append(t)
            return network(x, t, c) * (1 + growth * len(calls))

        # What is looked for NaN is read number by number when the pass has ended.
        how = {"grid": bd.TimeGrid(steps=steps), "gradient": made(), "check_finite": False}
        solution = bd.sample(toy_denoiser(counting), x.requires_grad_(), cond, **how)
        CARD.waits = 0
        solution.x0.square().sum().backward()
        return CARD.waits

    assert run(12, 0.0) == run(4, 0.0)
    with pytest.raises(bd.errors.StateChangedError, match=r"a call of counting did not repeat itself.*% off"):
        run(4, 0.01)


# ---- pipelines -------------------------------------------------------------------------------------------

room("pipelines")


def call_of(pipe: Any, device: torch.device = DEVICE) -> dict[str, Any]:
    embeds = {k: v.to(device).requires_grad_() for k, v in embeds_for(pipe).items()}
    noise = noise_for(pipe).to(device).requires_grad_()
    return {**embeds, "latents": noise, "height": PICTURE, "width": PICTURE, "num_inference_steps": STEPS}


def loss_of(images: Tensor) -> Tensor:
    return (images * torch.linspace(-1, 1, images.numel(), device=images.device).view(images.shape)).sum()


def pulled(call: dict[str, Any], images: Tensor) -> list[Tensor]:
    leaves = [x for x in call.values() if isinstance(x, Tensor)]
    grads = torch.autograd.grad(loss_of(images), leaves, allow_unused=True)
    return [
        images.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)),
    ]


@checks(**PIPELINES)
def differentiable(build: Any) -> None:
    """Under every plan the bits of plain autograd on the same device."""
    pipe = build().to(DEVICE)
    call = call_of(pipe)
    plain = pulled(call, undecorated_call(type(pipe))(pipe, **call, output_type="pt").images)
    for memory in ("min", "max", "auto", "1GiB", bd.Choices(keep=0), bd.Choices(keep=1, latents="cpu")):
        with bd.differentiable(pipe, memory=memory, clamp=True) as run:
            images = pipe(**call).images
        assert images.device == DEVICE
        close(pulled(call, images), plain, 0.0)
        assert run.stats.vjps == STEPS


@checks(**PIPELINES)
def decided_by_a_budget(build: Any) -> None:
    """What is planned for in a tight budget runs, with the same gradient."""
    pipe = build().to(DEVICE)
    call = call_of(pipe)
    plain = pulled(call, undecorated_call(type(pipe))(pipe, **call, output_type="pt").images)
    try:
        bd.plan(pipe, PICTURE, PICTURE, STEPS, memory="1KiB", offload=False, **embeds_for(pipe))
        raise AssertionError("1 KiB cannot be enough")
    except bd.errors.BudgetError as error:
        least = int(re.findall(r"\((\d+) bytes\)", str(error))[1])
    budget = int(1.2 * least)
    with bd.differentiable(pipe, memory=budget, clamp=True) as run:
        images = pipe(**call).images
    found = pulled(call, images)
    assert run.plan is not None
    assert run.plan.peak <= budget
    close(found, plain, 1e-5)


@check
def lora() -> None:
    from peft import LoraConfig

    found = []
    for memory in ("max", "min"):
        pipe = tiny_sd()
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        pipe.to(DEVICE)
        with bd.differentiable(pipe, memory=memory, train="lora", through=bd.Last(2)):
            images = pipe("a 2", latents=noise_for(pipe).to(DEVICE), num_inference_steps=3).images
        loss_of(images).backward()
        found.append([p.grad for n, p in pipe.unet.named_parameters() if "lora" in n])
        assert all(g is not None and g.device == DEVICE for g in found[-1])
    close(found[0], found[1], 0.0)


@check
def random_numbers_of_the_device_go_on() -> None:
    """Neither checks nor rehearsals seed the user's generators."""
    pipe = tiny_sd().to(DEVICE)
    torch.manual_seed(11)
    before = CARD.random.get_state(), torch.get_rng_state()
    with bd.differentiable(pipe, memory="1GiB"):
        pipe("a 2", latents=noise_for(pipe).to(DEVICE).requires_grad_(), num_inference_steps=2)
    bd.plan(pipe, PICTURE, PICTURE, 2)
    bd.doctor(pipe, directions=0)
    for state, now in zip(before, (CARD.random.get_state(), torch.get_rng_state()), strict=True):
        assert torch.equal(state, now)


@check
def the_card_is_given_back() -> None:
    """Nothing of a run stays on the card, and its bytes are counted as they were taken."""
    pipe = tiny_sd().to(DEVICE)
    call = call_of(pipe)
    gc.collect()
    before = CARD.allocated
    for memory in ("min", "max"):
        with bd.differentiable(pipe, memory=memory) as run:
            images = pipe(**call).images
        pulled(call, images)
        del images, run
        gc.collect()
        assert CARD.allocated == before, (memory, CARD.allocated - before)


@check
def no_waiting_in_the_loop() -> None:
    """Beyond what the pipeline asks for itself, no step reads numbers from the card."""
    pipe = tiny_sd().to(DEVICE)

    def waits(steps: int, ours: bool) -> int:
        call = {**call_of(pipe), "num_inference_steps": steps}
        CARD.waits = 0
        if ours:
            with bd.differentiable(pipe, memory="min", clamp=True):
                images = pipe(**call).images
        else:
            images = undecorated_call(type(pipe))(pipe, **call, output_type="pt").images
        pulled(call, images)
        return CARD.waits

    waits(2, True)
    assert waits(6, True) - waits(2, True) <= waits(6, False) - waits(2, False)


# ---- what is built on them -------------------------------------------------------------------------------

room("above")


@checks(noise="noise", embeddings="prompt_embeds", lora="lora")
def optimize(over: str) -> None:
    """Runs to its end, and its record names the card."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        run = bd.optimize(
            tiny_sd().to(DEVICE), "a 2", lambda images: (images - torch.rand_like(images)).square().mean((1, 2, 3)),
            over=over, num_inference_steps=2, steps=2, batch_size=2, out=out, progress=False,
            rank=2 if over == "lora" else None,
        )  # fmt: skip
        assert run.record["status"] == "finished", run.record["message"]
        assert run.record["machine"]["device"] == "a card in software"


@check
def doctor() -> None:
    found = bd.doctor(tiny_sd().to(DEVICE), directions=1)
    wrong = [row for row in found.rows if row.status in ("failed", "refused", "skipped")]
    assert not wrong, "\n".join(map(str, wrong))


@check
def doctor_of_lora() -> None:
    from peft import LoraConfig

    pipe = tiny_sd3()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    found = bd.doctor(
        pipe.to(DEVICE), train="lora", directions=1, **{k: v.to(DEVICE) for k, v in embeds_for(pipe).items()}
    )
    wrong = [row for row in found.rows if row.status in ("failed", "refused")]
    assert not wrong, "\n".join(map(str, wrong))


@check
def verify() -> None:
    found = bd.verify(
        tiny_sd().to(DEVICE),
        "a 2",
        lambda images: images.square().mean((1, 2, 3)),
        steps=2,
        methods=("exact:min", "symplectic"),
        directions=1,
        reference_steps=4,
        progress=False,
    )
    assert not [row for row in found.rows if row.verdict == "failed"], found
    assert found.record["machine"]["device"] == "a card in software"


@check
def guidance() -> None:
    pipe = tiny_sd().to(DEVICE)

    def loss(images: Tensor) -> Tensor:
        return (images - 0.3).square().mean((1, 2, 3))

    style = bd.SymplecticAdjointGuidance(loss, n=1, start=0.3, stop=1.0)
    out = pipe("a 2", num_inference_steps=3, callback_on_step_end=style, output_type="pt").images
    assert out.device == DEVICE


@check
def as_denoiser() -> None:
    pipe = tiny_sd().to(DEVICE)
    view = bd.as_denoiser(pipe, "a 2")
    x = noise_for(pipe).to(DEVICE).requires_grad_()
    solution = bd.sample(view.model, x, view.cond, grid=bd.pipeline_grid(pipe, 3))
    solution.x0.sum().backward()
    assert x.grad is not None


room("")


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in [check for given in names for check in ROOMS.get(given, [given])] or CHECKS:
        start = time.process_time()
        try:
            CHECKS[name]()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        spent = f"{time.process_time() - start:6.1f} s {name}"
        print(spent if found[name] is None else f"{spent} FAILED\n{found[name]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
