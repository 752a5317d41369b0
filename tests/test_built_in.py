"""The shipped assets: genuine folders, small enough, and as good as their cards say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import backdrift as bd
from backdrift.errors import InputError
from backdrift.pipelines.assets import ASSETS, PIPELINES, card, load_classifier, load_clip

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from training import classifier as classifier_training
from training import clip as clip_training
from training import vae as vae_training
from training.quality import generate, score
from training.scenes import random_scene

SHIPPED = [name for name in PIPELINES if (ASSETS / name / "model_index.json").is_file()]


def test_the_default_pipeline_ships():
    assert "sd" in SHIPPED


def test_all_assets_together_take_at_most_30_megabytes():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= 30e6


def test_weights_are_safetensors_in_half_precision():
    from safetensors import safe_open

    files = list(ASSETS.rglob("*.safetensors"))
    assert len(files) >= 5
    assert not [p for p in ASSETS.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in files:
        with safe_open(path, "pt") as f:
            assert {f.get_slice(k).get_dtype() for k in f.keys()} <= {"F16", "I64"}  # noqa: SIM118


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_folder_is_a_genuine_diffusers_pipeline(name):
    import diffusers

    index = json.loads((ASSETS / name / "model_index.json").read_text())
    pipe = bd.load(name)
    assert type(pipe) is getattr(diffusers, index["_class_name"])
    assert next(pipe.vae.parameters()).dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    images = pipe("a red seven on white", num_inference_steps=4, generator=generator, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert images.std() > 0.05


@pytest.mark.parametrize("name", SHIPPED)
def test_pictures_show_what_the_caption_says(name):
    """A small sample of what the card reports on 500 captions; the bound is far below it, yet far above chance."""
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, two=0, unnamed=0) for _ in range(16)]
    figures = score(generate(bd.load(name), name, scenes), scenes)
    assert figures["digit"] >= 0.8
    assert figures["colour"] >= 0.8
    assert figures["background"] >= 0.8


def test_the_autoencoder_reconstructs_held_out_pictures():
    vae = bd.load().vae
    assert vae_training.psnr(vae, flat=True, count=64) >= 26
    assert vae_training.psnr(vae, flat=False, count=64) >= 20


def test_the_classifier_reads_held_out_digits():
    assert classifier_training.measure(load_classifier(), 600)["digit"] >= 0.97


def test_clip_finds_the_right_caption_among_a_hundred():
    clip, tokenizer = load_clip()
    assert clip_training.retrieval(clip, tokenizer, rounds=3) >= 0.9


def test_clip_and_pipeline_share_the_text_half():
    clip, _ = load_clip()
    ours = bd.load().text_encoder.state_dict()
    theirs = clip.text_model.state_dict()
    stripped = {k.removeprefix("text_model."): v for k, v in ours.items()}
    assert stripped.keys() == theirs.keys()
    assert all(torch.equal(stripped[k], theirs[k]) for k in theirs)


def test_every_asset_has_a_card_with_licence_and_command():
    for name in (*SHIPPED, "clip", "classifier", "digits"):
        text = card(name)
        for word in ("Licence", "Parameters", "python -m training", "Measured"):
            assert word in text, (name, word)


def test_noise_of_a_sample_does_not_depend_on_the_batch():
    pipe = bd.load()
    one, three = bd.noise(pipe, seed=3), bd.noise(pipe, seed=3, batch_size=3)
    assert one.shape == (1, 4, 8, 8)
    assert torch.equal(one[0], three[0])
    assert bd.noise(pipe, height=96, width=64).shape == (1, 4, 12, 8)


@pytest.mark.parametrize("size", [63, 0, -8])
def test_a_size_that_does_not_fit_is_refused(size):
    with pytest.raises(InputError, match="multiple of 8"):
        bd.noise(bd.load(), height=size)


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(InputError, match="'sd', 'flow'"):
        bd.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="pickle"):
        bd.load("model.ckpt")
    with pytest.raises(InputError, match="no file"):
        bd.load("model.safetensors")
    with pytest.raises(InputError, match="remote code"):
        bd.load("someone/model", trust_remote_code=True)


def test_a_saved_pipeline_loads_again_from_its_folder(tmp_path):
    pipe = bd.load()
    pipe.save_pretrained(tmp_path)
    again = bd.load(tmp_path)
    for a, b in zip(pipe.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(a, b)
