"""Losses on CLIP's view of pictures, against transformers' own model and processor and a few lines by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from backdrift import losses
from backdrift.errors import InputError
from tiny_losses import pictures, save_clip, slopes, tiny_clip


@pytest.fixture
def clip(tmp_path: Path) -> dict[str, Any]:
    """The tiny CLIP, saved into the folder ``clip``; with a reference picture of its own size beside it."""
    made = tiny_clip(tmp_path)
    save_clip(tmp_path / "clip", made)
    array = (pictures(1, 16, seed=5)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(array).save(tmp_path / "ref.png")
    return {**made, "folder": tmp_path / "clip", "picture": tmp_path / "ref.png"}


def seen(clip: dict[str, Any], paths: list[Path]) -> dict[str, Any]:
    """What transformers' processor makes of picture files, through the vision network: tokens and embeddings."""
    from transformers import CLIPImageProcessor

    how = CLIPImageProcessor.from_pretrained(clip["folder"])
    pixels = how([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = clip["model"].vision_model(pixel_values=pixels, output_hidden_states=True)
        embedded = clip["model"].visual_projection(out.pooler_output)
    return {"states": out.hidden_states, "embedded": torch.nn.functional.normalize(embedded, dim=-1)}


def save(images: Tensor, folder: Path) -> tuple[list[Path], Tensor]:
    """Pictures as PNG files, and what the files say as a tensor."""
    paths = []
    eight = (images * 255).round().to(torch.uint8)
    for i, picture in enumerate(eight):
        paths.append(folder / f"{i}.png")
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(paths[-1])
    return paths, eight.float() / 255


# (side of the pictures, tolerance): at the model's own size nothing is resized; else the processor rounds to 8 bits
SIDES = [(16, 2e-6), (48, 6e-3)]


@pytest.mark.parametrize(("side", "tolerance"), SIDES)
@pytest.mark.parametrize("block", [1, 3])
def test_style_is_the_gram_matrix_of_transformers_hidden_state(
    clip: dict[str, Any], tmp_path: Path, side: int, tolerance: float, block: int
) -> None:
    paths, images = save(pictures(2, side), tmp_path)
    states = seen(clip, [clip["picture"]])["states"], seen(clip, paths)["states"]
    reference, features = (s[block][:, 1:] for s in states)  # without the class token
    expected = []
    for each in features:
        gram = sum(torch.outer(token, token) for token in each) - sum(
            torch.outer(token, token) for token in reference[0]
        )
        expected.append(gram.square().sum().sqrt())
    loss = losses.GramStyle(clip["picture"], str(clip["folder"]), block)
    torch.testing.assert_close(loss(images), torch.stack(expected), rtol=max(tolerance, 1e-5), atol=0)
    if block == 3:
        by_text = losses.resolve(f"style:{clip['picture']}@{clip['folder']}")
        assert torch.equal(by_text(images), loss(images))
        assert by_text.spec == loss.spec


@pytest.mark.parametrize(("side", "tolerance"), SIDES)
def test_content_is_the_mean_square_of_token_differences(
    clip: dict[str, Any], tmp_path: Path, side: int, tolerance: float
) -> None:
    paths, images = save(pictures(2, side), tmp_path)
    reference, features = (seen(clip, p)["states"][2][:, 1:] for p in ([clip["picture"]], paths))
    expected = (features - reference).square().flatten(1).mean(1)  # the second of four blocks
    got = losses.resolve(f"content:{clip['picture']}@{clip['folder']}")(images)
    torch.testing.assert_close(got, expected, rtol=max(tolerance, 1e-5), atol=0)


@pytest.mark.parametrize(("side", "tolerance"), SIDES)
def test_image_similarity_is_the_angle_of_transformers_embeddings(
    clip: dict[str, Any], tmp_path: Path, side: int, tolerance: float
) -> None:
    paths, images = save(pictures(2, side), tmp_path)
    reference, embedded = (seen(clip, p)["embedded"].double() for p in ([clip["picture"]], paths))
    cosines = (embedded * reference).sum(1)
    spherical = losses.resolve(f"clip-image:{clip['picture']}@{clip['folder']}")(images)
    torch.testing.assert_close(
        spherical.double(), torch.arccos(cosines).square() / 2, rtol=5 * tolerance, atol=tolerance
    )
    cosine = losses.CLIPImage(clip["picture"], str(clip["folder"]), "cosine")(images)
    torch.testing.assert_close(cosine.double(), 1 - cosines, rtol=5 * tolerance, atol=tolerance)


def every(clip: dict[str, Any], reference: Any) -> list[losses.Loss]:
    model = clip["model"]
    return [
        losses.GramStyle(reference, model),
        losses.Content(reference, model),
        losses.CLIPImage(reference, model),
        losses.CLIPImage(reference, model, "cosine"),
    ]


def test_the_reference_itself_is_the_best_picture(clip: dict[str, Any]) -> None:
    reference = pictures(1, 24, torch.float64, seed=3)
    for loss in every(clip, reference):
        images = torch.cat([reference, pictures(1, 24)]).requires_grad_()
        values = loss.double()(images)
        assert (
            0 <= values[0].item() < 1e-4 * values[1].item()
        )  # the reference was seen in the network's float32
        (gradient,) = torch.autograd.grad(values.sum(), images)
        assert gradient.isfinite().all()


def test_gradients_agree_with_differences_and_leave_the_model_alone(clip: dict[str, Any]) -> None:
    clip["model"].double()
    before = {k: v.clone() for k, v in clip["model"].state_dict().items()}
    for loss in every(clip, pictures(1, 24, seed=3)):
        by_gradient, by_differences = slopes(loss, pictures(2, 20))
        torch.testing.assert_close(by_gradient, by_differences, rtol=1e-6, atol=1e-9)
        assert by_gradient.abs().min() > 0
    assert len(clip["model"].vision_model.encoder.layers) == 4
    assert all(torch.equal(v, before[k]) for k, v in clip["model"].state_dict().items())


def test_one_reference_for_each_picture(clip: dict[str, Any]) -> None:
    references, images = pictures(2, 24, torch.float32, seed=3), pictures(2, 24, torch.float32)
    pairs = zip(every(clip, references), every(clip, references[0]), every(clip, references[1]), strict=True)
    for both, first, second in pairs:
        expected = torch.cat([first(images[:1]), second(images[1:])])
        torch.testing.assert_close(both(images), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(InputError, match="2 reference pictures for 3 pictures"):
            both(pictures(3, 24, torch.float32))


def test_a_network_in_half_precision_gives_no_overflow_and_a_gradient(clip: dict[str, Any]) -> None:
    reference, images = pictures(1, 24, torch.float32, seed=3), pictures(2, 24, torch.float32)
    wide = [loss(images) for loss in every(clip, reference)]
    clip["model"].to(torch.bfloat16)
    for loss, expected in zip(every(clip, reference), wide, strict=True):
        half = images.to(torch.bfloat16).requires_grad_()
        values = loss(half)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected, rtol=0.1, atol=0.02)
        (gradient,) = torch.autograd.grad(values.sum(), half)
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_gram_matrices_beyond_half_precision_stay_finite(clip: dict[str, Any]) -> None:
    """Squares of features of 300 pass 65504: they are taken in float32."""
    layer = clip["model"].vision_model.encoder.layers[2]
    with torch.no_grad():
        layer.mlp.fc2.bias.fill_(300)
    clip["model"].half()
    value = losses.GramStyle(pictures(1, 16, seed=3), clip["model"])(pictures(1, 16, torch.float16))
    assert math.isfinite(value.item())


def test_what_cannot_be_used_is_named(clip: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'style' needs a reference picture"):
        losses.resolve("style")
    with pytest.raises(InputError, match="does not exist"):
        losses.resolve(f"content:{tmp_path / 'missing.png'}@{clip['folder']}")
    with pytest.raises(InputError, match="No CLIP model can be loaded from"):
        losses.resolve(f"clip-image:{clip['picture']}@{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="blocks are 1 to 4, got block=5"):
        losses.GramStyle(clip["picture"], clip["model"], 5)
    with pytest.raises(InputError, match="distance must be"):
        losses.CLIPImage(clip["picture"], clip["model"], "euclid")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"must be a picture file or a tensor .* got \(3,\)"):
        losses.GramStyle(torch.zeros(3), clip["model"])
    with pytest.raises(InputError, match="must be a transformers CLIPModel"):
        losses.GramStyle(clip["picture"], torch.nn.Linear(3, 3))


@pytest.mark.parametrize(("scale", "shift"), [(2, -1), (255, 0)])
def test_pictures_on_another_scale_are_refused_once(clip: dict[str, Any], scale: int, shift: int) -> None:
    images = pictures(1, 16, torch.float32)
    loss = losses.GramStyle(clip["picture"], clip["model"])
    with pytest.raises(InputError, match=r"takes pictures in \[0, 1\], got values from"):
        loss(images * scale + shift)
    loss(images * 1.6 - 0.3)  # an unclamped picture overshoots
    loss(images * scale + shift)  # and only the first ones are looked at


def test_a_plan_counts_the_network_up_to_its_block(clip: dict[str, Any]) -> None:
    """Bytes of the blocks that run, and activations that grow with them."""
    from backdrift.pipelines.scored import count_loss

    meta = torch.empty(2, 3, 24, 24, device="meta")
    counted = []
    for block in (1, 3):
        loss = losses.GramStyle(clip["picture"], clip["model"], block)
        found, notes = count_loss(loss, meta)
        assert notes == ()
        assert found is not None
        kept = [clip["model"].vision_model.embeddings, clip["model"].vision_model.pre_layrnorm]
        kept += clip["model"].vision_model.encoder.layers[:block]
        tensors = [t for part in kept for t in (*part.parameters(), *part.buffers())]
        assert found.weights == sum(t.nbytes for t in tensors) + loss.known.nbytes + 2 * 3 * 4
        counted.append(found)
        assert loss(pictures(2, 24)).isfinite().all()  # counting left the loss itself alone
    assert counted[1].profile.saved > counted[0].profile.saved > 0
