"""The page of a run: whole, self-contained, redrawn from the record alone."""

from __future__ import annotations

import ast
import base64
import inspect
import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backdrift import report
from backdrift.errors import InputError
from html_page import Page


def record(**changes: Any) -> dict[str, Any]:
    iterations = [
        {"iteration": i, "loss": 2.0 / (i + 1), "per_sample": [1.0, 3.0], "examples": [0, 1], "grad_norm": 0.5,
         "lr": 0.1, "seconds": 1.5, "heldout": 1.0}
        for i in range(4)
    ]  # fmt: skip
    return {
        "format": "backdrift-run/1",
        "kind": "optimize",
        "title": "optimize noise: a <b>red</b> two",
        "status": "finished",
        "message": "",
        "created": "2026-11-20T12:40:11+00:00",
        "updated": "2026-11-20T12:41:11+00:00",
        "prompt": ["a <script>alert(1)</script> two", "another"],
        "seed": 7,
        "settings": {
            "loss": "class:two", "over": "noise", "steps": 3, "lr": 0.1, "optimizer": "adamw", "heldout": None,
            "num_inference_steps": 31, "batch_size": 1, "pipeline": {"class": "StableDiffusionPipeline"},
        },
        "versions": {"torch": "2.13.0"},
        "machine": {"device": "cpu"},
        "iterations": iterations,
        "best": {"iteration": 3, "loss": 0.5, "heldout": 1.0},
        "pictures": {
            "before": {"path": "pictures/before.png", "caption": "before"},
            "after": {"path": "pictures/after.png", "caption": "after iteration 3"},
        },
        "tensors": {"best": {"path": "tensors/best.safetensors", "shapes": {"noise": [2, 4, 8, 8]}}},
        "files": {"embedding": {"path": "embedding.safetensors", "caption": "the embedding"}},
        "stats": {"network_calls": 3162, "redone": 1550, "vjps": 1581, "peak_bytes": 289_000_000, "seconds": 125.0},
        "figures": {"success over 20 seeds": "17 of 20", "ratio": 1.0401},
        **changes,
    }  # fmt: skip


def write_run(folder: Path, **changes: Any) -> Path:
    (folder / "pictures").mkdir(parents=True)
    for name, size in (("before", (64, 64)), ("after", (526, 64))):
        picture = Image.new("RGB", size)
        picture.putdata([((x * 7) % 256, (x * 3) % 256, x % 256) for x in range(size[0] * size[1])])
        picture.save(folder / "pictures" / f"{name}.png")
    (folder / "record.json").write_text(json.dumps(record(**changes)))
    return folder


def embedded(image: dict[str, str | None]) -> bytes:
    return base64.b64decode((image["src"] or "").partition("base64,")[2])


