"""The check of the gradient: it passes where the gradient is right, and fails where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.recipes import check
from backdrift.recipes.check import check_gradient
from backdrift.recipes.unrounded import Unrounded
from tiny_pipelines import tiny_sd, tiny_sd3


def tiny_sd_with_dpm() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    pipe = tiny_sd()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


# The schedulers of the last two round the latents to float32 in every step, of the pipeline's own run.
@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3, tiny_sd_with_dpm])
def test_a_right_gradient_is_found_right(make: Any, tmp_path: Path) -> None:
    pipe = make()
    asked = {
        name: p.requires_grad
        for name, p in (getattr(pipe, "unet", None) or pipe.transformer).named_parameters()
    }
    run = check_gradient(
        pipe, "a b", "brightness", num_inference_steps=3, short_steps=2, out=tmp_path / "run"
    )
    figures = run.record["figures"]
    assert figures["largest difference to plain autograd"] == 0.0
    assert figures["same bits as plain autograd"] == "yes"
    assert figures["relative difference to finite differences"] < 1e-7
    assert (
        0
        < figures["activations held at once, backdrift (MB)"]
        < figures["activations held at once, plain autograd (MB)"]
    )
    assert run.record["stats"]["redone"] == run.record["stats"]["vjps"] == 3
    assert (tmp_path / "run" / "report.html").is_file()
    # the pipeline is as it was
    network = getattr(pipe, "unet", None) or pipe.transformer
    assert {name: p.requires_grad for name, p in network.named_parameters()} == asked
    assert network.dtype == torch.float32


def test_finite_differences_notice_what_autograd_was_not_told(tmp_path: Path) -> None:
    def half(images: Tensor) -> Tensor:
        """The mean of the pictures, with half of its gradient cut off."""
        return ((images + images.detach()) / 2).flatten(1).mean(1)

    run = check_gradient(tiny_sd(), "a b", half, num_inference_steps=2, short_steps=2, out=tmp_path / "run")
    assert run.record["figures"]["same bits as plain autograd"] == "yes"
    assert run.record["figures"]["relative difference to finite differences"] == pytest.approx(0.5, rel=1e-4)


def test_the_comparison_with_plain_autograd_notices_one_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = check.pull

    def wrong(*args: Any) -> check.Pulled:
        pulled = genuine(*args)
        pulled.gradient[0, 0, 0, 0] = torch.nextafter(pulled.gradient[0, 0, 0, 0], torch.tensor(1.0))
        return pulled

    monkeypatch.setattr(check, "pull", wrong)
    run = check_gradient(
        tiny_sd(), "a b", "brightness", num_inference_steps=2, short_steps=2, out=tmp_path / "run"
    )
    assert run.record["figures"]["same bits as plain autograd"] == "no"
    assert run.record["figures"]["largest difference to plain autograd"] > 0


def test_the_scheduler_keeps_no_graph_of_the_check(tmp_path: Path) -> None:
    pipe = tiny_sd_with_dpm()
    run = check_gradient(
        pipe, "a b", "brightness", num_inference_steps=3, short_steps=2, out=tmp_path / "run"
    )
    assert run.record["figures"]["same bits as plain autograd"] == "yes"
    kept = [x for x in pipe.scheduler.model_outputs if x is not None]
    assert not any(x.requires_grad for x in kept)


def test_casts_to_single_precision_are_left_out_inside_the_block_only() -> None:
    x = torch.tensor([1.0, 3.0], dtype=torch.float64) / 7
    casts = [
        lambda x: x.to(torch.float32),
        lambda x: x.to("cpu", torch.float32),
        lambda x: x.to(torch.ones(1)),
        lambda x: x.float(),
        lambda x: x.type(torch.float32),
        lambda x: x.type_as(torch.ones(1)),
    ]
    with Unrounded():
        assert all(torch.equal(cast(x), x) for cast in casts)
        assert x.to(torch.float16).dtype == torch.float16  # nothing else is touched
        assert torch.ones(1).double().dtype == torch.float64
    assert all(cast(x).dtype == torch.float32 for cast in casts)
