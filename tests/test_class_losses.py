"""Losses on classifiers: forms against PyTorch's, classes in phrases, ambigrams."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from backdrift import losses
from backdrift.errors import InputError
from backdrift.losses import clip
from tiny_heads import tiny_heads
from tiny_losses import pictures


def test_class_forms_against_pytorch() -> None:
    network = tiny_heads().double()
    images = pictures(2)
    logits = network(images)
    seven, red = 7, 0
    got = losses.ClassTarget("a red seven", network)(images)
    expected = nn.functional.cross_entropy(logits["digit"], torch.tensor([seven] * 2), reduction="none")
    expected = expected + nn.functional.cross_entropy(
        logits["colour"], torch.tensor([red] * 2), reduction="none"
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    got = losses.ClassTarget("seven", network, "logit")(images)
    torch.testing.assert_close(got, -logits["digit"][:, seven])
    margin = losses.ClassTarget("seven", network, "margin")(images)
    for i in range(2):
        others = [logits["digit"][i, k].item() for k in range(10) if k != seven]
        assert margin[i].item() == pytest.approx(max(others) - logits["digit"][i, seven].item())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seven", {"digit": 7}),
        ("SEVEN", {"digit": 7}),
        ("grass", {"background": 2}),
        ("a red seven on grass", {"digit": 7, "colour": 0, "background": 2}),
        ("a white two on white", {"digit": 2, "colour": 3, "background": 0}),
        ("a two on white", {"digit": 2, "background": 0}),
        ("background=white, digit=one", {"background": 0, "digit": 1}),
    ],
)
def test_classes_are_found_in_phrases(text: str, expected: dict[str, int]) -> None:
    assert losses.Classifier(tiny_heads()).find(text) == expected


def test_classes_that_do_not_exist_are_refused() -> None:
    known = losses.Classifier(tiny_heads())
    with pytest.raises(InputError, match=r"no class 'sevn'\. Did you mean 'seven'\?"):
        known.find("sevn")
    with pytest.raises(InputError, match=r"no head 'hue'; it has digit, colour, background"):
        known.find("hue=red")
    with pytest.raises(InputError, match=r"'colour' has no class 'gren'\. Did you mean 'green'\?"):
        known.find("colour=gren")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    assert losses.Classifier(plain).find("3") == {"class": 3}
    with pytest.raises(InputError, match="have no names; give a number"):
        losses.Classifier(plain).find("cat")
    with pytest.raises(InputError, match="Class 9 does not exist: the classifier has 4 classes"):
        losses.ClassTarget(9, plain)(torch.rand(1, 3, 2, 2))
    with pytest.raises(InputError, match="is in training mode"):
        losses.Classifier(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)))


@pytest.mark.parametrize("resample", [2, 3])  # Pillow's bilinear and bicubic
def test_a_transformers_classifier_sees_what_its_own_processor_makes(tmp_path: Path, resample: int) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config.id2label = {0: "cat", 1: "dog", 2: "tabby cat"}
    config.num_labels = 3
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(
        size={"height": 16, "width": 16},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
        resample=resample,
    )
    processor.save_pretrained(tmp_path)
    array = (pictures(1, 48)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(array)
    with torch.no_grad():
        logits = model(**processor(picture, return_tensors="pt")).logits
    loss = losses.resolve(f"class:tabby cat@{tmp_path}")
    images = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    expected = nn.functional.cross_entropy(logits, torch.tensor([2]))
    # the processor rounds the resized picture to 8 bits, hence not closer
    assert loss(images).item() == pytest.approx(expected.item(), abs=2e-3)
    with pytest.raises(InputError, match="No image classifier can be loaded from"):
        losses.resolve(f"class:cat@{tmp_path / 'nowhere'}")


def test_ambigram_is_the_sum_of_its_two_readings() -> None:
    network = tiny_heads().double()
    images = pictures(2)
    loss = losses.Ambigram("two", "seven", network)
    upright = losses.ClassTarget("two", network)(images)
    turned = losses.ClassTarget("seven", network)(torch.rot90(images, 2, (2, 3)))
    torch.testing.assert_close(loss(images), upright + turned, rtol=1e-12, atol=0)
    # and turning the picture exchanges the two wishes
    torch.testing.assert_close(
        losses.Ambigram("seven", "two", network)(images.rot90(2, (2, 3))), loss(images)
    )
    reads = loss.reads(images)
    views = torch.stack(
        [network(images)["digit"].argmax(1) == 2, network(images.rot90(2, (2, 3)))["digit"].argmax(1) == 7]
    )
    assert torch.equal(reads, views.T)
    with pytest.raises(InputError, match="needs two classes"):
        losses.resolve("ambigram:two")


@pytest.mark.parametrize("degrees", [0.0, 1e-4, 1.0, 60.0, 90.0, 179.0, 180.0])
def test_angles_are_exact_and_their_slope_finite(degrees: float) -> None:
    theta = math.radians(degrees)
    u = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=torch.float64)
    spherical = clip.angle_loss(u, v, "spherical")
    cosine = clip.angle_loss(u, v, "cosine")
    assert spherical.item() == pytest.approx(theta**2 / 2, rel=1e-9)
    assert cosine.item() == pytest.approx(2 * math.sin(theta / 2) ** 2, rel=1e-9)
    (gradient,) = torch.autograd.grad(spherical.sum() + cosine.sum(), u)
    assert gradient.isfinite().all()
