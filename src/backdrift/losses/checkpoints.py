"""Weights by file, folder or hub id, for networks that transformers has no class for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError


def find_weights(source: str | Path, names: Sequence[str], what: str) -> Path:
    """The local path of a checkpoint.

    Args:
        source: A file; a folder; a hub id ``owner/name``; or a file of one, ``owner/name/file``.
        names: Of the file, the wanted first, in a folder or on the hub.
        what: It is, for the message.

    Raises:
        InputError: When there is no such file, or it cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise InputError(f"The folder {str(source)!r} has no weights of {what}: none of {', '.join(names)}.")
    words = str(source).split("/")
    if path.is_absolute() or len(words) < 2 or str(source).startswith("."):
        raise InputError(
            f"The weights of {what} are not there: {str(source)!r} is no file (seen from {Path.cwd()}). Give a file, "
            f"a folder that has one of {', '.join(names)}, or a hub id owner/name[/file]."
        )
    from huggingface_hub import hf_hub_download

    repository, file = "/".join(words[:2]), "/".join(words[2:])
    failed: Exception | None = None
    for name in [file] if file else names:
        try:
            return Path(hf_hub_download(repository, name))
        except Exception as error:  # the hub's errors have no base of their own across its versions
            failed = error
    line = (str(failed).strip().splitlines() or [type(failed).__name__])[0]
    raise InputError(f"The weights of {what} cannot be fetched from {str(source)!r}: {line}") from failed


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a ``.safetensors`` file or of one that ``torch.save`` wrote, on the CPU.

    Only tensors are unpickled. A table inside, ``state_dict``, is taken out.

    Raises:
        InputError: When the file holds no table of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each have their own
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{str(path)!r} cannot be read as weights: {line}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError(f"{str(path)!r} holds no table of tensors by name (a state_dict).")
    return found
