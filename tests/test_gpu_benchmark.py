"""The GPU benchmark on a CPU at small width: cells, resuming, comparisons; and its summaries on made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from benchmarks import gpu, gpu_jobs, gpu_plot
from benchmarks.figures import block
from benchmarks.gpu import Bench, Cell, cells, main
from benchmarks.gpu_jobs import Job, Setting
from benchmarks.gpu_summary import figures, largest, over, planned, table
from benchmarks.record import Record

from backdrift.errors import BudgetError

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--small", "--minutes", "5"]


def run(out: Path, *arguments: str) -> dict[str, Any]:
    main([*SMALL, "--out", str(out), *arguments])
    return json.loads(out.read_text())


def test_the_most_telling_cells_come_first_and_none_twice() -> None:
    found = cells()
    assert len(set(found)) == len(found)
    assert found[1] == Cell("sdxl", "bfloat16", "noise", "all", 30, "12GiB")
    grid = {(c.model, c.dtype, c.wants, c.steps) for c in found}
    assert len(grid & {(m, d, w, n) for m in gpu.MODELS for d in ("bfloat16", "float32")
                       for w in ("noise", "lora") for n in (10, 30, 50)}) == 48  # fmt: skip


@pytest.mark.parametrize("model", ["sdxl", "flux-dev"])
def test_noise_gradients_of_all_methods_agree(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ("forward", "plain", "max", "min", "fifteen", "blocks")
    monkeypatch.setattr(gpu, "cells", lambda: [Cell(model, "float32", "noise", "all", 2, m) for m in order])
    out = tmp_path / "gpu.json"
    data = run(out)
    by_method = {c["method"]: c for c in data["cells"]}
    assert [c["status"] for c in data["cells"]] == ["done"] * 6, data["cells"]
    for name in ("max", "min", "fifteen", "blocks"):
        assert by_method[name]["bits"], name
    assert by_method["plain"]["gradient_norm"] > 0
    assert by_method["min"]["peak_bytes"] <= by_method["max"]["peak_bytes"]
    assert (by_method["min"]["redone"], by_method["max"]["redone"]) == (2, 0)
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_lora_and_the_last_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = ("sd3-medium", "float32", "lora")
    monkeypatch.setattr(
        gpu, "cells", lambda: [Cell(*setting, "all", 2, "fifteen"), Cell(*setting, "all", 2, "min"),
                               Cell(*setting, "last 2", 2, "min"), Cell(*setting, "last 1", 2, "fifteen")],
    )  # fmt: skip
    data = run(tmp_path / "gpu.json")
    every, ours, last, refused = data["cells"]
    assert ours["bits"], ours
    assert every["gradient_norm"] > 0
    # The last two of two steps are all of them.
    assert last["gradient_norm"] == pytest.approx(ours["gradient_norm"], rel=1e-6), last
    assert refused["status"] == "not available"


class Stub:
    """A job whose methods end as they are told."""

    ends: ClassVar[dict[str, BaseException]] = {}

    def __init__(self, setting: Setting, device: torch.device, small: bool) -> None:
        self.setting, self.device, self.weight_bytes = setting, device, 100

    def run(self, method: str, steps: int, through: str = "all") -> dict[str, Any]:
        if method in self.ends:
            raise self.ends[method]
        return {"loss": 1.0, "kept": torch.zeros(10).sum().item()}

    def prepare(self, method: str, steps: int) -> dict[str, Any]:
        return {}

    def planned(self, steps: int) -> dict[str, int]:
        return {"plain": 1000, "least": 10}

    def gradient(self) -> torch.Tensor:
        return torch.ones(3)

    def finish(self, method: str) -> None: ...

    def clear(self) -> None: ...


def test_running_out_of_memory_is_a_result_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order = [
        Cell("sd15", "float32", "noise", "all", 1, m) for m in ("forward", "max", "plain", "8GiB", "min")
    ]
    monkeypatch.setattr(gpu, "cells", lambda: order)
    monkeypatch.setattr(gpu, "Job", Stub)
    monkeypatch.setattr(gpu_plot, "plot", lambda data, path: None)
    monkeypatch.setattr(Stub, "ends", {
        "forward": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "max": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        "plain": RuntimeError("something else"),
        "8GiB": BudgetError("the smallest budget that works is 9 GiB"),
    })  # fmt: skip
    data = run(tmp_path / "gpu.json")
    assert [c["status"] for c in data["cells"]] == [
        "out of memory",
        "out of memory",
        "failed",
        "refused",
        "done",
    ]
    assert "Tried to allocate" in data["cells"][1]["says"]

    # Taken up again: only what failed, and only when asked; a cell in which the process died is among those.
    monkeypatch.setattr(Stub, "ends", {})
    assert run(tmp_path / "gpu.json") == data
    again = run(tmp_path / "gpu.json", "--again")
    assert [c["status"] for c in again["cells"]] == ["done"] * 5
    assert [c for c in again["cells"] if c["method"] == "min"] == [data["cells"][4]]


def test_a_cell_that_the_process_did_not_survive_is_marked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order = [Cell("sd15", "float32", "noise", "all", 1, m) for m in ("max", "min")]
    monkeypatch.setattr(gpu, "cells", lambda: order)
    monkeypatch.setattr(gpu, "Job", Stub)
    monkeypatch.setattr(gpu_plot, "plot", lambda data, path: None)
    monkeypatch.setattr(Stub, "ends", {"max": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "gpu.json")
    assert [c["status"] for c in run(tmp_path / "gpu.json")["cells"]] == ["died", "done"]


def test_no_cell_is_begun_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "cells", lambda: [Cell("sd15", "float32", "noise", "all", 1, "forward")])
    out = tmp_path / "gpu.json"
    assert main([*SMALL, "--out", str(out), "--minutes", "0"]) == 3
    assert json.loads(out.read_text())["cells"] == []


def test_a_budget_plans_for_everything_that_is_counted() -> None:
    """What the record calls the peak includes the weights, and the plan's estimate is of the same."""
    job = Job(Setting("sd15", "float32", "noise"), CPU, small=True)
    free = gpu_jobs.measured(job, "max", 2, "all")
    assert free["peak_bytes"] > job.weight_bytes
    held = gpu_jobs.measured(job, f"{free['peak_bytes'] * 2}", 2, "all")
    assert held["choices"] == {}  # there is room: plain autograd
    # Narrow layers: scratch memory inside kernels is a large share.
    assert held["planned_bytes"] == pytest.approx(held["peak_bytes"], rel=0.35)


