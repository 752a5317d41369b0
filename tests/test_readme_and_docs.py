"""README and docs say what is so: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import backdrift as bd
from backdrift.cli import app
from backdrift.losses import registry
from problems import SCHEDULES, GaussianNetwork, condition, start_state

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
STEPS = 10  # of sampling, at most, whatever a page says: as many as its guidance needs
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(the text before it, the code) of every fenced block in one of the languages."""
    text = page.read_text()
    return [
        (text[: found.start()], textwrap.dedent(found[3]))
        for found in FENCE.finditer(text)
        if found[2] in languages
    ]


def run(page: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks one after the other in one namespace, and return it.

    A block with relative imports is a file of the package; the folder it belongs into is the one named last
    before it. Pipelines sample in :data:`STEPS` steps where the page has more.
    """
    space: dict[str, Any] = {"__name__": "docs", **given}
    for before, code in blocks(page, "python"):
        folders = re.findall(r"src/backdrift/(\w+)/", before)
        space["__package__"] = f"backdrift.{folders[-1]}" if folders else None
        code = re.sub(r"(num_inference_steps)=(\d+)", lambda m: f"{m[1]}={min(STEPS, int(m[2]))}", code)
        exec(compile(code, f"{page.name}:{before.count(chr(10)) + 2}", "exec"), space)
    return space


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Descents of one iteration and two sampling steps, whatever the page says, in a scratch folder."""
    optimize = bd.optimize

    def shortened(*args: Any, **kwargs: Any) -> Any:
        return optimize(*args, **{**kwargs, "steps": 1, "num_inference_steps": 2, "progress": False})

    monkeypatch.setattr(bd, "optimize", shortened)
    monkeypatch.chdir(tmp_path)


def test_the_readme_runs_on_the_built_in_pipeline(short: None) -> None:
    space = run(README, {})
    pipe, noise, unet = space["pipe"], space["noise"], space["unet"]
    assert space["run"].record["status"] == "finished"
    # What it says of the lines without backdrift: they give the same bits.
    noise.grad = None
    space["picture"].square().mean().backward()
    theirs, noise.grad = noise.grad, None
    unet.forward = space["forward"]
    with bd.differentiable(pipe, memory="min", clamp=True):
        pipe("a red seven", latents=noise, num_inference_steps=STEPS).images.square().mean().backward()
    assert theirs.abs().max() > 0
    assert torch.equal(noise.grad, theirs)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p != README and blocks(p, "python")], ids=lambda p: p.stem
)
def test_python_of_the_docs_runs(page: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    pipe = bd.load()
    noise = bd.noise(pipe, seed=0).requires_grad_()
    run(page, {"bd": bd, "torch": torch, "pipe": pipe, "noise": noise, "loss": torch.mean})


def test_no_table_that_a_command_writes_is_empty() -> None:
    found = [
        (page.name, name, inside)
        for page in PAGES
        for name, inside in re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", page.read_text(), re.DOTALL)
    ]
    assert len(found) > 5
    assert not [(page, name) for page, name, inside in found if not inside.strip()]


def test_the_solvers_of_the_docs_are_the_known_ones() -> None:
    space = run(ROOT / "docs" / "adding-a-solver.md", {})
    network = GaussianNetwork(SCHEDULES["linear"], "epsilon")
    model, x = bd.Denoiser(network, SCHEDULES["linear"]), start_state(SCHEDULES["linear"], 1.0)
    sample = partial(bd.sample, model, x, condition(), form="exponential")
    grid = bd.TimeGrid("quadratic", steps=12)
    ours, known = (sample(solver=s, grid=grid).x0 for s in (space["TwoStep"](), bd.AdamsBashforth(2)))
    torch.testing.assert_close(ours, known, rtol=1e-12, atol=1e-12)
    # Ralston's method is of order 2 like Heun's, and another one.
    theirs = bd.sample(model, x, condition(), solver=space["ralston"], grid=grid).x0
    assert 1e-9 < float((theirs - sample(solver=bd.Heun(), grid=grid).x0).detach().norm()) < 1e-1


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def commands() -> list[tuple[str, str]]:
    lines = [
        (page.name, line.removeprefix("$ "))
        for page in PAGES
        for _, code in blocks(page, "bash", "console")
        for line in code.splitlines()
        if line.strip() and (line.startswith("$ ") or "console" not in line)
    ]
    return [(page, line) for page, line in lines if line.split()[0] == "backdrift"]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_in_the_docs_exist_with_their_flags(page: str, line: str) -> None:
    name, *words = shlex.split(line, comments=True)[1:]
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert name in known
    while hasattr(known[name], "commands"):  # a group, such as `guide`
        known = known[name].commands
        name, *words = words
        assert name in known
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= options_of(known[name]) | {"--help", "-h"}


def test_make_targets_in_the_docs_exist() -> None:
    named = {t for page in PAGES for t in re.findall(r"`make ([a-z]+)`", page.read_text())}
    assert {"demo", "test", "install"} <= named
    for target in named:
        made = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    missing = [
        link for link in links if "://" not in link and not (page.parent / link.split("#")[0]).exists()
    ]
    assert not missing


def test_every_page_of_the_docs_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert [
        p.name for p in (ROOT / "docs").glob("*.md") if p.name not in index and p.name != "index.md"
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_names_of_the_package_in_the_docs_exist(page: Path) -> None:
    """Every ``bd.name`` in running text is there; those in code are found by running it."""
    for name in set(re.findall(r"\bbd\.([A-Za-z_]+)", page.read_text())):
        assert hasattr(bd, name), f"bd.{name}"


def test_the_readme_is_short_enough_to_try() -> None:
    """Ten lines of a user's own: the first block, without blank lines."""
    first = blocks(README, "python")[0][1]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    ast.parse(first)
