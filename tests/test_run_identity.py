"""What makes two runs the same run: what a loss computes, not its name; which picture, not that there is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from backdrift import optimize
from backdrift.descent.code import describe_function
from backdrift.descent.subject import describe_value
from backdrift.errors import InputError
from backdrift.losses import MSE
from backdrift.run import Run
from linear_pipeline import linear_pipeline, start

LEVEL = 0.3


def descend(out: Path, loss: Any, **kwargs: Any) -> Run:
    return optimize(
        linear_pipeline(),
        "a 2",
        loss,
        num_inference_steps=2,
        steps=1,
        noise=start(),
        progress=False,
        out=out,
        **kwargs,
    )


def toward(target: Tensor | float) -> Callable[[Tensor], Tensor]:
    return lambda images: (images - target).square().flatten(1).mean(1)


def square(x: Tensor) -> Tensor:
    return x.square()


def by_helper(images: Tensor) -> Tensor:
    return square(images - LEVEL).flatten(1).mean(1)


class Toward:
    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.target).square().flatten(1).mean(1)


class Network(nn.Module):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, images: Tensor) -> Tensor:
        return images.abs().pow(self.power).flatten(1).mean(1)


def test_an_edited_loss_is_another_run(tmp_path: Path) -> None:
    """The first lambda's finished run used to be handed back for the second one."""
    first = descend(tmp_path / "a", lambda images: (images - 0.3).square().flatten(1).mean(1))
    again = descend(tmp_path / "a", lambda images: (images - 0.3).square().flatten(1).mean(1))
    assert again.record == first.record
    with pytest.raises(InputError, match="loss_code"):
        descend(tmp_path / "a", lambda images: (images - 0.7).square().flatten(1).mean(1))


def test_an_edited_file_of_losses_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = "def far(images):\n    # how far\n    return (images - 0.3).abs().flatten(1).mean(1)\n"
    file.write_text(text)
    descend(tmp_path / "a", f"{file}:far")
    file.write_text(text.replace("# how far", "# as far as that"))
    descend(tmp_path / "a", f"{file}:far")  # a comment changes nothing
    file.write_text(text.replace("0.3", "0.4"))
    with pytest.raises(InputError, match="loss_code"):
        descend(tmp_path / "a", f"{file}:far")


def test_another_judge_is_another_run(tmp_path: Path) -> None:
    target = torch.full((3, 8, 8), 0.5)
    descend(tmp_path / "a", "brightness", heldout=MSE(target))
    with pytest.raises(InputError, match="heldout_tensors"):
        descend(tmp_path / "a", "brightness", heldout=MSE(target + 0.1))


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (toward(0.3), toward(0.3), toward(0.4)),
        (toward(torch.ones(3)), toward(torch.ones(3)), toward(torch.ones(3) * 2)),
        (Toward(0.3), Toward(0.3), Toward(0.4)),
        (Toward(0.3).__call__, Toward(0.3).__call__, Toward(0.4).__call__),
        (partial(torch.add, 1), partial(torch.add, 1), partial(torch.add, 2)),
        (Network(2.0), Network(2.0), Network(3.0)),
        (nn.Dropout(0.1), nn.Dropout(0.1), nn.Dropout(0.2)),
    ],
)
def test_functions_are_told_apart_by_what_they_compute(one: Any, same: Any, other: Any) -> None:
    assert describe_function(one) == describe_function(same)
    assert describe_function(one) != describe_function(other)


def test_the_functions_and_settings_that_a_loss_names_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe_function(by_helper)
    assert describe_function(by_helper) == before
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "LEVEL", 0.4)
        assert describe_function(by_helper) != before
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "square", Tensor.abs)
        assert describe_function(by_helper) != before
    assert describe_function(by_helper) == before


def test_pictures_and_arrays_are_told_apart_by_their_contents() -> None:
    pictures = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in (0, 0, 1)]
    arrays = [numpy.asarray(p) for p in pictures]
    for values in (pictures, arrays, [numpy.float32(0.5), numpy.float32(0.5), numpy.float32(0.25)]):
        first, same, other = (describe_value({"image": value}) for value in values)
        assert first == same != other