def test_a_mistake_in_the_benchmark_is_a_failure() -> None:
    """A missing key is no method that is not offered."""
    found = gpu_jobs.guarded(lambda: {}["nothing"])
    assert (found["status"], found["says"]) == ("failed", "KeyError: 'nothing'")


def test_a_budget_with_offloading_is_planned_for_an_offloaded_pipeline() -> None:
    job = Job(Setting("sd15", "float32", "noise"), CPU, small=True)
    free = gpu_jobs.measured(job, "max", 2, "all")
    gradient = job.gradient()
    held = gpu_jobs.measured(job, f"{free['peak_bytes']} offload", 2, "all")
    assert held["choices"]["weights"] == "offload", held
    assert torch.equal(job.gradient(), gradient)
    assert not hasattr(job.pipe.unet, "_hf_hook")  # as it was


def test_the_readme_s_rows_are_there_before_the_last_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "Job", Stub)
    monkeypatch.setattr(Stub, "ends", {"max": KeyboardInterrupt()})
    record = Record(tmp_path / "gpu-card.json", made_up()["machine"], {"small": False}, "cells")
    bench = Bench(record, CPU, small=False, until=float("inf"), again=False)
    with pytest.raises(KeyboardInterrupt):
        bench.run([Cell("sdxl", "bfloat16", "noise", "all", 30, m) for m in ("forward", "min", "max")])
    ((what, value),) = json.loads(record.path.read_text())["figures"]
    assert what == "SDXL 1024², noise gradient, N = 30, bf16, on Card"
    assert value.startswith('`"min"`: ')
    assert value.endswith('`"max"`: died')


def test_what_a_card_took_leads_the_readme_s_figures(tmp_path: Path) -> None:
    data = made_up()
    (tmp_path / "gpu-card.json").write_text(json.dumps(data | {"figures": figures(data)}))
    (tmp_path / "gpu-cpu-small.json").write_text(json.dumps(data))  # proves nothing: it has no figures
    (tmp_path / "gpu-card.png").write_bytes(b"")
    (tmp_path / "other.json").write_text(json.dumps({"figures": [["something else", "7"]]}))
    text = block(tmp_path)
    assert (
        text.count("| SDXL 1024², noise gradient, N = 10, bf16, on Card | plain autograd: 3.0 × sampling")
        == 1
    )
    assert "![Card](benchmarks/results/gpu-card.png)" in text
    assert text.index("on one Card, torch 2") < text.index("| something else | 7 |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "gpu.json")])
    assert "there is no GPU here" in capsys.readouterr().err


def made_up() -> dict[str, Any]:
    base = {"model": "sdxl", "dtype": "bfloat16", "wants": "noise", "through": "all", "status": "done"}
    gib = 2**30
    return {
        "machine": {"accelerator": "Card", "accelerator_bytes": 100 * gib, "torch": "2"},
        "settings": {},
        "cells": [
            base | {"steps": 10, "method": "forward", "seconds": 2.0, "peak_bytes": 6 * gib},
            base | {"steps": 10, "method": "plain", "seconds": 6.0, "peak_bytes": 50 * gib,
                    "plan": {"status": "done", "plain": 48 * gib}},
            base | {"steps": 5, "method": "plain", "seconds": 3.0, "peak_bytes": 30 * gib},
            base | {"steps": 10, "method": "min", "seconds": 8.0, "peak_bytes": 10 * gib, "bits": True,
                    "relative_difference": 0.0, "compared_with": "plain"},
            base | {"steps": 10, "method": "12GiB", "seconds": 7.0, "peak_bytes": 11 * gib, "planned_bytes": 12 * gib},
            base | {"steps": 30, "method": "plain", "status": "out of memory", "says": "no"},
        ],
    }  # fmt: skip


def test_ratios_plans_and_the_largest_number_of_steps() -> None:
    data = made_up()
    _, plain, _, least, budget, _ = data["cells"]
    assert over(data, least, "forward") == 4.0
    assert over(data, plain, "forward") == 3.0
    assert over(data, budget, "plain") == pytest.approx(7 / 6)
    assert planned(data, plain) == pytest.approx(48 / 50)
    assert planned(data, budget) == pytest.approx(12 / 11)
    assert planned(data, least) is None
    assert largest(data, plain) == 22  # 30 GiB at 5 and 4 GiB a step: 98 at 22, 102 at 23
    assert largest(data, least) is None
    lines = table(data)
    assert "out of memory" in lines[-1]
    assert "the bits of plain" in lines[3]
    ten = next(value for what, value in figures(data) if "N = 10" in what)
    assert ten.startswith('plain autograd: 3.0 × sampling, 50.0 GiB; `"min"`: 4.0 × sampling, 10.0 GiB')
