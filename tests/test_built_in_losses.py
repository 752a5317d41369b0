"""Losses on the shipped networks: derivatives, options, photographs, sums."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backdrift import losses
from backdrift.errors import InputError
from backdrift.losses.feature_maps import as_features
from backdrift.pipelines.assets import load_classifier
from tiny_losses import pictures, slopes


@pytest.fixture
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    array = (pictures(1, 64, seed=5)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(array).save(tmp_path / "ref.png")
    return tmp_path


BUILT_IN = [
    "preference",
    "kind:plain seven (margin)",
    "style:ref.png",
    "style:ref.png (block 1)",
    "style:ref.png@built-in:classifier",
    "style:ref.png@built-in:classifier (block 2)",
    "content:ref.png",
    "content:ref.png@built-in:classifier",
    "clip-image:ref.png",
    "clip-image:ref.png (cosine)",
    "clip:a red seven on grass",
    "class:seven (logit)",
    "class:colour=red (logit)",
    "class:background=grass (logit)",
    "class:a red seven on grass",
    "class:seven (margin)",
    "10*preference + 2*clip:a red seven + 0.5*style:ref.png",
]


@pytest.mark.parametrize("spec", BUILT_IN)
def test_gradients_on_the_shipped_networks_are_the_derivatives(spec: str, references: Path) -> None:
    loss = losses.resolve(spec).double()
    images = pictures(2, 72) * 1.2 - 0.1  # resized, and over [0, 1] on either side
    by_gradient, by_differences = slopes(loss, images)
    assert by_gradient.abs().min() > 0
    torch.testing.assert_close(by_gradient, by_differences, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("spec", BUILT_IN)
def test_a_sample_has_its_own_value_and_the_spec_means_itself(spec: str, references: Path) -> None:
    loss = losses.resolve(spec).double()
    images = pictures(3)
    values = loss(images)
    alone = torch.cat([loss(image[None]) for image in images])
    torch.testing.assert_close(values, alone, rtol=1e-10, atol=1e-12)
    again = losses.resolve(loss.spec).double()
    torch.testing.assert_close(again(images), values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spec", [s for s in BUILT_IN if "+" not in s])
def test_pictures_on_another_scale_are_refused(spec: str, references: Path) -> None:
    with pytest.raises(InputError, match=r"takes pictures in \[0, 1\], got values from"):
        losses.resolve(spec)(pictures(1, dtype=torch.float32) * 255)


def test_options_in_parentheses_are_those_of_python(references: Path) -> None:
    images, ref = pictures(2, dtype=torch.float32), references / "ref.png"
    pairs: list[tuple[str, losses.Loss]] = [
        ("class:seven (logit)", losses.ClassTarget("seven", form="logit")),
        ("class:a red seven ( margin )", losses.ClassTarget("a red seven", form="margin")),
        ("clip-image:ref.png (cosine)", losses.CLIPImage(ref, distance="cosine")),
        ("style:ref.png (block 1)", losses.GramStyle(ref, block=1)),
        ("content:ref.png (block 4)", losses.Content(ref, block=4)),
    ]
    for spec, made in pairs:
        assert torch.equal(losses.resolve(spec)(images), made(images)), spec
    assert losses.ClassTarget("seven", form="logit").spec == "class:seven (logit)"
    assert losses.GramStyle("ref.png", block=1).spec == "style:ref.png (block 1)"
    assert losses.GramStyle("ref.png").spec == "style:ref.png"
    with pytest.raises(InputError, match=r"no option 'logti'\. Did you mean 'logit'\?"):
        losses.resolve("class:seven (logti)")
    (references / "ref.png").rename(references / "ref (copy)")
    losses.resolve("style:ref (copy)")  # parentheses that are no option belong to the name


def test_feature_maps_are_what_the_classifier_computes() -> None:
    network, seen = load_classifier(), {}
    for block in range(1, 5):
        network.features[6 * block - 1].register_forward_hook(
            lambda module, given, out, block=block: seen.update({block: out})
        )
    images = pictures(2, dtype=torch.float32)
    network(images)
    whole = as_features(network)
    for block in range(1, 5):
        got = whole.up_to(block).tokens(images)
        expected = seen[block].flatten(2).transpose(1, 2)
        assert got.shape == (2, (64 >> block) ** 2, expected.shape[2])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert len(network.features) == 24
    tokens = [s.flatten(2).mT for s in (seen[2][:1], seen[2][1:])]
    apart = sum(torch.outer(t, t) for t in tokens[0][0]) - sum(torch.outer(t, t) for t in tokens[1][0])
    loss = losses.GramStyle(images[1], "built-in:classifier", block=2)
    torch.testing.assert_close(loss(images[:1])[0], apart.square().sum().sqrt(), rtol=1e-4, atol=1e-4)


def test_networks_and_blocks_that_do_not_exist_are_named() -> None:
    image = pictures(1, dtype=torch.float32)
    with pytest.raises(InputError, match="there are: built-in:clip, built-in:classifier"):
        losses.GramStyle(image, "built-in:vgg")
    with pytest.raises(InputError, match="classifier's blocks are 1 to 4, got block=5"):
        losses.GramStyle(image, "built-in:classifier", 5)
    assert torch.equal(
        losses.GramStyle(image, "built-in:clip")(image.flip(3)), losses.GramStyle(image)(image.flip(3))
    )


def test_a_photograph_is_the_file_that_scikit_image_carries() -> None:
    skimage = pytest.importorskip("skimage")
    picture = Image.open(Path(skimage.__path__[0]) / "data" / "coffee.png").convert("RGB")
    expected = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(losses.load_picture("skimage/coffee"), expected)
    assert torch.equal(losses.load_picture("skimage/coffee.png"), expected)
    images = pictures(1, dtype=torch.float32)
    for name in ("style", "content", "clip-image"):
        by_name = losses.resolve(f"{name}:skimage/coffee")
        kind = losses.kinds()[name]
        assert torch.equal(by_name(images), kind(expected)(images))
        assert by_name.spec == f"{name}:skimage/coffee"
    assert {"astronaut", "chelsea", "coffee", "grass"} <= set(losses.photographs("skimage"))


def test_a_file_comes_before_a_photograph(references: Path) -> None:
    (references / "skimage").mkdir()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(references / "skimage" / "coffee.png")
    assert losses.load_picture("skimage/coffee.png").shape == (3, 4, 4)


def test_photographs_that_are_not_there_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    with pytest.raises(InputError, match=r"no photograph 'cofee' in skimage\. Did you mean 'coffee'\?"):
        losses.resolve("style:skimage/cofee")
    with pytest.raises(InputError, match="'nowhere/coffee' does not exist"):
        losses.resolve("style:nowhere/coffee")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"scikit-image, which is not installed: pip install 'backdrift\[training\]'"
    ):
        losses.resolve("style:skimage/coffee")
    with pytest.raises(InputError, match="come from skimage or sklearn"):
        losses.photographs("os")


def test_lists_of_weights_and_losses_are_sums() -> None:
    grey = torch.full((2, 3, 32, 32), 0.5, dtype=torch.float64)
    three = [
        (10, "brightness"),
        (0.5, lambda x: x.flatten(1).sum(1)),
        (np.float32(2), losses.Saturation(1.0)),
    ]
    expected = 10 * 0.5 + 0.5 * 0.5 * 3 * 32 * 32 + 2.0
    assert losses.resolve(three)(grey).tolist() == pytest.approx([expected] * 2)
    assert losses.resolve([(1, "brightness")])(grey).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "at least one term"),
        (["brightness"], r"holds pairs \(weight, loss\)"),
        ([("brightness", 10)], r"holds pairs \(weight, loss\)"),
        ([(1, "brightness", 2)], r"holds pairs \(weight, loss\)"),
        ([(math.nan, "brightness")], "weight of the loss 'brightness' must be a finite number, got nan"),
        ([(None, "brightness")], "must be a finite number, got None"),
        ({"brightness": math.inf}, "must be a finite number, got inf"),
        ({"brightness": "2"}, "must be a finite number, got '2'"),
        ("pickscore*10 + brightness", r"stands before its loss: 10\*pickscore"),
        ("10 pickscore", r"stands a star: 10\*pickscore"),
        ("10pickscore:a two", r"stands a star: 10\*pickscore"),
        ("2*-brightness", r"as in -2\*brightness"),
        ("brightness - contrast", r"Terms are added: brightness \+ -contrast"),
    ],
)
def test_weights_that_cannot_be_read(spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        losses.resolve(spec)
