"""The ambigram's loss and judge on pictures with known answers, and one-step guidance against its equation."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift.descent.randomness import seeded
from backdrift.errors import InputError
from backdrift.recipes import ambigram
from backdrift.recipes.ambigram import Jittered
from backdrift.recipes.ddim import DDIM
from backdrift.recipes.one_step import OneStep, calls_of, guide_one_step
from backdrift.recipes.reading import move, read, reads_both_ways, shift, views
from backdrift.run import Run
from tiny_pipelines import PICTURE, noise_for, tiny_sd
from top_or_bottom import reader


def bright(half: str) -> Tensor:
    image = torch.zeros(1, 3, PICTURE, PICTURE)
    image[..., : PICTURE // 2, :] = 1
    return image if half == "top" else 1 - image


def test_the_judge_reads_pictures_with_known_answers() -> None:
    assert read(bright("top"), reader()).tolist() == [[1, 1, 1]]  # turned, its lower half is bright
    assert read(bright("bottom"), reader()).tolist() == [[0, 0, 0]]
    assert read(bright("top"), reader("top", "top")).tolist() == [[1, 0, 0]]


def test_views_are_whole_pixel_shifts_and_a_blur() -> None:
    image = torch.zeros(1, 3, 9, 9)
    image[..., 4, 4] = 1
    seen = views(image)[0, :, 0]
    assert [tuple(v.nonzero()[0].tolist()) for v in seen[:9]] == [
        (4 + dy, 4 + dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2)
    ]
    assert torch.allclose(seen[9, 3:6, 3:6], torch.full((3, 3), 1 / 9))
    assert seen[9].sum() == pytest.approx(1)
    ramp = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 3, 5, 5)
    assert shift(ramp, 2, 0)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 2]  # the border comes in


def test_a_picture_is_moved_turned_and_enlarged_by_what_is_said() -> None:
    image = torch.rand(2, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(0))
    pixel = 2 / PICTURE
    for dy, dx in ((0, 1), (1, 0), (-2, 1)):
        moved = move(image, dx * pixel, dy * pixel, 0.0, 0.0)
        assert torch.allclose(moved, shift(image, dy, dx), atol=1e-5)
    turned = torch.rot90(image, -1, (2, 3))
    assert torch.allclose(move(image, 0.0, 0.0, math.pi / 2, 0.0), turned, atol=1e-5)
    ramp = torch.linspace(-1, 1, 2 * PICTURE + 1)[1::2].expand(1, 3, PICTURE, PICTURE)
    inner = move(ramp, 0.0, 0.0, 0.0, 0.25)[..., 2:-2, 2:-2]
    assert torch.allclose(inner, ramp[..., 2:-2, 2:-2] / 1.25, atol=1e-5)


def test_the_random_moves_follow_the_seed() -> None:
    image, loss = (
        torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(0)),
        Jittered(reader(), 2),
    )

    def value(seed: int) -> float:
        with seeded(seed, "x"):
            return loss(image).item()

    assert value(0) == value(0) != value(1)
    assert Jittered(reader(), 0)(image).item() == reader()(image).item()


CALLS = "network calls for each picture, forward and back"
SMALL: dict[str, Any] = {"loss": reader(), "prompt": "a 2", "num_inference_steps": 2, "progress": False}


def test_ambigrams_are_found_beside_their_baseline_with_as_many_calls(tmp_path: Path) -> None:
    """A tiny untrained pipeline can make either half brighter, so both must lower the loss."""
    how = OneStep(0.5, 0.0, 1.0)
    kwargs = SMALL | {"seeds": [0, 5], "steps": 4, "baseline": how, "enough": None}
    run = ambigram(tiny_sd(), "top", "bottom", out=tmp_path / "a", **kwargs)
    first = run.record["iterations"][0]["per_sample"]
    best = [entry["loss"] for entry in run.record["best"]["per_sample"]]
    assert all(after < 0.98 * before for after, before in zip(best, first, strict=True))
    figures = run.record["figures"]
    assert figures[CALLS] == 2 * 4 + 2 * 5  # four updates are pulled back, five sets of pictures are made
    assert calls_of(how, 2) == 4
    assert figures["one-step guidance: tries"] == 5  # 18 calls in tries of 4: the last one may exceed them
    for who, images in (
        ("through the whole run", run.best.images),
        ("one-step guidance", run.tensors("one_step_guidance")["images"]),
    ):
        right = (read(images, reader())[:, 2] >= 0.8).sum()
        assert figures[f"{who}: read both ways by the loss's classifier"] == f"{right} of 2"
        assert torch.equal(read(images, reader())[:, 2] >= 0.8, reads_both_ways(images, reader()))
    assert set(run.record["pictures"]) >= {"before", "after", "upside down", "one-step guidance"}
    again = ambigram(tiny_sd(), "top", "bottom", out=tmp_path / "a", **kwargs)
    assert again.record == run.record


def test_a_seed_is_the_same_alone_and_in_company(tmp_path: Path) -> None:
    def made(name: str, seeds: list[int]) -> Run:
        kwargs = SMALL | {"seeds": seeds, "steps": 2, "jitter": 0, "baseline": None}
        return ambigram(tiny_sd(), "top", "bottom", out=tmp_path / name, **kwargs)

    both, alone = made("both", [0, 5]), made("alone", [5])
    assert torch.allclose(both.best.images[1:], alone.best.images, rtol=0, atol=1e-5)


def test_the_baseline_goes_on_where_it_was_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = SMALL | {"steps": 3, "baseline": OneStep(0.5, 0.0, 1.0)}
    whole = ambigram(tiny_sd(), "top", "bottom", out=tmp_path / "whole", **kwargs)
    tries = 0

    def killed(*args: Any, **more: Any) -> Tensor:
        nonlocal tries
        tries += 1
        if tries == 3:
            raise KeyboardInterrupt
        return guide_one_step(*args, **more)

    recipe = sys.modules[Jittered.__module__]
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "guide_one_step", killed)
        with pytest.raises(KeyboardInterrupt):
            ambigram(tiny_sd(), "top", "bottom", out=tmp_path / "part", **kwargs)
    part = ambigram(tiny_sd(), "top", "bottom", out=tmp_path / "part", **kwargs)
    assert part.record["figures"] == whole.record["figures"]
    found, wanted = (r.tensors("one_step_guidance") for r in (part, whole))
    assert torch.equal(found["images"], wanted["images"])
    assert part.finished


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no seeds"):
        ambigram(tiny_sd(), loss=reader(), prompt="a", seeds=[], out=tmp_path / "a")
    with pytest.raises(InputError, match="jitter=8"):
        ambigram(tiny_sd(), loss=reader(), prompt="a", jitter=8, out=tmp_path / "a")


# -- one-step guidance --------------------------------------------------------------------------------------


def distance(images: Tensor) -> Tensor:
    return (images - 0.3).square().flatten(1).mean(1)


def test_without_pull_it_is_plain_ddim() -> None:
    pipe, noise = tiny_sd(), noise_for(tiny_sd())
    weak = guide_one_step(pipe, ["a 2"], noise, distance, OneStep(1e-12), num_inference_steps=3)
    plain = pipe("a 2", latents=noise, num_inference_steps=3, output_type="pt").images
    assert torch.allclose(weak.clamp(0, 1), plain, rtol=0, atol=1e-5)


def test_one_guided_step_is_the_equation() -> None:
    """x' = ddim(x) - 0.2 s RMS(e_c - e_0)/RMS(g) g, with g by finite differences in float64."""
    pipe = tiny_sd().to(dtype=torch.float64)
    noise = noise_for(pipe).double()
    ddim = DDIM(pipe, ["a 2"], num_inference_steps=1, guidance_scale=4.0)
    with torch.no_grad():
        eps, more = ddim.predict(noise, 0)

        def loss_at(x: Tensor) -> float:
            return distance(ddim.decode(ddim.clean(x, ddim.predict(x, 0)[0], 0))).item()

        found = guide_one_step(
            pipe, ["a 2"], noise, distance, OneStep(0.2, 0.0, 1.0), num_inference_steps=1, guidance_scale=4.0
        )
        leaf = noise.clone().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(
                distance(ddim.decode(ddim.clean(leaf, ddim.predict(leaf, 0)[0], 0))).sum(), leaf
            )
        for place in ((0, 0, 0, 0), (0, 3, 4, 5)):
            step = torch.zeros_like(noise)
            step[place] = 1e-5
            assert g[place].item() == pytest.approx(
                (loss_at(noise + step) - loss_at(noise - step)) / 2e-5, rel=1e-4
            )
        rho = 0.2 * 4.0 * more.square().mean().sqrt() / g.square().mean().sqrt()
        expected = ddim.decode(ddim.step(noise, eps, 0) - rho * g)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def test_guidance_lowers_the_loss_and_samples_do_not_disturb_each_other() -> None:
    pipe = tiny_sd()
    noise = torch.cat([noise_for(pipe, seed=i) for i in range(2)])
    how = OneStep(0.5, 0.0, 1.0)
    both = guide_one_step(pipe, ["a 2", "a 2"], noise, distance, how, num_inference_steps=3)
    alone = guide_one_step(pipe, ["a 2"], noise[1:], distance, how, num_inference_steps=3)
    assert torch.allclose(both[1:], alone, rtol=0, atol=1e-4)
    plain = guide_one_step(pipe, ["a 2", "a 2"], noise, distance, OneStep(1e-12), num_inference_steps=3)
    assert (distance(both) < distance(plain)).all()


