"""The benchmark of first code blocks: its edits of code, its judgement of gradients, and a few blocks end to end."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchdiffeq")

from benchmarks.first_blocks import ways
from benchmarks.first_blocks.__main__ import main
from benchmarks.first_blocks.listed import BLOCKS, Block
from benchmarks.first_blocks.models import small
from benchmarks.first_blocks.summary import figures, rows
from benchmarks.first_blocks.verified import Judge, Truth
from benchmarks.first_blocks.ways import pack

BY_NAME = {block.name: block for block in BLOCKS}


def test_there_are_thirty_blocks_and_a_file_for_each() -> None:
    folder = Path(ways.__file__).parent / "blocks"
    assert len(BLOCKS) == len(BY_NAME) == 30
    assert {p.stem for p in folder.glob("*.py")} - {"__init__"} == set(BY_NAME)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.name)
def test_one_line_is_all_that_is_added(block: Block) -> None:
    edited = ways.Edited(block.source)
    edited.inside(ways.ONE_LINE)
    before, after = (ast.unparse(ast.parse(source)).splitlines() for source in (block.source, str(edited)))
    assert len(after) == len(before) + 1
    assert [line for line in after if line.strip() not in [b.strip() for b in before]] == [ways.ONE_LINE]


def test_a_twin_names_no_other_precision() -> None:
    for block in BLOCKS:
        code = str(ways.Edited(block.source, twin=torch.float64))
        assert not any(f"torch.{name}" in code for name in ("float16", "bfloat16", "float32"))


def test_a_block_that_does_not_end_in_one_call_is_refused() -> None:
    for source in ("pipe(1)", "a = 1", "a = pipe(pipe(1))"):
        with pytest.raises(ValueError, match="one call of pipe"):
            ways.Edited(source)


def test_every_precision_draws_the_same_numbers_and_has_the_same_weights() -> None:
    from diffusers import DDPMPipeline
    from diffusers.utils.torch_utils import randn_tensor

    with ways.one_stream():
        half, double = (
            randn_tensor((2, 3, 8, 8), torch.Generator().manual_seed(0), dtype=d)
            for d in (torch.float16, torch.float64)
        )
    assert torch.equal(half.double(), double)
    again = randn_tensor((2, 3, 8, 8), torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not torch.equal(again, double)  # and nothing is left behind
    one, other = (small(DDPMPipeline, torch_dtype=d).unet for d in (torch.bfloat16, torch.float64))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.double(), b)


def test_packing_is_flux_s_own() -> None:
    from diffusers import FluxPipeline

    noise = torch.randn(1, 4, 8, 8)
    assert torch.equal(pack(noise, (1, 16, 16)), FluxPipeline._pack_latents(noise, 1, 4, 8, 8))
    assert pack(noise, (1, 4, 8, 8)) is noise


@pytest.fixture(scope="module")
def judged() -> tuple[Judge, Truth]:
    judge = Judge(BY_NAME["ddpm"], steps=2)  # in float32
    truth = judge.truth()
    assert truth is not None, judge.failures
    return judge, truth


def test_the_truth_is_the_hand_made_gradient(judged: tuple[Judge, Truth]) -> None:
    assert judged[1].by == "plain autograd in float64"
    assert max(judged[1].slopes) < 0.01  # of the tolerance


@pytest.mark.parametrize("harm", ["scaled", "one part", "zero", "infinite", "cut"])
def test_a_wrong_gradient_is_not_verified(judged: tuple[Judge, Truth], harm: str, monkeypatch: Any) -> None:
    judge, truth = judged
    gradient = truth.gradient.float()
    harmed = {
        "scaled": gradient * 1.05,
        "one part": torch.where(torch.rand_like(gradient) < 0.1, 0.0, gradient),
        "zero": gradient * 0,
        "infinite": gradient / 0,
    }

    def made(block: Block, noise: torch.Tensor, steps: Any) -> torch.Tensor:
        if harm == "cut":
            return noise.detach()
        # A function of the noise whose gradient is the harmed one, whatever the loss makes of it.
        return _Fixed.apply(noise, harmed[harm])

    monkeypatch.setattr(ways, "one_line", made)
    verdict = judge.backdrift(truth)
    assert verdict.status == {"zero": "no gradient", "infinite": "not finite", "cut": "no gradient"}.get(
        harm, "wrong"
    )


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, noise: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return noise.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


def test_finite_differences_see_a_wrong_gradient(judged: tuple[Judge, Truth]) -> None:
    judge, truth = judged
    assert max(judge.slopes(truth.gradient * 1.03, torch.float64)) > 1
    turned = truth.gradient.flatten()[torch.randperm(truth.gradient.numel())].view_as(truth.gradient)
    assert max(judge.slopes(turned, torch.float64)) > 1


@pytest.mark.parametrize(
    ("name", "fifteen"), [("stable_diffusion_xl", "raises"), ("flux_schnell", "verified"), ("dit", "raises")]
)
def test_blocks_from_end_to_end(name: str, fifteen: str, tmp_path: Path) -> None:
    out = tmp_path / "blocks.json"
    main([name, "--steps", "2", "--out", str(out)])
    (cell,) = json.loads(out.read_text())["blocks"]
    assert cell["truth"] is not None, cell
    assert cell["backdrift"]["status"] == "verified", cell
    assert cell["fifteen"]["status"] == fifteen, cell
    stamp = out.stat().st_mtime_ns
    main([name, "--steps", "2", "--out", str(out)])
    assert out.stat().st_mtime_ns == stamp  # measured once


def test_the_summary_counts() -> None:
    good, bad = {"status": "verified", "bits": True}, {"status": "raises", "says": "ValueError: no"}
    cells = [
        {"page": "One", "backdrift": good, "fifteen": bad},
        {"page": "Two", "backdrift": bad, "fifteen": good},
    ]
    assert rows(cells)[0] == ["One", "verified, plain autograd's bits", "raises: ValueError: no"]
    ((_, value),) = figures(cells)
    assert value.startswith("1 of 2; ")
    assert "1 of 2 (1 raise)" in value
