"""The contract of every loss, and the closed forms of those without a network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from backdrift import losses
from backdrift.errors import InputError
from backdrift.losses import clip, measurements
from tiny_heads import tiny_heads
from tiny_losses import pictures, save_all
from tiny_losses import tiny_clip as make_clip


@pytest.fixture
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return make_clip(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def builtin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_clip: dict) -> Path:
    """Small random networks in the place of the built-in ones; in the working folder what the examples name."""
    import sys
    from types import ModuleType

    import backdrift.pipelines as room
    from backdrift.pipelines.assets import folder

    assets = ModuleType("backdrift.pipelines.assets")
    assets.load_clip = lambda: (tiny_clip["model"], tiny_clip["tokenizer"])  # type: ignore[attr-defined]
    assets.load_classifier = tiny_heads  # type: ignore[attr-defined]
    assets.folder = folder  # type: ignore[attr-defined]  # the classifier of kinds is small as it ships
    monkeypatch.setitem(sys.modules, assets.__name__, assets)
    monkeypatch.setattr(room, "assets", assets, raising=False)
    monkeypatch.chdir(tmp_path)
    save_all(tmp_path, tiny_clip)
    return tmp_path


# Rectifiers and maxima have kinks: the fewer lie within a step, the shorter it is.
KINKED = ("perceptual", "vgg-content", "vgg-style")


# ---- the contract, of every loss that has a name -----------------------------------------------------


@pytest.mark.parametrize("name", sorted(losses.kinds()))
def test_every_named_loss_keeps_the_contract(name: str, builtin: Path) -> None:
    loss = losses.resolve(losses.kinds()[name].example).double()
    images = pictures(3) * 1.2 - 0.1  # overshoots [0, 1], as an unclamped picture may
    images.requires_grad_()
    values = loss(images, ["a red two"] * 3)
    assert values.shape == (3,)
    assert values.dtype == torch.float64
    (gradient,) = torch.autograd.grad(values.sum(), images)

    # each sample's value is its own, whatever is beside it in the batch
    alone = torch.cat([loss(images[i : i + 1], ["a red two"]) for i in range(3)])
    torch.testing.assert_close(alone, values, rtol=1e-12, atol=1e-14)

    # the gradient is the derivative: central differences along a random direction
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-9 if name in KINKED else 1e-6
    with torch.no_grad():
        ahead = loss(images + step * direction, ["a red two"] * 3)
        behind = loss(images - step * direction, ["a red two"] * 3)
    slope = (gradient * direction).flatten(1).sum(1)
    assert slope.abs().min() > 0
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", sorted(losses.kinds()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_named_loss_takes_half_precision(name: str, dtype: torch.dtype, builtin: Path) -> None:
    loss = losses.resolve(losses.kinds()[name].example)
    images = pictures(2, dtype=torch.float32).to(dtype).requires_grad_()
    values = loss(images, "a red two")
    assert values.dtype == torch.float32
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert gradient.dtype == dtype
    # as accurate as the pictures are: the same rounded pictures in float64 give the same value
    torch.testing.assert_close(
        values.double(), loss.double()(images.double(), "a red two"), rtol=1e-4, atol=1e-5
    )


# ---- known answers -----------------------------------------------------------------------------------


def test_mse_closed_form_and_gradient() -> None:
    target = torch.full((3, 8, 8), 0.25, dtype=torch.float64)
    images = torch.full((2, 3, 8, 8), 0.75, dtype=torch.float64)
    images[1] = 0.25
    images.requires_grad_()
    values = losses.MSE(target)(images)
    assert values.tolist() == [0.25, 0.0]
    (gradient,) = torch.autograd.grad(values.sum(), images)
    torch.testing.assert_close(gradient[0], torch.full_like(target, 2 * 0.5 / 192))


def test_mse_resizes_a_target_of_the_same_proportions() -> None:
    flat = torch.full((3, 16, 32), 0.5)
    assert losses.MSE(flat)(torch.full((1, 3, 8, 16), 0.5)).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match=r"32x16 pixels .* 8x8"):
        losses.MSE(flat)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="2 targets for 3 pictures"):
        losses.MSE(torch.zeros(2, 3, 8, 8))(torch.zeros(3, 3, 8, 8))


def test_mse_reads_a_picture_and_lays_transparency_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(losses.load_picture(tmp_path / "clear.png"), torch.ones(3, 4, 4))
    with pytest.raises(InputError, match="does not exist"):
        losses.resolve(f"mse:{tmp_path / 'missing.png'}")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        losses.resolve(f"mse:{tmp_path / 'text.png'}")


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(5, 7), (16, 16), (24, 40), (64, 31)])
def test_resize_is_the_antialiased_one_of_pytorch(kernel: str, size: tuple[int, int]) -> None:
    images = pictures(2, 24)
    expected = torch.nn.functional.interpolate(images, size, mode=kernel, antialias=True, align_corners=False)
    torch.testing.assert_close(losses.resize(images, size, kernel), expected, rtol=0, atol=1e-12)  # type: ignore[arg-type]


def test_resize_gradient_is_the_transpose() -> None:
    images = pictures(1, 12).requires_grad_()
    cotangent = torch.randn(1, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = losses.resize(images, (5, 5))
    (gradient,) = torch.autograd.grad(out, images, cotangent)
    torch.testing.assert_close(
        (gradient * images).sum(), (out * cotangent).sum()
    )  # linear: <A'c, x> = <c, Ax>
    assert torch.autograd.gradcheck(lambda x: losses.resize(x, (3, 4)), (pictures(1, 6).requires_grad_(),))


def test_prepare_crops_the_centre_and_normalises() -> None:
    images = torch.zeros(1, 3, 8, 16)
    images[..., 4:12] = 1.0  # the centre square is white
    out = losses.prepare(images, 8, torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.5, 1.0]))
    assert out.shape == (1, 3, 8, 8)
    assert [out[0, c].unique().item() for c in range(3)] == [2.0, 1.0, 0.5]


def test_measurements_closed_forms() -> None:
    red = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    red[:, 0] = 0.8
    assert measurements.mean_brightness(red).item() == pytest.approx(0.8 * 0.299)
    assert measurements.mean_saturation(red).item() == 1.0
    assert measurements.mean_chroma(red).item() == pytest.approx(0.8)
    assert measurements.contrast(red).item() < 1e-6
    pink = red + 0.2  # HSV: (1.0 - 0.2) / 1.0
    assert measurements.mean_saturation(pink).item() == pytest.approx(0.8)
    black = torch.zeros(1, 3, 32, 32)
    assert measurements.mean_saturation(black).item() == 0.0
    halves = torch.zeros(1, 3, 32, 32)
    halves[..., :16] = 1
    assert measurements.contrast(halves).item() == pytest.approx(0.5, abs=1e-6)
    flat = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(measurements.contrast(flat).sum(), flat)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("waves", [1, 5, 11, 24])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_high_frequency_energy_is_the_filters_frequency_response(waves: int, sigma: float) -> None:
    """A cosine even about both edges is an eigenfunction of the mirrored blur: H = sum_k g_k cos(k w)."""
    width = 33
    omega = math.pi * waves / (width - 1)
    wave = torch.cos(omega * torch.arange(width, dtype=torch.float64))
    radius = math.ceil(4 * sigma)
    kernel = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)]
    response = sum(g * math.cos(k * omega) for k, g in zip(range(-radius, radius + 1), kernel, strict=True))
    response /= sum(kernel)
    expected = (1 - response) ** 2 * wave.square().mean()
    images = wave.expand(1, 3, width, width)
    got = measurements.high_frequency_energy(images, sigma)
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)


def test_high_frequency_energy_falls_when_blurred_and_refuses_what_it_cannot_do() -> None:
    images = pictures(1, 32)
    soft = losses.resize(losses.resize(images, (8, 8)), (32, 32))
    assert (
        measurements.high_frequency_energy(soft).item()
        < 0.02 * measurements.high_frequency_energy(images).item()
    )
    with pytest.raises(InputError, match="more than 4 pixels"):
        measurements.high_frequency_energy(pictures(1, 4))
    with pytest.raises(InputError, match="sigma must be positive"):
        measurements.high_frequency_energy(images, 0)


def test_statistics_with_and_without_a_goal() -> None:
    grey = torch.full((2, 3, 32, 32), 0.5, dtype=torch.float64)
    assert losses.resolve("brightness")(grey).tolist() == pytest.approx([0.5, 0.5])
    assert losses.resolve("brightness:0.8")(grey).tolist() == pytest.approx([0.09, 0.09])
    assert losses.resolve("-brightness")(grey).tolist() == pytest.approx([-0.5, -0.5])
    assert losses.resolve("colour:red")(grey).tolist() == pytest.approx([0.25, 0.25])
    assert losses.resolve("colour:#808080")(grey).tolist() == pytest.approx([(128 / 255 - 0.5) ** 2] * 2)
    with pytest.raises(InputError, match="takes a number as its goal, got 'high'"):
        losses.resolve("brightness:high")
    with pytest.raises(InputError, match="CSS colour name"):
        losses.resolve("colour:reddish")


def test_clip_agrees_with_transformers(tiny_clip: dict) -> None:
    model, tokenizer = tiny_clip["model"], tiny_clip["tokenizer"]
    images = pictures(2, 16, torch.float32)  # the model's own size, so that no resizing enters
    mean, std = (torch.tensor(s)[:, None, None] for s in (clip.OPENAI_MEAN, clip.OPENAI_STD))
    texts = ["a blue two", "a red seven"]
    tokens = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        cosines = (
            model(pixel_values=(images - mean) / std, **tokens).logits_per_image / model.logit_scale.exp()
        )
    theta = torch.arccos(cosines)
    spherical = losses.CLIPText("a blue two", model, tokenizer)(images)
    torch.testing.assert_close(spherical, theta[:, 0].square() / 2, rtol=1e-4, atol=1e-5)
    cosine = losses.CLIPText("a red seven", model, tokenizer, "cosine")(images)
    torch.testing.assert_close(cosine, 1 - cosines[:, 1], rtol=1e-4, atol=1e-5)
    own = losses.CLIPText(None, model, tokenizer)(images, texts)  # each picture against its own prompt
    torch.testing.assert_close(own, theta.diagonal().square() / 2, rtol=1e-4, atol=1e-5)


def test_clip_refuses_what_it_cannot_do(tiny_clip: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has \d+ tokens; the model takes 16"):
        losses.CLIPText("a blue two " * 9, **tiny_clip)
    with pytest.raises(InputError, match="neither a text nor a prompt"):
        losses.CLIPText(None, **tiny_clip)(pictures(1))
    with pytest.raises(InputError, match="both a CLIP model and its tokenizer"):
        losses.CLIPText("two", model=tiny_clip["model"])
    with pytest.raises(InputError, match="No CLIP model can be loaded"):
        losses.resolve(f"clip:two@{tmp_path / 'nowhere'}")


def test_clip_loads_a_saved_model_with_its_own_statistics(tiny_clip: dict, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    tiny_clip["model"].save_pretrained(tmp_path)
    tiny_clip["tokenizer"].save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    images = pictures(1, 16, torch.float32)
    saved = losses.resolve(f"clip:a blue two@{tmp_path}")(images)
    here = losses.CLIPText("a blue two", **tiny_clip, mean=[0.5] * 3, std=[0.25] * 3)(images)
    torch.testing.assert_close(saved, here)


# ---- spec strings ------------------------------------------------------------------------------------


def test_a_quoted_plus_is_text(builtin: Path) -> None:
    loss = losses.resolve('0.5*clip:"one + two" + brightness')
    assert loss.losses[0].text == "one + two"
    with pytest.raises(InputError, match=r"no loss called 'two'.*must be quoted"):
        losses.resolve("clip:one + two")
