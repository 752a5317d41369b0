"""Photographs by name, ``skimage/coffee``: those that lie in an installed scikit-image or scikit-learn.

Nothing of those packages is imported, and nothing is fetched: only what their wheels carry has a name.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from ..errors import InputError
from ..suggest import closest

# name -> (distribution, folder of its pictures)
PACKAGES = {"skimage": ("scikit-image", "data"), "sklearn": ("scikit-learn", "datasets/images")}
_NAME = re.compile(rf"({'|'.join(PACKAGES)})/([\w-]+)(?:\.\w+)?$")


def photograph(name: str | Path) -> Path | None:
    """The file of a photograph called ``skimage/coffee`` or ``sklearn/china``; None for a name of another kind.

    Raises:
        InputError: When the package is not installed, or has no such picture.
    """
    found = _NAME.match(Path(name).as_posix())
    if found is None:
        return None
    package, wanted = found[1], found[2]
    known = photographs(package)
    if wanted not in known:
        raise InputError(
            f"There is no photograph {wanted!r} in {package}.{closest(wanted, known)} There are: "
            f"{', '.join(known)}; or give a picture file."
        )
    return known[wanted]


def photographs(package: str) -> dict[str, Path]:
    """Every picture (``.png``, ``.jpg``) that an installed package carries, by its name without the ending.

    Args:
        package: ``"skimage"`` or ``"sklearn"``.

    Raises:
        InputError: When it is another one, or not installed.
    """
    if package not in PACKAGES:
        raise InputError(f"Photographs come from {' or '.join(PACKAGES)}, got {package!r}.")
    distribution, folder = PACKAGES[package]
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise InputError(
            f"The photographs {package}/… come with {distribution}, which is not installed: pip install "
            f"'backdrift[training]' (or {distribution}), or give a picture file."
        )
    files = sorted(p for place in places for p in (Path(place) / folder).glob("*.*"))
    return {p.stem: p for p in files if p.suffix in (".png", ".jpg", ".jpeg")}