def test_time_travel_keeps_the_marginal_s_variance() -> None:
    """Going back from t' to t adds the forward process's noise: alpha and sigma become those of t."""
    from backdrift.recipes.one_step import _back

    ddim = DDIM(tiny_sd(), ["a"], num_inference_steps=5, guidance_scale=1.0)
    generator = torch.Generator().manual_seed(0)
    clean, i = 0.7, 2
    x = float(ddim.alphas[i + 1]) * clean + float(ddim.sigmas[i + 1]) * torch.randn(
        200_000, generator=generator
    )
    back = _back(ddim, x, i, generator)
    assert back.mean().item() == pytest.approx(float(ddim.alphas[i]) * clean, abs=0.01)
    assert back.std().item() == pytest.approx(float(ddim.sigmas[i]), rel=0.01)


def test_every_call_of_a_guided_run_is_counted() -> None:
    pipe, noise = tiny_sd(), noise_for(tiny_sd())
    forward, back = 0, 0

    def called(module: Any, args: Any, out: Any) -> None:
        nonlocal forward
        forward += 1
        if out.sample.requires_grad:
            out.sample.register_hook(pulled)

    def pulled(gradient: Tensor) -> None:
        nonlocal back
        back += 1

    pipe.unet.requires_grad_(False).register_forward_hook(called)
    for how in (OneStep(0.5, 0.3, 0.7), OneStep(0.5, 0.0, 1.0, 3)):
        forward = back = 0
        guide_one_step(pipe, ["a 2"], noise, distance, how, num_inference_steps=5)
        assert forward + back == calls_of(how, 5)


def test_settings_of_guidance_are_checked() -> None:
    with pytest.raises(InputError, match="strength"):
        OneStep(strength=0)
