"""Pipelines from their configurations alone, on the meta device: no weights, no network, no memory to speak of.

The configurations of common models ship with the package; a folder with ``model_index.json`` serves as well.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..suggest import closest
from .assets import PIPELINES, folder

__all__ = ["Tokens", "configured", "known"]

_HERE = Path(__file__).parent / "configurations"


@cache
def known() -> dict[str, Path]:
    """Names and hub ids of the models whose configurations ship with the package."""
    files = [p for p in sorted(_HERE.glob("*.json")) if p.stem != "losses"]
    return {name: path for path in files for name in json.loads(path.read_text())["names"]}


@cache
def loss_networks() -> dict[str, dict[str, Any]]:
    """Vision configurations of CLIP models by name, for losses that are only counted."""
    return json.loads((_HERE / "losses.json").read_text())


def configured(model: str | Path, dtype: torch.dtype) -> tuple[Any, int | None]:
    """A pipeline on the meta device, in one dtype, and the picture size that it is made for (None: its own default).

    Args:
        model: one of :func:`known`, a built-in pipeline, or a folder as ``save_pretrained`` writes it. Only its
            configuration files are read.

    Raises:
        InputError: neither known nor a folder.
    """
    name = str(model)
    if name in PIPELINES:
        return _from_folder(folder(name), dtype), None
    if name in known():
        index = json.loads(known()[name].read_text())
        parts = {key: _part(entry, dtype) for key, entry in index["components"].items()}
        return _assembled(index["pipeline"], parts), index["size"]
    path = Path(name)
    if (path / "model_index.json").is_file():
        return _from_folder(path, dtype), None
    raise InputError(
        f"no configuration of {name!r} is known.{closest(name, known())} There are: {', '.join(known())}, "
        f"{', '.join(PIPELINES)}; or give a folder that holds model_index.json and the components' config.json files "
        "(a saved pipeline; its weights are not read), or a pipeline that you have loaded"
    )


def _part(entry: Any, dtype: torch.dtype) -> Any:
    if entry is None:
        return None
    if entry["library"] == "tokens":
        return Tokens(entry["length"])
    cls = getattr(importlib.import_module(entry["library"]), entry["class"])
    return _made(cls, entry["config"], dtype)


def _made(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A component of a class from its configuration, networks on the meta device."""
    if hasattr(cls, "config_class") and cls.config_class is not None:  # of transformers
        if isinstance(config, dict):
            config = cls.config_class(**config)
        with torch.device("meta"):
            return cls(config).to(dtype).eval()
    if not issubclass(cls, nn.Module):
        return cls.from_config(config)
    with torch.device("meta"):
        made = cls.from_config(config)
    for tensor in [*made.parameters(), *made.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return made.eval()


def _from_folder(path: Path, dtype: torch.dtype) -> Any:
    index = json.loads((path / "model_index.json").read_text())
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, list):
            if not name.startswith("_"):
                parts[name] = entry  # a setting of the pipeline
            continue
        library, cls_name = entry
        parts[name] = None if cls_name is None else _from_files(path / name, library, cls_name, dtype)
    return _assembled(index["_class_name"], parts)


def _from_files(path: Path, library: str, cls_name: str, dtype: torch.dtype) -> Any:
    home = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    try:
        cls: Any = getattr(importlib.import_module(home), cls_name)
    except (ImportError, AttributeError):
        raise InputError(
            f"{path} is a {cls_name} of {library!r}, which is not installed or runs remote code"
        ) from None
    if "Tokenizer" in cls_name:
        return cls.from_pretrained(path) if path.is_dir() else Tokens(77)
    if getattr(cls, "config_class", None) is not None:
        return _made(cls, cls.config_class.from_pretrained(path), dtype)
    if hasattr(cls, "load_config"):
        return _made(cls, cls.load_config(path), dtype)
    return cls.from_pretrained(path)


def _assembled(cls_name: str, parts: dict[str, Any]) -> Any:
    import diffusers

    if parts.get("safety_checker") is not None and parts.get("feature_extractor") is None:
        parts["feature_extractor"] = Tokens(0)  # has to be there, and is not used

    cls = getattr(diffusers, cls_name)
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Tokens:
    """Stands in for a tokenizer: every text is as long as texts may be.

    Args:
        length: of a text in tokens, where the pipeline does not say.
    """

    def __init__(self, length: int) -> None:
        self.model_max_length = length
        self.added_tokens_encoder: dict[str, int] = {}

    def __call__(self, text: Any, max_length: int | None = None, **kwargs: Any) -> Any:
        from transformers import BatchEncoding

        rows = 1 if isinstance(text, str) else len(text)
        ids = torch.zeros(rows, max_length or self.model_max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def batch_decode(self, ids: Any) -> list[str]:
        return [""] * len(ids)
