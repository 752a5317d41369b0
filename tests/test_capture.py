"""A pipeline's own loop as hosts: runs to the last bit, and the pipeline afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.errors import InputError
from backdrift.pipelines.capture import Capture
from backdrift.pipelines.captured import CapturedHost
from captured_runs import RUNS, STEPS, call, pipeline, plain
from tiny_pipelines import noise_for, tiny_sd

Edit = Callable[[CapturedHost], Tensor]


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), RUNS)
def test_a_run_that_nothing_changes_is_the_pipelines_own(name: str, config: dict[str, Any]) -> None:
    pipe = pipeline(name, config)
    noise = noise_for(pipe)
    torch.manual_seed(5)
    expected = call(pipe, noise)
    random = torch.get_rng_state()
    seen: list[tuple[int, int]] = []

    def twice(host: CapturedHost) -> Tensor:
        seen.append((host.index, host.total))
        evaluation = host.evaluate(host.x)
        host.step(host.x + 1, host.evaluate(host.x + 1))
        return host.step(host.x, evaluation)

    for take in (plain, twice):
        torch.manual_seed(5)
        with Capture(pipe, take):
            assert torch.equal(call(pipe, noise), expected)
        assert torch.equal(torch.get_rng_state(), random)
    assert seen == [(i, STEPS) for i in range(STEPS)]


@pytest.mark.parametrize(("name", "config"), RUNS)
def test_a_callback_gets_the_same(name: str, config: dict[str, Any]) -> None:
    """Changing each state after its step, in a callback, is changing it in the step."""
    pipe = pipeline(name, config)
    noise = noise_for(pipe)

    def changed(host: CapturedHost) -> Tensor:
        x = host.x + 0.01
        return host.step(x, host.evaluate(x)) + 0.02

    def at_end(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        host = capture.last
        assert host is not None
        assert (host.index, host.total) == (i, STEPS)
        return {"latents": changed(host)}

    torch.manual_seed(5)
    with Capture(pipe, changed):
        expected = call(pipe, noise)
    torch.manual_seed(5)
    with Capture(pipe) as capture:
        assert torch.equal(call(pipe, noise, callback_on_step_end=at_end), expected)
    torch.manual_seed(5)
    assert not torch.equal(call(pipe, noise), expected)


def test_a_capture_in_the_middle_of_a_run_counts_on() -> None:
    pipe = tiny_sd()
    found: list[Any] = []

    def at_end(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            found.append(Capture(pipe, done=i + 1))
        elif i > 1:
            found.append((i, found[0].last.index, found[0].last.total))
        return {}

    call(pipe, noise_for(pipe), callback_on_step_end=at_end)
    found[0].detach()
    assert found[1:] == [(2, 2, STEPS), (3, 3, STEPS)]


def test_a_loss_draws_its_own_numbers_in_every_step() -> None:
    """Taking a step again must not put back the global generator that a loss draws from."""
    pipe, drawn = tiny_sd(), []

    def take(host: CapturedHost) -> Tensor:
        drawn.append(float(torch.rand(())))
        return plain(host)

    with Capture(pipe, take):
        call(pipe, noise_for(pipe))
    assert len(set(drawn)) == STEPS


@pytest.mark.parametrize("raised", [False, True])
def test_afterwards_the_pipeline_is_as_before(raised: bool) -> None:
    pipe = tiny_sd()

    def look() -> Any:
        hooks = [
            len(getattr(pipe.unet, f"_forward_{kind}"))
            for kind in ("hooks", "pre_hooks", "hooks_with_kwargs")
        ]
        flags = [p.requires_grad for p in pipe.unet.parameters()]
        return (
            type(pipe),
            type(pipe.scheduler),
            set(vars(pipe)),
            set(vars(pipe.scheduler)),
            set(vars(pipe.unet)),
            hooks,
            flags,
        )

    call(pipe, noise_for(pipe))
    before = look()

    def take(host: CapturedHost) -> Tensor:
        if raised:
            raise ZeroDivisionError
        return plain(host)

    try:
        with Capture(pipe, take):
            call(pipe, noise_for(pipe))
    except ZeroDivisionError:
        assert raised
    assert look() == before
    capture = Capture(pipe)
    with pytest.raises(InputError, match="already"):
        Capture(pipe)
    del capture
    gc.collect()
    assert look() == before


def test_a_copy_of_the_pipeline_leaves_it_alone() -> None:
    pipe = tiny_sd()
    noise = noise_for(pipe)
    expected = call(pipe, noise)
    own = type(pipe.scheduler)
    with Capture.of_clone(pipe, plain) as capture, torch.no_grad():
        assert torch.equal(call(capture.pipe, noise), expected)
        assert type(pipe.scheduler) is own
        assert not pipe.unet._forward_hooks
        assert torch.equal(call(pipe, noise), expected)


def test_threads_with_copies_do_not_disturb_each_other() -> None:
    pipe = tiny_sd()

    def run(shift: float) -> Tensor:
        def take(host: CapturedHost) -> Tensor:
            x = host.x + shift
            return host.step(x, host.evaluate(x))

        with Capture.of_clone(pipe, take) as capture, torch.no_grad():
            return call(capture.pipe, noise_for(pipe))

    shifts = [0.01 * i for i in range(4)]
    alone = [run(shift) for shift in shifts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, shifts))
    assert all(map(torch.equal, alone, together))
    assert len({float(x.sum()) for x in alone}) == 4
