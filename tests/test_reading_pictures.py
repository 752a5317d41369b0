"""Reference pictures of every kind of file, from PIL and as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from backdrift import losses
from backdrift.errors import InputError
from backdrift.recipes.references import open_reference

RED = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
HALF_RED = torch.tensor([1.0, 127 / 255, 127 / 255]).view(3, 1, 1)  # half clear, on white
GREY = torch.full((3, 1, 1), 102 / 255)


def of_mode(mode: str) -> tuple[Any, torch.Tensor]:
    """A flat picture of a mode, and its colour."""
    if mode == "P":
        return Image.new("RGB", (4, 4), "red").convert("P"), RED
    if mode == "P, clear":
        picture = Image.new("RGB", (4, 4), "red").convert("P")
        picture.info["transparency"] = picture.getpixel((0, 0))
        return picture, torch.ones(3, 1, 1)
    if mode == "I;16":
        return Image.fromarray(numpy.full((4, 4), 26214, dtype="uint16")), torch.full((3, 1, 1), 0.4)
    if mode == "LA":
        return Image.new("LA", (4, 4), (102, 255)), GREY
    colours: dict[str, Any] = {
        "1": 1,
        "L": 102,
        "RGB": "red",
        "CMYK": (0, 255, 255, 0),
        "RGBA": (255, 0, 0, 128),
    }
    known = {"1": torch.ones(3, 1, 1), "L": GREY, "RGB": RED, "CMYK": RED, "RGBA": HALF_RED}
    return Image.new(mode, (4, 4), colours[mode]), known[mode]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P, clear", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture(mode: str, tmp_path: Path) -> None:
    picture, colour = of_mode(mode)
    wanted = colour.expand(3, 4, 4)
    torch.testing.assert_close(losses.load_picture(picture), wanted, rtol=0, atol=3e-3)
    ending = "tif" if mode == "CMYK" else "png"
    more = {"transparency": picture.info["transparency"]} if mode == "P, clear" else {}
    picture.save(tmp_path / f"x.{ending}", **more)
    torch.testing.assert_close(losses.load_picture(tmp_path / f"x.{ending}"), wanted, rtol=0, atol=3e-3)


def test_cameras_say_which_way_up(tmp_path: Path) -> None:
    upright = Image.fromarray(numpy.arange(24, dtype="uint8").reshape(4, 6) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "held.png", exif=exif)
    assert torch.equal(losses.load_picture(tmp_path / "held.png"), losses.load_picture(upright))


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    for given, words in (
        (tmp_path / "half.png", "cannot be read"),
        ("https://example.org/a.png", "is an address"),
        (Image.new("F", (4, 4)), "mode F"),
        (3, "got int"),
    ):
        with pytest.raises(InputError, match=words):
            losses.load_picture(given)


def test_losses_take_pil_pictures() -> None:
    picture = Image.fromarray((torch.rand(16, 16, 3).numpy() * 255).astype("uint8"))
    tensor = losses.load_picture(picture)
    images = torch.rand(2, 3, 16, 16)
    for kind in (losses.GramStyle, losses.Content, losses.CLIPImage, losses.MSE):
        assert torch.equal(kind(picture)(images), kind(tensor)(images))
    found, name = open_reference(picture)
    assert torch.equal(found, tensor)
    assert name == "a picture"


@pytest.mark.parametrize("kind", [losses.GramStyle, losses.Content, losses.CLIPImage])
@pytest.mark.parametrize(("scale", "shift"), [(255, 0), (2, -1)])
def test_references_on_another_scale_are_refused(kind: Any, scale: int, shift: int) -> None:
    reference = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * scale + shift
    with pytest.raises(InputError, match=r"for its reference.*in \[0, 1\]"):
        kind(reference)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (130, 7)])
@pytest.mark.parametrize("spec", ["style:skimage/coffee", "content:skimage/coffee", "clip-image:skimage/coffee",
                                  "clip:a red two", "class:seven", "preference", "brightness", "contrast"])  # fmt: skip
def test_pictures_of_any_proportions(spec: str, size: tuple[int, int]) -> None:
    """A value and a gradient for each, the same alone and together."""
    loss = losses.resolve(spec)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = loss(images)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert bool(gradient.isfinite().all())
    alone = torch.cat([loss(images[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, values, rtol=1e-4, atol=1e-4)
