"""Reference pictures and the judges of recipes, on pictures with known answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import backdrift as bd
from backdrift.errors import InputError
from backdrift.losses import load_classifier
from backdrift.recipes.judges import clip_score, open_clip, read_as, style_of, zero_shot
from backdrift.recipes.references import centre, made, open_reference
from tiny_pipelines import PICTURE, tiny_sd


def test_references(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "red.png")
    picture, name = open_reference(tmp_path / "red.png")
    assert picture.shape == (3, 2, 4)
    assert picture[:, 0, 0].tolist() == [1, 0, 0]
    assert name.endswith("red.png")
    wide = torch.zeros(3, 4, 8)
    wide[..., 2:6] = 1
    assert centre(wide).shape == (3, 4, 4)
    assert bool((centre(wide) == 1).all())
    assert centre(torch.rand(3, 600, 500)).shape == (3, 256, 256)
    for wrong in (torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4).long(), torch.full((3, 4, 4), 2.0)):
        with pytest.raises(InputError, match=r"in \[0, 1\]"):
            open_reference(wrong)
    with pytest.raises(InputError, match=r"nowhere\.png"):
        open_reference("nowhere.png")


def test_a_reference_that_the_pipeline_makes_is_its_own_picture() -> None:
    pipe = tiny_sd()
    size = {"height": PICTURE, "width": PICTURE, "num_inference_steps": 2}
    picture = made(pipe, "a b", seed=5, **size)
    plain = pipe("a b", latents=bd.noise(pipe, seed=5), guidance_scale=3.0, output_type="pt", **size).images[
        0
    ]
    assert torch.equal(picture, plain)


def test_judges_on_pictures_with_known_answers() -> None:
    pipe = bd.load()
    seven = made(pipe, "a red seven on white", seed=0, num_inference_steps=12)
    grass = made(pipe, "a blue two on grass", seed=0, num_inference_steps=12)
    both, prompts = torch.stack([seven, grass]), ["a red seven on white", "a blue two on grass"]
    clip = open_clip(None)
    fits = clip_score(clip).score(both, prompts)
    assert bool((fits > clip_score(clip).score(both, prompts[::-1]) + 5).all())
    expected = 100 * (clip.embed_images(both) * clip.embed_texts(prompts)).sum(1)
    assert torch.allclose(fits, expected)
    network = load_classifier()
    assert read_as(network, network.find("seven"), "seven").score(both, prompts).tolist() == [1, 0]
    texts = [f"a red {name} on white" for name in network.labels["digit"]]
    assert zero_shot(clip, texts, 7, "seven").score(both, prompts).argmax() == 0
    for model, block in ((None, 2), ("built-in:classifier", 2)):
        judged = style_of(grass, model, block, "style").score(both, prompts)
        assert judged[1] < 1e-4
        assert judged[0] > 0.1
