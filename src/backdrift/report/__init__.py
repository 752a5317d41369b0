"""Reports: a run's record as one self-contained HTML page.

The page needs no network, no script and no other file, and is drawn from ``record.json`` and the pictures
beside it alone: no GPU, no torch. See :mod:`backdrift.run` for the record's format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import InputError

__all__ = ["write", "write_many"]


def write(folder: str | Path, *, blur_flagged: bool = True) -> Path:
    """Draw ``<folder>/report.html`` from the run or the certificate in ``folder`` and return its path.

    Args:
        folder: The run's folder, finished or not; or that of a certificate (see :mod:`backdrift.report.certificate`).
        blur_flagged: Blur the pictures that a safety filter flagged (``"flagged": true`` in the record).

    Raises:
        InputError: When there is no readable record, or a picture that it names is missing.
    """
    folder = Path(folder)
    if _format(folder) == "backdrift-certificate/1":
        from . import certificate

        return certificate.write(folder)
    return write_many([folder], folder / "report.html", blur_flagged=blur_flagged)


def write_many(
    folders: Sequence[str | Path],
    path: str | Path,
    *,
    title: str | None = None,
    intro: str = "",
    blur_flagged: bool = True,
) -> Path:
    """Draw one page about several runs, in their order, at ``path``.

    Args:
        title: The page's heading; by default the only run's title.
        intro: A paragraph below it.

    Raises:
        InputError: As :func:`write`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from .view import view

    runs = [view(Path(f), _record(Path(f)), blur_flagged=blur_flagged) for f in folders]
    if not runs:
        raise InputError("A report needs at least one run.")
    environment = Environment(
        loader=PackageLoader("backdrift.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("page.html").render(
        title=title or runs[0]["title"],
        intro=intro,
        runs=runs,
        several=title is not None,
        version=__version__,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(path)  # a reader sees the old page or the new one
    finally:
        beside.unlink(missing_ok=True)
    return path


def _format(folder: Path) -> Any:
    """The format that a folder's record names; None where there is none to read."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record.get("format") if isinstance(record, dict) else None


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{str(folder)!r} is not the folder of a run: it has no record.json.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"The record {str(path)!r} cannot be read: {error}") from error
    known = str(record.get("format", "")) if isinstance(record, dict) else ""
    if not known.startswith("backdrift-run/1"):
        raise InputError(
            f"{str(path)!r} is not a run's record that this version reads (format {known or 'none'!r})."
        )
    return record
