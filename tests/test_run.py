"""A run's folder: whole files only, earlier results untouched, and back to the last checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from backdrift.errors import InputError
from backdrift.files import write_atomically
from backdrift.pictures import in_rows, side_by_side
from backdrift.run import Run, fingerprint


def open_run(folder: Path | None, **changes: object) -> Run:
    settings = {"steps": 3, "lr": 0.1, "memory": "min"} | changes
    return Run.open("optimize", settings, title="t", prompt=["a two"], seed=0, out=folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_writer_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda f: f.write(b"old"))

    def fail(file: object) -> None:
        file.write(b"half of the n")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert contents(tmp_path) == {"file": b"old"}


def test_other_settings_are_refused_by_name_and_nothing_is_touched(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.record["best"] = {"iteration": 0, "loss": 1.0, "heldout": None}
    run.save_record()
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"lr: 0\.1 there, 0\.2 given"):
        open_run(tmp_path / "a", lr=0.2)
    with pytest.raises(InputError, match="resume=False"):
        Run.open("optimize", {}, title="t", prompt=["a two"], seed=0, out=tmp_path / "a", resume=False)
    assert contents(tmp_path) == before


def test_a_run_that_failed_before_it_measured_anything_may_be_replaced(tmp_path: Path) -> None:
    open_run(tmp_path / "a").save_record()
    assert open_run(tmp_path / "a", lr=0.2).record["settings"]["lr"] == 0.2


def test_settings_that_do_not_change_the_result_may_differ(tmp_path: Path) -> None:
    open_run(tmp_path / "a").save_record()
    assert open_run(tmp_path / "a", memory="max").record["settings"]["memory"] == "min"


def test_folders_that_are_not_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "file")
    with pytest.raises(InputError, match="other files and no run"):
        open_run(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "record.json").write_text('{"format": "something else"}')
    with pytest.raises(InputError, match="not a run record"):
        open_run(tmp_path / "b")
    assert contents(tmp_path) == {"file": b"x", "b/record.json": b'{"format": "something else"}'}


def test_without_a_name_the_folder_follows_from_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, again, other = open_run(None), open_run(None, memory="max"), open_run(None, lr=0.2)
    assert first.folder == again.folder != other.folder


def test_the_fingerprint_ignores_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": [2.5]}) == fingerprint({"b": [2.5], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    with (
        run.writing(),
        pytest.raises(InputError, match="Another process"),
        open_run(tmp_path / "a").writing(),
    ):
        pass
    with run.writing():  # free again
        pass


def test_how_the_work_failed_is_written_down(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    with pytest.raises(ZeroDivisionError), run.writing():
        raise ZeroDivisionError("by zero")
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    assert (record["status"], record["message"]) == ("failed", "ZeroDivisionError: by zero")
    with pytest.raises(KeyboardInterrupt), run.writing():
        raise KeyboardInterrupt
    assert Run.load(tmp_path / "a").record["status"] == "interrupted"


def test_the_record_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.record["figures"] = {"x": float("nan"), "y": [float("inf"), 1.5]}
    run.save_record()

    def no_constants(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "a" / "record.json").read_text()
    assert json.loads(text, parse_constant=no_constants)["figures"] == {"x": None, "y": [None, 1.5]}


def test_a_checkpoint_brings_state_and_record_back_to_its_moment(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.record["iterations"] = [{"iteration": 0, "loss": 0.1 + 0.2}]
    state = {
        "next": 1,
        "x": torch.tensor([1 / 3]),
        "milestones": Counter({5: 1}),
        "lr": 0.1 + 0.2,
        "pair": (1, None),
    }
    run.save_checkpoint(state)
    run.record["iterations"].append({"iteration": 1, "loss": 9.0})
    run.save_record()  # the record may be ahead of the checkpoint when the kill comes
    again = open_run(tmp_path / "a")
    assert len(again.record["iterations"]) == 2
    back = again.load_checkpoint()
    assert back is not None
    assert torch.equal(back.pop("x"), state.pop("x"))  # type: ignore[arg-type]
    assert back == state
    assert again.record["iterations"] == [{"iteration": 0, "loss": 0.1 + 0.2}]


def test_a_broken_checkpoint_is_an_error_that_says_so(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.save_record()
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"checkpoint\.pt.*cannot be read"):
        run.load_checkpoint()


@pytest.mark.parametrize(
    "text", [b"", b'{"format": "backdrift-run/1"', b"\x80\x81\xff", b'{"format": "backdrift-run/1"}', b"[]"]
)
def test_a_broken_record_is_an_error_that_says_so_and_is_left_alone(tmp_path: Path, text: bytes) -> None:
    open_run(tmp_path / "a").save_record()
    (tmp_path / "a" / "record.json").write_bytes(text)
    with pytest.raises(InputError, match="run record"):
        open_run(tmp_path / "a")
    assert contents(tmp_path) == {"a/record.json": text}


def test_broken_and_missing_files_of_a_run_are_errors_that_say_so(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.save_tensors("best", {"noise": torch.ones(3)})
    path = tmp_path / "a" / "tensors" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"best\.safetensors.*cannot be read"):
        run.tensors("best")
    path.unlink()
    with pytest.raises(InputError, match=r"best\.safetensors.*cannot be read"):
        run.tensors("best")
    torch.save({"record": "{}"}, tmp_path / "a" / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint\.pt.*cannot be read"):
        run.load_checkpoint()


def test_pictures_are_clamped_rounded_and_put_in_a_row(tmp_path: Path) -> None:
    from PIL import Image

    run = open_run(tmp_path / "a")
    values = torch.tensor([-0.5, 0.5, 1.5, 1 / 255])
    images = values.view(4, 1, 1, 1).expand(4, 3, 2, 2)
    run.save_picture("after all", images, "c")
    entry = run.record["pictures"]["after all"]
    with Image.open(run.folder / entry["path"]) as picture:
        assert picture.size == (4 * 2 + 3 * 2, 2)
        assert [picture.getpixel((4 * k, 1)) for k in range(4)] == [(v,) * 3 for v in (0, 128, 255, 1)]
        assert picture.getpixel((2, 0)) == (255, 255, 255)  # the gap
    assert side_by_side(images[:1]).shape == (3, 2, 2)


def test_many_pictures_wrap() -> None:
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2) / 10
    wrapped = in_rows(images, across=3, gap=1)
    assert wrapped.shape == (3, 5, 8)
    assert torch.equal(wrapped[:, :2], side_by_side(images[:3], gap=1))
    assert torch.equal(wrapped[:, 3:, :5], side_by_side(images[3:], gap=1))
    assert bool((wrapped[:, 2] == 1).all())
    assert bool((wrapped[:, 3:, 5:] == 1).all())
    assert torch.equal(in_rows(images), side_by_side(images))


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    value = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).t()  # not contiguous
    run.save_tensors("best", {"noise": value})
    assert torch.equal(run.tensors("best")["noise"], value)
    assert run.record["tensors"]["best"]["shapes"] == {"noise": [4, 3]}
    with pytest.raises(InputError, match="measured nothing"):
        _ = run.best
    with pytest.raises(InputError, match="no tensors 'worst'"):
        run.tensors("worst")
