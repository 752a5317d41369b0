"""Folders that are written to, looked at before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError


def check_writable(folder: Path, flag: str = "--out") -> None:
    """See that ``folder`` is there and can be written to, or can be made; nothing is made yet.

    Args:
        flag: what the folder was given by, for the message.

    Raises:
        InputError: it is a file, lies in one, or may not be written to.
    """
    try:
        place = next(p for p in (folder, *folder.parents, Path()) if p.exists())
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise InputError(
            f"{flag} {str(folder)!r} cannot be used: {error.strerror}. Give another folder."
        ) from None
    if not place.is_dir():
        which = "is a file" if place == folder else f"lies in {str(place)!r}, which is a file"
        raise InputError(f"{flag} {str(folder)!r} {which}; give the name of a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"{flag} {str(folder)!r}: {str(place)!r} may not be written to; give another folder."
        )


def check_new(folder: Path, overwrite: bool) -> None:
    """See that ``folder`` holds nothing yet, unless that may be written over.

    Raises:
        InputError: it holds something.
    """
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"--out {str(folder)!r} is not empty; give another folder, or --overwrite.")
