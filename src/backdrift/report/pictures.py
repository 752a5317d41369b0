"""Pictures inside the page: embedded as data, small ones enlarged with hard pixels, flagged ones blurred."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

#: Pictures lower than this many pixels are shown enlarged, every pixel a crisp square.
SMALL = 192


def embed(folder: Path, name: str, entry: Mapping[str, Any], *, blur_flagged: bool = True) -> dict[str, Any]:
    """One picture of a record, ready for the template.

    A picture whose entry says ``"flagged": true`` is blurred beyond recognition *before* it is embedded,
    so that the page does not contain it.

    Raises:
        InputError: When the file is missing or no picture.
    """
    from PIL import Image, ImageFilter, UnidentifiedImageError

    path = folder / str(entry["path"])
    flagged = bool(entry.get("flagged"))
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGB")
            kind = (opened.format or "PNG").lower()
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(
            f"The picture {name!r} of the run in {str(folder)!r} cannot be read: {error}"
        ) from error
    width, height = picture.size
    if flagged and blur_flagged:
        small = picture.resize((max(1, 4 * width // height), 4), Image.Resampling.BOX)
        blurred = small.resize(picture.size, Image.Resampling.BICUBIC).filter(
            ImageFilter.GaussianBlur(height / 16)
        )
        buffer = io.BytesIO()
        blurred.save(buffer, format="PNG")
        data, kind = buffer.getvalue(), "png"
    scale = max(1, round(256 / height)) if height < SMALL else 1
    return {
        "name": name,
        "caption": str(entry.get("caption") or name),
        "uri": f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}",
        "width": width,
        "height": height,
        "shown": width * scale,
        "least": round(width * max(1.0, 80 / height)),  # on a phone a row scrolls rather than shrinks
        "crisp": height < SMALL,
        "strip": width > 1.9 * height,  # several side by side: gets the page's whole width
        "hidden": flagged and blur_flagged,
    }
