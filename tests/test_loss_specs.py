"""Losses as users write them: sums, spec strings, callables; what goes in and comes out is checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backdrift import losses
from backdrift.errors import InputError
from backdrift.losses import base


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("2*brightness", 2 * 0.5),
        ("brightness + 0.5*brightness:0", 0.5 + 0.5 * 0.25),
        ("1e-1*brightness+1e+1*saturation:1", 0.05 + 10),
        ("-2 * brightness", -1.0),
        (".5*brightness + -brightness", -0.25),
        ({"brightness": 3.0, "saturation:1": 2}, 1.5 + 2),
    ],
)
def test_sums(spec: str | dict, expected: float) -> None:
    grey = torch.full((2, 3, 32, 32), 0.5, dtype=torch.float64)
    assert losses.resolve(spec)(grey).tolist() == pytest.approx([expected] * 2)


def test_a_sum_tells_its_parts_and_its_spec_means_itself() -> None:
    grey = torch.full((1, 3, 32, 32), 0.5)
    loss = losses.resolve("2*brightness + saturation:1")
    loss(grey)
    assert {k: v.item() for k, v in loss.parts.items()} == pytest.approx(
        {"brightness": 0.5, "saturation:1": 1.0}
    )
    again = losses.resolve(loss.spec)
    assert again(grey).item() == loss(grey).item()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "brightnes",
            r"no loss called 'brightnes'\. Did you mean 'brightness'\? There are: aesthetic, ambigram, brightness, ",
        ),
        ("", "An empty term"),
        ("brightness +", "An empty term"),
        ('clip:"two', "is not closed"),
        ("class", "needs a class"),
        ("mse", "needs a target picture"),
        ("nowhere.py:f", r"'nowhere\.py' does not exist"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        losses.resolve(spec)


def test_a_loss_of_ones_own_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def dark(images):\n    return images.flatten(1).mean(1)\n\nwords = 3\n")
    grey = torch.full((2, 3, 4, 4), 0.5)
    loss = losses.resolve(f"2*{file}:dark")
    assert loss(grey).tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match="no callable 'light'; it has: dark"):
        losses.resolve(f"{file}:light")
    with pytest.raises(InputError, match="no callable 'words'"):
        losses.resolve(f"{file}:words")
    file.write_text("import nothing_of_the_kind\n")
    with pytest.raises(InputError, match="fails on import: ModuleNotFoundError"):
        losses.resolve(f"{file}:dark")


def test_callables_get_the_prompts_they_ask_for() -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    seen: list[object] = []

    def keyword(images: Tensor, *, prompts: list[str] | None = None) -> Tensor:
        seen.append(prompts)
        return images.mean((1, 2, 3))

    def second(pictures: Tensor, texts: list[str]) -> Tensor:
        seen.append(texts)
        return pictures.mean((1, 2, 3))

    losses.resolve(keyword)(images, "x")
    losses.resolve(second)(images, ["x", "y"])
    assert seen == [["x", "x"], ["x", "y"]]
    assert (
        losses.resolve(lambda images, power=2: images.pow(power).mean((1, 2, 3)))(images, "x").tolist()
        == [0.25] * 2
    )
    with pytest.raises(InputError, match="3 prompts for 2 pictures"):
        losses.resolve(second)(images, ["x", "y", "z"])
    with pytest.raises(InputError, match="spec string or a callable, got int"):
        losses.resolve(3)  # type: ignore[arg-type]


def test_what_goes_in_and_comes_out_is_checked() -> None:
    mean = losses.resolve(lambda images: images.mean())
    assert mean(torch.full((1, 3, 4, 4), 0.5)).tolist() == [0.5]
    with pytest.raises(InputError, match=r"returned a tensor of shape \(\) for 2 picture"):
        mean(torch.zeros(2, 3, 4, 4))
    with pytest.raises(InputError, match=r"returned float for 1 picture"):
        losses.resolve(lambda images: 1.0)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match=r"returned a tensor of torch\.int64"):
        losses.resolve(lambda images: torch.ones(1, dtype=torch.int64))(torch.zeros(1, 3, 4, 4))
    brightness = losses.resolve("brightness")
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(0, 3, 4, 4)):
        with pytest.raises(InputError, match=r"shape \(N, 3, H, W\)"):
            brightness(wrong)
    with pytest.raises(InputError, match=r"torch\.uint8"):
        brightness(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_two_losses_cannot_share_a_name() -> None:
    with pytest.raises(InputError, match="Two losses are called 'brightness'"):

        @losses.register("brightness")
        class Other(base.Loss):
            pass


def test_the_docs_name_every_loss() -> None:
    page = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted(losses.kinds())
