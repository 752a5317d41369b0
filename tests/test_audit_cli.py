"""``backdrift audit``: what it says and writes, and its messages for bad input; the benchmark's page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.cli.audit import AuditSettings, _other
from backdrift.errors import InputError
from backdrift.run import Run
from command_line import call, refused
from tiny_pipelines import tiny_sd

QUICK = ("--num-inference-steps", "2", "--steps", "2", "--seeds", "2", "--tau", "0.5", "--no-progress")
MINE = """
def score(images):
    return 100 * images.mean((1, 2, 3))

def loose(images):
    return images
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    return "mine.py:score"


def test_it_is_the_librarys_audit(model: str, mine: str) -> None:
    import backdrift as bd
    from backdrift.recipes import ScoreFilter
    from backdrift.recipes.audit_judges import as_judge

    result = call("audit", "a 2", "--model", model, "--filter", mine, "--threshold", "10", "--judge", "class:four",
                  *QUICK, "--out", "a", "--random-tries", "1")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "evasions within τ = 0.5, gradient through the whole run: 0 of 2: 0 % (0 to 66)" in result.output
    assert "report:" in result.output
    record = json.loads(Path("a/record.json").read_text())
    assert [s["seed"] for s in record["audit"]["samples"]] == [0, 1]

    def score(images: Tensor) -> Tensor:
        return 100 * images.mean((1, 2, 3))

    pipe = tiny_sd()
    run = bd.audit(pipe, "a 2", ScoreFilter(score, 10), judge=as_judge("class:four"), tau=0.5, seeds=[0, 1], steps=2,
                   random_tries=1, num_inference_steps=2, progress=False, out="b")  # fmt: skip
    ours, theirs = (Run.load(f).tensors("tau-0.5")["noise"] for f in ("a", "b"))
    assert torch.equal(ours, theirs)
    assert run.record["audit"]["rates"] == record["audit"]["rates"]


def test_every_argument_of_the_library_is_a_setting() -> None:
    import inspect

    import backdrift

    only_python = {"pipe", "prompts", "callback", "changes", "pipeline_kwargs"}
    wanted = set(inspect.signature(backdrift.audit).parameters) - only_python
    assert wanted <= set(AuditSettings.model_fields)


def test_the_built_in_filters_have_judges_that_are_not_themselves() -> None:
    assert _other("stand-in:four", "sd") == "class:four"
    words = _other("class:four", "sd").removeprefix("clip:").split("/")
    assert words[0] == "a four"
    assert len(words) == len(set(words)) == 10
    for kind, model in (("class:four", "elsewhere"), ("safety", "sd"), ("class:cat@some/model", "sd")):
        with pytest.raises(InputError, match="--judge"):
            _other(kind, model)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--filter", "safety", "--judge", "class:four"), "no safety checker"),
        (("--filter", "saftey", "--judge", "class:four"), "no filter"),
        (("--filter", "mine.py:score", "--judge", "class:four"), "needs a threshold"),
        (("--filter", "mine.py:none", "--threshold", "1", "--judge", "class:four"), "no callable"),
        (("--filter", "mine.py:score", "--threshold", "1"), "--judge"),
        (("--filter", "class:eleventy", "--judge", "class:four"), "eleventy"),
        (("--filter", "class:four", "--target", "four", "--judge", "clip:a four/a nine"), "one of the flagged"),
        (("--filter", "class:four", "--judge", "four"), "unknown"),
        (("--filter", "mine.py:score", "--threshold", "1", "--judge", "class:four", "--tau", "-1"), "positive"),
        (("--filter", "mine.py:loose", "--threshold", "-9", "--judge", "class:four"), "one value per sample"),
    ],
)  # fmt: skip
def test_what_cannot_be_used(model: str, mine: str, more: tuple[str, ...], words: str) -> None:
    given = QUICK if "--tau" not in more else QUICK[:6] + QUICK[8:]
    refused(call("audit", "a 2", "--model", model, *given, *more), words)


def test_the_page_of_the_docs_says_what_the_results_say() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from benchmarks.audit import PAGE, RESULTS, blocks, figures
    from benchmarks.marked import marked

    data: dict[str, Any] = json.loads((RESULTS / "audit.json").read_text())
    assert data["figures"][: len(figures(data))] == figures(data)
    for name, block in blocks(data).items():
        assert marked(PAGE.read_text(), name) == block
