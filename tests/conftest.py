"""What holds for all tests."""

import gc
import os
from pathlib import Path

import pytest

# Nothing is asked of a model hub. Read once, when huggingface_hub is imported, so it is set before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compare bits, which are promised on a CPU. What devices are asked is tested in test_devices.py.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """Garbage collections leave out what is alive between two files. Most of it is diffusers and transformers: half a
    million objects, which every one of the hundreds of collections that tests ask for would walk, 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Stable Diffusion, saved to a folder: what ``--model`` takes."""
    from tiny_pipelines import tiny_sd

    folder = tmp_path_factory.mktemp("model")
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test works in a folder of its own; tables have room."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
