"""The scripts that made the built-in weights: the data's rules, the loop's resumption, the shared tricks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

import training.loop as loop
from training.flow import LastTokenCounts
from training.flow import build as build_flow
from training.scenes import (
    BACKGROUNDS,
    COLOURS,
    EFFECTS,
    SIZE,
    Scene,
    apply_effect,
    digit_masks,
    photo,
    random_scene,
    readable,
    render,
)


def test_a_fifth_of_the_digits_is_held_out_and_disjoint():
    seen, held = digit_masks(False), digit_masks(True)
    counts = [len(a) + len(b) for a, b in zip(seen, held, strict=True)]
    assert sum(counts) == 1797
    assert sum(len(h) for h in held) == 1797 // 5
    for a, b in zip(seen, held, strict=True):
        rows = {r.numpy().tobytes() for r in a}
        assert not any(r.numpy().tobytes() in rows for r in b)


def test_the_held_out_strip_of_a_photograph_is_its_right_fifth():
    seen, held = photo("grass"), photo("grass", held_out=True)
    assert seen.shape[2] + held.shape[2] == 345
    assert held.shape[2] == 69
    assert held.shape[2] >= SIZE


def test_captions_say_what_is_in_the_scene():
    red, blue, grass = list(COLOURS).index("red"), list(COLOURS).index("blue"), BACKGROUNDS.index("grass")
    assert Scene((7,), (red,), grass, EFFECTS.index("blurred")).caption == "a red seven on grass, blurred"
    assert Scene((7, 2), (red, blue), 0).caption == "a red seven and a blue two on white"
    assert Scene((7,), (red,), 0, named=False).caption == "a red digit on white"


def test_every_drawn_scene_can_be_read():
    rng = np.random.default_rng(0)
    for _ in range(500):
        s = random_scene(rng)
        assert all(readable(list(COLOURS)[c], BACKGROUNDS[s.background], s.effect) for c in s.colours)


def test_digit_and_background_have_the_named_colours():
    red, white = list(COLOURS).index("red"), BACKGROUNDS.index("white")
    picture = render([Scene((1,), (red,), white)], np.random.default_rng(0))[0]
    assert torch.allclose(picture[:, 0, 0], torch.tensor([0.97, 0.97, 0.96]), atol=0.021)
    nearest = (picture - torch.tensor(COLOURS["red"])[:, None, None]).norm(dim=0).min()
    assert nearest < 0.02


def test_effects_do_what_they_are_called():
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    grey = apply_effect(x, EFFECTS.index("in black and white"))
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.allclose(apply_effect(x, EFFECTS.index("dark")), 0.45 * x)
    blurred = apply_effect(x, EFFECTS.index("blurred"))
    assert blurred.mean() == pytest.approx(x.mean().item(), abs=0.01)
    assert blurred.var() < 0.1 * x.var()


def test_training_ends_with_the_same_bits_after_an_interruption(tmp_path, monkeypatch):
    def run(folder, interrupt):
        monkeypatch.setattr(loop, "WORK", folder)
        torch.manual_seed(0)
        net = nn.Linear(4, 2)

        def loss(rng, generator):
            if interrupt and len(calls) == 7:
                calls.append(0)
                raise KeyboardInterrupt
            calls.append(0)
            x = torch.randn(8, 4, generator=generator) * float(rng.uniform(0.5, 1.5))
            return (net(x).float() - x[:, :2]).square().mean()

        calls: list[int] = []
        settings = {"steps": 12, "lr": 0.1, "ema": 0.9, "save_every": 3}
        if interrupt:
            with pytest.raises(KeyboardInterrupt):
                loop.train("toy", net, loss, **settings)
            torch.manual_seed(5)
            net = nn.Linear(4, 2)
        return loop.train("toy", net, loss, **settings).weight.detach().clone()

    assert torch.equal(run(tmp_path / "a", False), run(tmp_path / "b", True))


def test_one_counted_token_equals_all_the_zero_tokens():
    net = build_flow().eval()
    torch.manual_seed(1)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.08)
    x, tokens, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 256), torch.randn(2, 256)
    zeros, t = torch.zeros(2, 256, 256), torch.tensor([10.0, 500.0])
    with torch.no_grad():
        whole = net(x, torch.cat([tokens, zeros], 1), pooled, t).sample
        with LastTokenCounts():
            counted = net(x, torch.cat([tokens, zeros[:, :1]], 1), pooled, t).sample
        plain = net(x, torch.cat([tokens, zeros[:, :1]], 1), pooled, t).sample
    assert torch.allclose(whole, counted, atol=2e-5)
    assert (whole - plain).abs().max() > 0.1