def test_the_page_is_self_contained_and_whole(tmp_path: Path) -> None:
    path = report.write(write_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in source
    assert "@import" not in source
    assert "http" not in re.sub(r"base64,[^\"]+", "", source)
    for words in (
        "2 → 0.5", "−75 % · best at iteration 3", "2 min 05 s", "3\u202f162", "1\u202f550 redone · 1\u202f581 VJPs",
        "276 MiB", "17 of 20", "1.04", "class:two", "2.13.0", "seed 7", "20 November 2026, 12:40 UTC",
        "noise 2×4×8×8", "the embedding", "pipeline.class", "1.5 s each",
    ):  # fmt: skip
        assert words in page.text, words


def test_text_of_the_record_is_never_markup(tmp_path: Path) -> None:
    page = Page(report.write(write_run(tmp_path / "run")).read_text(encoding="utf-8"))
    assert "a <script>alert(1)</script> two" in page.text
    assert "a <b>red</b> two" in page.text
    assert "b" not in page.tags


def test_pictures_are_the_runs_own_small_ones_enlarged(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page = Page(report.write(folder).read_text(encoding="utf-8"))
    assert [embedded(image) for image in page.images] == [
        (folder / "pictures" / f"{name}.png").read_bytes() for name in ("before", "after")
    ]
    assert all(image["class"] == "crisp" for image in page.images)
    assert "width:256px" in (page.images[0]["style"] or "")
    assert page.images[0]["alt"] == "before"


def test_flagged_pictures_are_blurred_in_the_file_itself_unless_asked(tmp_path: Path) -> None:
    flagged = {"before": {"path": "pictures/before.png", "caption": "before", "flagged": True}}
    folder = write_run(tmp_path / "run", pictures=flagged)
    original = (folder / "pictures" / "before.png").read_bytes()
    source = report.write(folder).read_text(encoding="utf-8")
    (image,) = Page(source).images
    assert "a safety filter flagged it" in source
    assert base64.b64encode(original).decode() not in source
    shown = Image.open(io.BytesIO(embedded(image))).convert("L")

    # nothing finer than a sixteenth of the picture is left: neighbours hardly differ, in the original they do

    def roughness(picture: Image.Image) -> float:
        values = list(picture.getdata())
        return sum(abs(a - b) for a, b in pairwise(values)) / len(values)

    assert roughness(shown) < 0.1 * roughness(Image.open(folder / "pictures" / "before.png").convert("L"))
    (image,) = Page(report.write(folder, blur_flagged=False).read_text(encoding="utf-8")).images
    assert embedded(image) == original


def test_a_page_about_several_runs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", title="the second run", kind="check", iterations=[], best=None),
    ]
    path = report.write_many(
        folders, tmp_path / "new" / "all.html", title="Three things", intro="What they are."
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("article") == 2
    assert {"#run-1", "#run-2"} <= set(page.links)
    for words in ("Three things", "What they are.", "the second run"):
        assert words in page.text
    with pytest.raises(InputError, match="at least one run"):
        report.write_many([], tmp_path / "none.html")


def test_a_run_that_has_only_begun_or_failed(tmp_path: Path) -> None:
    bare = {"iterations": [], "best": None, "pictures": {}, "tensors": {}, "files": {}, "figures": {},
            "stats": dict.fromkeys(("network_calls", "redone", "vjps", "peak_bytes", "seconds"))}  # fmt: skip
    page = Page(
        report.write(write_run(tmp_path / "run", status="running", **bare)).read_text(encoding="utf-8")
    )
    assert "running" in page.text
    assert "svg" not in page.tags
    failed = write_run(tmp_path / "failed", status="failed", message="NonFiniteError: the loss is NaN")
    assert "NonFiniteError: the loss is NaN" in Page(report.write(failed).read_text(encoding="utf-8")).text
    unknown = [{"iteration": i, "loss": None, "per_sample": [None], "examples": [0]} for i in range(3)]
    Page(
        report.write(write_run(tmp_path / "null", iterations=unknown, best=None)).read_text(encoding="utf-8")
    )


def test_it_is_redrawn_without_torch_and_byte_for_byte_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    first = report.write(folder).read_bytes()
    code = (
        "import sys; from backdrift import report; report.write(sys.argv[1]); "
        "assert not {'torch', 'diffusers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").read_bytes() == first
    assert sorted(p.name for p in folder.iterdir()) == ["pictures", "record.json", "report.html"]


def test_the_python_to_do_it_again_is_the_same_call(tmp_path: Path) -> None:
    import backdrift

    source = report.write(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    code = re.search(r"<pre><code>(import backdrift.*?)</code>", source, re.S)
    assert code is not None
    import html

    tree = ast.parse(html.unescape(code[1]))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "bd.optimize")
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert given == {
        "over": "noise", "num_inference_steps": 31, "steps": 3, "batch_size": 1, "optimizer": "adamw", "lr": 0.1,
        "seed": 7,
    }  # fmt: skip
    assert [ast.literal_eval(a) for a in call.args[1:]] == [record()["prompt"], "class:two"]
    inspect.signature(backdrift.optimize).bind(None, "prompt", "loss", **given)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not the folder of a run: it has no record\.json"):
        report.write(tmp_path)
    (tmp_path / "record.json").write_text("{broken")
    with pytest.raises(InputError, match="cannot be read"):
        report.write(tmp_path)
    (tmp_path / "record.json").write_text('{"format": "other/2"}')
    with pytest.raises(InputError, match=r"not a run's record that this version reads \(format 'other/2'\)"):
        report.write(tmp_path)
    folder = write_run(tmp_path / "run")
    page = report.write(folder).read_bytes()
    (folder / "pictures" / "after.png").unlink()
    with pytest.raises(InputError, match=r"picture 'after' .* cannot be read"):
        report.write(folder)
    assert (folder / "report.html").read_bytes() == page  # the earlier page stays
