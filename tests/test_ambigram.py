"""The ambigram's loss and judge on pictures with known answers, and one-step guidance against its equation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdrift.descent.randomness import seeded
from backdrift.errors import InputError
from backdrift.losses import Ambigram
from backdrift.recipes import ambigram, successes
from backdrift.recipes.ambigram import _shift, _Shifted, read, views
from backdrift.recipes.ddim import DDIM
from backdrift.recipes.one_step import OneStep, guide_one_step, search
from tiny_pipelines import PICTURE, noise_for, tiny_sd


class TopOrBottom(nn.Module):
    """Class 0 ("top") where the upper half is brighter, class 1 ("bottom") where the lower is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        half = images.shape[-2] // 2
        difference = images[..., :half, :].flatten(1).mean(1) - images[..., half:, :].flatten(1).mean(1)
        return {"digit": torch.stack([difference, -difference], 1) * self.scale}


def reader(upright: str = "top", turned: str = "bottom") -> Ambigram:
    from backdrift.losses import Classifier

    return Ambigram(upright, turned, Classifier(TopOrBottom(), {"digit": ["top", "bottom"]}))


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
    assert _shift(ramp, 2, 0)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 2]  # the border comes in


def test_the_random_shifts_follow_the_seed() -> None:
    image, loss = (
        torch.rand(1, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(0)),
        _Shifted(reader(), 2),
    )

    def value(seed: int) -> float:
        with seeded(seed, "x"):
            return loss(image).item()

    assert value(0) == value(0) != value(1)
    assert _Shifted(reader(), 0)(image).item() == reader()(image).item()


def test_an_ambigram_is_found_beside_its_baseline_and_found_again(tmp_path: Path) -> None:
    """A tiny untrained pipeline can make either half brighter, so both must lower the loss."""
    kwargs: dict[str, Any] = {
        "loss": reader(),
        "prompt": "a 2",
        "num_inference_steps": 2,
        "steps": 4,
        "progress": False,
    }
    run = ambigram(tiny_sd(), "top", "bottom", out=tmp_path / "a", lr=0.1, **kwargs)
    losses = [entry["loss"] for entry in run.record["iterations"]]
    assert run.best.loss < 0.98 * losses[0]
    figures = run.record["figures"]
    assert figures["one-step guidance: seconds"] >= run.record["stats"]["seconds"]
    part = read(run.best.images, reader())[0].tolist()
    assert figures["ours: views right both ways"] == pytest.approx(part[2])
    assert figures["ours reads"] == ("both ways" if part[2] >= 0.8 else "not both ways")
    assert set(run.record["pictures"]) >= {"before", "after", "upside down", "one-step guidance"}
    again = ambigram(tiny_sd(), "top", "bottom", out=tmp_path / "a", lr=0.1, **kwargs)
    assert again.record == run.record


def test_successes_are_counted_over_seeds(tmp_path: Path) -> None:
    lines: list[str] = []
    kwargs: dict[str, Any] = {
        "loss": reader(),
        "prompt": "a 2",
        "num_inference_steps": 1,
        "steps": 1,
        "progress": False,
    }
    summary = successes(
        tiny_sd(), "top", "bottom", seeds=[0, 5], out=tmp_path, show=lines.append, baseline=False, **kwargs
    )
    from backdrift.run import Run

    verdicts = [Run.load(tmp_path / f"seed-{s}").record["figures"]["ours reads"] for s in (0, 5)]
    counted = summary.record["figures"]["through the whole run: read both ways"]
    assert counted == f"{verdicts.count('both ways')} of 2"
    assert f"through the whole run: read both ways: {counted}" in lines
    with pytest.raises(InputError, match="no seeds"):
        successes(tiny_sd(), seeds=0, out=tmp_path / "b")


def test_jitter_is_checked(tmp_path: Path) -> None:
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


def test_the_search_keeps_the_best_of_its_tries() -> None:
    pipe, values = tiny_sd(), []

    def loss(images: Tensor) -> Tensor:
        value = distance(images)
        if not value.requires_grad:
            values.append(value.item())
        return value

    image, found = search(
        pipe, "a 2", lambda draw: noise_for(pipe, seed=draw), loss, 1.0, num_inference_steps=1
    )
    assert found["tries"] == len(values) >= 1
    assert found["loss"] == min(values) == pytest.approx(distance(image).item())
    assert found["seconds"] >= 1.0
    with pytest.raises(InputError, match="strength"):
        OneStep(strength=0)
