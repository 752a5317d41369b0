"""Losses on VGG-19's features, against its layers written out one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backdrift import losses
from backdrift.errors import InputError
from backdrift.losses.vgg import MEAN, STD, layer_indices
from tiny_losses import pictures, slopes, vgg_weights

SIDE = 32
# Gatys et al.'s layers in torchvision's numbering of vgg19().features
GATYS = {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 20, "relu5_1": 29}


def features() -> nn.Sequential:
    """A narrow network with torchvision's structure: ``vgg19().features`` module for module."""
    state, modules, before = vgg_weights(), [], 3
    for stage in (2, 2, 4, 4, 4):
        for _ in range(stage):
            width = len(state[f"features.{len(modules)}.bias"])
            modules += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
        modules.append(nn.MaxPool2d(2, 2))
    made = nn.Sequential(*modules)
    made.load_state_dict({name.removeprefix("features."): t for name, t in state.items()})
    return made.double().eval().requires_grad_(False)


def seen(images: Tensor, index: int) -> Tensor:
    """The network's first ``index + 1`` modules on normalised pictures: ``(N, C, P)``."""
    mean, std = (torch.tensor(s, dtype=images.dtype)[:, None, None] for s in (MEAN, STD))
    return features()[: index + 1]((images - mean) / std).flatten(2)


def test_layers_are_where_torchvision_has_them() -> None:
    indices = layer_indices()
    assert {name: indices[name] for name in GATYS} == GATYS
    assert indices["relu4_2"] == 22
    assert max(indices.values()) == 35
    kinds = [type(module) for module in features()]
    assert all(kinds[i] is (nn.Conv2d if name.startswith("conv") else nn.ReLU) for name, i in indices.items())
    assert len(kinds) == 37


def test_style_is_gatys_equation() -> None:
    reference, images = pictures(1, SIDE, seed=3), pictures(2, SIDE)
    expected = torch.zeros(2, dtype=torch.float64)
    for index in GATYS.values():
        a, f = seen(reference, index)[0], seen(images, index)
        channels, positions = a.shape
        for n in range(2):
            apart = (f[n] @ f[n].T - a @ a.T).square().sum() / (4 * channels**2 * positions**2)
            expected[n] += apart / 5
    got = losses.VGGStyle(reference, features(), size=SIDE)(images)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_content_and_perceptual_are_mean_squares() -> None:
    reference, images = pictures(1, SIDE, seed=3), pictures(2, SIDE)

    def apart(index: int) -> Tensor:
        return (seen(images, index) - seen(reference, index)).square().mean((1, 2))

    content = losses.VGGContent(reference, features(), size=SIDE)(images)
    torch.testing.assert_close(content, apart(22), rtol=1e-6, atol=0)
    perceptual = losses.Perceptual(reference, features(), size=SIDE)(images)
    expected = torch.stack([apart(i) for i in (3, 8, 13, 22, 31)]).mean(0)
    torch.testing.assert_close(perceptual, expected, rtol=1e-6, atol=0)
    before = losses.VGGContent(reference, features(), ["conv1_2"], SIDE)(images)  # not yet rectified
    torch.testing.assert_close(before, apart(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [losses.VGGStyle, losses.VGGContent, losses.Perceptual])
def test_gradient_value_at_the_reference_and_company(kind: type) -> None:
    reference, images = pictures(1, 40, seed=3), pictures(3, 40)
    loss = kind(reference, features(), size=SIDE)
    # rectifiers and maxima have kinks, so the step is small and the tolerance that of rounding
    by_gradient, by_differences = slopes(loss, images, 1e-7)
    torch.testing.assert_close(by_gradient, by_differences, rtol=1e-4, atol=1e-8)
    assert loss(reference).item() == pytest.approx(0, abs=1e-20)
    alone = torch.cat([loss(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, loss(images), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["vgg19.pth", "model.safetensors"])
def test_weights_come_from_files_and_folders(tmp_path: Path, name: str) -> None:
    state = vgg_weights() | {"classifier.0.weight": torch.zeros(2, 2)}  # the rest of a whole checkpoint
    if name.endswith("pth"):
        torch.save(state, tmp_path / name)
        source = tmp_path / name
    else:
        from safetensors.torch import save_file

        save_file(state, tmp_path / name)
        source = tmp_path
    reference, images = pictures(1, SIDE, torch.float32, seed=3), pictures(2, SIDE, torch.float32)
    got = losses.VGGStyle(reference, source, size=SIDE)(images)
    expected = losses.VGGStyle(reference.double(), features(), size=SIDE)(images.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)


def test_half_precision_stays_finite() -> None:
    reference, images = pictures(1, SIDE, torch.float32, seed=3), pictures(2, SIDE, torch.float32)
    wide = losses.VGGStyle(reference, features().float(), size=SIDE)(images)
    half = images.to(torch.bfloat16).requires_grad_()
    values = losses.VGGStyle(reference, features().bfloat16(), size=SIDE)(half)
    torch.testing.assert_close(values, wide, rtol=0.2, atol=1e-3)
    (gradient,) = torch.autograd.grad(values.sum(), half)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    reference = pictures(1, SIDE)
    with pytest.raises(InputError, match="VGG-19 has no layer 'relu3_9'"):
        losses.VGGStyle(reference, features(), ["relu3_9"])
    with pytest.raises(InputError, match="at least one layer"):
        losses.VGGStyle(reference, features(), [])
    with pytest.raises(InputError, match="not the layers of VGG-19 without batch norm"):
        losses.VGGStyle(reference, features()[:20])
    with pytest.raises(InputError, match=r"are not there: .*nowhere\.pth' is no file"):
        losses.VGGStyle(reference, tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match=r"has no weights of VGG-19: none of model\.safetensors"):
        losses.VGGStyle(reference, tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="cannot be read as weights"):
        losses.VGGStyle(reference, tmp_path / "text.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no table of tensors"):
        losses.VGGStyle(reference, tmp_path / "list.pth")


def test_weights_with_code_in_them_are_refused(tmp_path: Path) -> None:
    torch.save(features(), tmp_path / "module.pth")  # a pickled module, not a table of tensors
    with pytest.raises(InputError, match="cannot be read as weights"):
        losses.VGGStyle(pictures(1, SIDE), tmp_path / "module.pth")


def test_a_plan_counts_it() -> None:
    from backdrift.pipelines.scored import count_loss

    loss = losses.VGGContent(pictures(1, SIDE), features(), size=SIDE)
    found, notes = count_loss(loss, torch.empty(2, 3, 40, 40, device="meta"))
    assert notes == ()
    assert found is not None
    up_to = [t.nbytes for i in range(22) for t in features()[i].parameters()]
    assert found.weights == sum(up_to) + loss.known_relu4_2.nbytes + 2 * 3 * 4
    assert found.profile.saved > 2 * 3 * SIDE * SIDE * 4
