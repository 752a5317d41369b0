"""Audits on tiny pipelines: the update is plain autograd's, what counts is the pipeline's own picture, bits return."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor

import backdrift as bd
from backdrift.descent.randomness import generator
from backdrift.errors import InputError, MissingGradientError
from backdrift.recipes import audit
from backdrift.recipes.audit_checker import SafetyFilter, quiet
from backdrift.recipes.audit_filters import ScoreFilter
from backdrift.recipes.audit_page import histogram, rate, wilson
from backdrift.recipes.audit_pictures import (
    CHANGES,
    Rendering,
    as_pil,
    blur,
    changed,
    eight_bit,
    from_pil,
    jpeg,
    psnr,
    shrink,
    ssim,
)
from backdrift.run import Run
from html_page import Page
from tiny_pipelines import tiny_sd, tiny_sd3, tiny_sdxl

CALL: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
SMALL: dict[str, Any] = CALL | {"progress": False, "changes": {}, "one_step": False, "random_tries": 0}


def brightness(images: Tensor) -> Tensor:
    return 100 * images.mean((1, 2, 3))


def always(images: Tensor) -> Tensor:
    return torch.ones(len(images), dtype=torch.bool)


def start_of(pipe: Any, seeds: list[int], prompt: str = "a 2") -> list[float]:
    """The brightness of the pictures that are made of the seeds' noise."""
    return brightness(Rendering(pipe, CALL).seeded([prompt] * len(seeds), seeds) / 255).tolist()


def searched(run: Run, way: str = "gradient", tau: float | None = None) -> list[dict[str, Any]]:
    found = [s for s in run.record["audit"]["searches"] if s["way"] == way and tau in (None, s["tau"])]
    assert len(found) == 1
    return list(found[0]["samples"])


def test_the_first_update_is_plain_autograds(tmp_path: Path) -> None:
    """x1 = x_T - lr g / RMS(g), g through the pipeline's own undecorated call."""
    pipe = tiny_sd()
    run = audit(
        pipe, "a 2", ScoreFilter(brightness, -1e3), judge=always, tau=1.0, lr=0.01, steps=1, out=tmp_path / "a", **SMALL
    )  # fmt: skip
    x = bd.noise(pipe, seed=0).requires_grad_()
    undecorated = type(pipe).__call__.__wrapped__
    latents = undecorated(pipe, "a 2", latents=x, output_type="latent", **CALL).images
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    (g,) = torch.autograd.grad(brightness(images).sum(), x)
    wanted = x.detach() - 0.01 * g / g.square().mean().sqrt()
    found = run.tensors("tau-1")
    torch.testing.assert_close(found["noise"], wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(found["delta"], wanted - x.detach(), rtol=0, atol=2e-6)
    assert searched(run)[0]["rms"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3], ids=["sd", "sdxl", "sd3"])
def test_evasions_are_found_and_made_again_from_the_record(make: Callable[[], Any], tmp_path: Path) -> None:
    pipe = make()
    values = start_of(pipe, [0, 5])
    limit = min(values) - 0.3
    run = audit(
        pipe, "a 2", ScoreFilter(brightness, limit), judge=always, tau=[0.05, 0.8], seeds=[0, 5], steps=12, chunk=1,
        out=tmp_path / "a", **SMALL,
    )  # fmt: skip
    samples = run.record["audit"]["samples"]
    assert [s["margin"] for s in samples] == pytest.approx([v - limit for v in values], abs=1e-4)
    rows = searched(run, tau=0.8)
    assert all(r["evades"] and r["passes"] and r["shown"] for r in rows)
    assert (
        run.record["figures"]["evasions within τ = 0.8, gradient through the whole run"]
        == "2 of 2: 100 % (34 to 100)"
    )
    for tau in (0.05, 0.8):
        found = run.tensors(f"tau-{tau:g}")
        for k, row in enumerate(searched(run, tau=tau)):
            start = bd.noise(pipe, seed=row["seed"])
            pairs = zip(found["noise"][k].flatten().tolist(), start.flatten().tolist(), strict=True)
            assert max(abs(Fraction(a) - Fraction(b)) for a, b in pairs) <= Fraction(tau)
            assert row["linf"] <= tau
            with torch.no_grad():  # as a user would: the stock call, one picture
                made = pipe(
                    "a 2",
                    latents=found["noise"][k : k + 1],
                    generator=generator(0, "sampler", row["sample"]),
                    **CALL,
                ).images[0]
            assert torch.equal(from_pil(made), found["pictures"][k])
            again = brightness(from_pil(made)[None] / 255).item() - limit
            assert row["margin"] == pytest.approx(again, abs=1e-4)
            assert row["passes"] == (again <= 0)
            assert row["l2"] == pytest.approx((found["noise"][k] - start[0]).norm().item(), rel=1e-5)
    assert run.record["stats"]["network_calls"] > 0


def test_what_has_passed_is_kept_as_it_is(tmp_path: Path) -> None:
    """More updates change nothing in a sample that passed before them; calls are counted until then."""
    pipe = tiny_sd()
    values = start_of(pipe, [0, 5])
    near = ScoreFilter(brightness, values[0] - 0.2)
    kwargs = SMALL | {"judge": always, "tau": 0.8, "lr": 0.02}
    long = audit(pipe, "a 2", near, steps=6, seeds=[0], out=tmp_path / "a", **kwargs)
    (row,) = searched(long)
    assert row["passes"]
    assert 0 < row["iteration"] < 6
    assert row["calls"] == 2 * (2 * row["iteration"] + 1)  # two steps of the sampler
    sub = Run.load(tmp_path / "a" / "descents" / "tau-0.8-gradient-0")
    assert sub.record["status"] == "stopped early"
    short = audit(pipe, "a 2", near, steps=row["iteration"], seeds=[0], out=tmp_path / "b", **kwargs)
    assert torch.equal(short.tensors("tau-0.8")["noise"], long.tensors("tau-0.8")["noise"])


def test_rates_are_over_what_was_flagged_at_the_start(tmp_path: Path) -> None:
    pipe = tiny_sd()
    values = start_of(pipe, [0, 1, 2, 3])
    order = sorted(values)
    limit = (order[1] + order[2]) / 2
    run = audit(
        pipe, "a 2", ScoreFilter(brightness, limit), judge=always, tau=0.8, seeds=[0, 1, 2, 3], steps=8,
        out=tmp_path / "a", **SMALL,
    )  # fmt: skip
    above = [i for i, v in enumerate(values) if v > limit]
    assert [s["sample"] for s in run.record["audit"]["samples"] if s["flagged"]] == above
    assert [r["sample"] for r in searched(run)] == above
    (summary,) = run.record["audit"]["rates"]
    assert summary["flagged"] == 2
    assert run.record["figures"]["flagged at the start"] == "2 of 4"


def test_what_the_judge_does_not_see_is_no_evasion(tmp_path: Path) -> None:
    pipe = tiny_sd()
    limit = start_of(pipe, [0])[0] - 0.2
    asked: list[int] = []

    def never(images: Tensor) -> Tensor:
        asked.append(len(images))
        return torch.zeros(len(images), dtype=torch.bool)

    run = audit(
        pipe,
        "a 2",
        ScoreFilter(brightness, limit),
        judge=never,
        tau=0.8,
        steps=8,
        out=tmp_path / "a",
        **SMALL,
    )
    (row,) = searched(run)
    assert (row["passes"], row["shown"], row["evades"]) == (True, False, False)
    assert run.record["audit"]["rates"][0]["evades"] == 0
    assert asked == [1, 1]  # at the start and at the end: it takes no part in the search


def test_a_filter_that_flags_nothing_leaves_nothing_to_search(tmp_path: Path) -> None:
    run = audit(tiny_sd(), "a 2", ScoreFilter(brightness, 1e3), judge=always, out=tmp_path / "a", **SMALL)
    assert run.finished
    assert "nothing to search" in run.record["message"]
    assert run.record["audit"]["searches"] == []
    assert Page((tmp_path / "a" / "report.html").read_text()).images


def test_controls_try_random_corners_and_one_step(tmp_path: Path) -> None:
    pipe = tiny_sd()
    values = start_of(pipe, [0, 5])
    hopeless = SMALL | {
        "random_tries": 3,
        "one_step": True,
        "tau": 0.2,
        "seeds": [0, 5],
        "judge": always,
        "steps": 2,
    }
    run = audit(pipe, "a 2", ScoreFilter(brightness, min(values) - 50), out=tmp_path / "a", **hopeless)
    rows = searched(run, "random")
    assert [r["tries"] for r in rows] == [3, 3]
    assert [r["calls"] for r in rows] == [6, 6]
    start = torch.cat([bd.noise(pipe, seed=s) for s in (0, 5)])
    assert bool(((run.tensors("tau-0.2-random")["noise"] - start).abs() > 0.1999).all())
    assert all(r["linf"] <= 0.2 for r in rows)
    stepped = run.tensors("tau-0.2-one-step")["noise"] - start
    for k, row in enumerate(searched(run, "one step")):
        if row["iteration"]:  # it was accepted: every coordinate by tau, by the gradient's sign
            assert bool((stepped[k].abs() > 0.1999).all())
    easy = audit(pipe, "a 2", ScoreFilter(brightness, max(values) - 1e-4), out=tmp_path / "b",
                 **hopeless | {"seeds": [0 if values[0] > values[1] else 5], "random_tries": 40})  # fmt: skip
    (row,) = searched(easy, "random")
    assert row["passes"]
    assert row["tries"] < 40  # it ends with the first that passes


def test_a_killed_audit_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    what = ScoreFilter(brightness, min(start_of(pipe, [0, 5])) - 5)
    kwargs = SMALL | {"judge": always, "tau": [0.1, 0.5], "seeds": [0, 5], "steps": 3, "random_tries": 3}
    kwargs |= {"one_step": True, "update": "adamw", "chunk": 1}
    whole = audit(pipe, "a 2", what, out=tmp_path / "whole", **kwargs)

    def killed(run: Run, entry: Any) -> None:
        if entry["iteration"] == 1 and "gradient" in run.folder.name and "0.5" in run.folder.name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(pipe, "a 2", what, out=tmp_path / "part", callback=killed, **kwargs)
    assert Run.load(tmp_path / "part").record["status"] == "interrupted"
    part = audit(pipe, "a 2", what, out=tmp_path / "part", **kwargs)

    rendered, count = Rendering.__call__, 0

    def killed_in_a_try(self: Rendering, *args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 4:  # two at the start, each alone; then one random try
            raise KeyboardInterrupt
        return rendered(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Rendering, "__call__", killed_in_a_try)
        with pytest.raises(KeyboardInterrupt):
            audit(pipe, "a 2", what, out=tmp_path / "tried", **kwargs)
    tried = audit(pipe, "a 2", what, out=tmp_path / "tried", **kwargs)
    for run in (part, tried):
        assert run.record["audit"] == whole.record["audit"]
        assert run.record["stats"]["vjps"] == whole.record["stats"]["vjps"]
        assert set(run.record["tensors"]) == set(whole.record["tensors"])
        for name in whole.record["tensors"]:
            ours, theirs = run.tensors(name), whole.tensors(name)
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    again = audit(pipe, "a 2", what, out=tmp_path / "part", **kwargs)
    assert again.record == part.record
    with pytest.raises(InputError, match="other settings"):
        audit(pipe, "a 2", what, out=tmp_path / "part", **kwargs | {"steps": 4})


def test_a_samples_own_sampler_noise_is_the_same_throughout(tmp_path: Path) -> None:
    """With a sampler that draws noise: the search begins at the picture that the filter flagged."""
    pipe = tiny_sd()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    values = start_of(pipe, [0, 1, 2])
    last = max(range(3), key=lambda i: values[i])
    limit = (sorted(values)[1] + values[last]) / 2
    seeds = [i for i in range(3) if i != last] + [last]  # the only flagged one has the index 2
    values = start_of(pipe, seeds)
    if sum(v > limit for v in values) == 0:
        pytest.skip("in this order none is flagged")
    run = audit(pipe, "a 2", ScoreFilter(brightness, limit), judge=always, tau=0.3, seeds=seeds, steps=1,
                out=tmp_path / "a", **SMALL)  # fmt: skip
    flagged = [s for s in run.record["audit"]["samples"] if s["flagged"]]
    sub = Run.load(tmp_path / "a" / "descents" / "tau-0.3-gradient-0")
    first = sub.record["iterations"][0]["per_sample"]
    assert first == pytest.approx([s["margin"] for s in flagged], abs=0.3)  # but for the rounding to 8 bits
    assert flagged[0]["sample"] > 0


# -- the pipeline's own checker -----------------------------------------------------------------------------


def test_the_pipelines_own_checker_has_the_last_word(tmp_path: Path) -> None:
    pipe = tiny_sd(safety_checker=True)
    checker = pipe.safety_checker
    with torch.no_grad():
        draw = torch.Generator().manual_seed(1)
        for p in checker.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)
        seen = Rendering(pipe, CALL).seeded(["a 2"] * 2, [0, 5])
        checker.special_care_embeds_weights.fill_(2.0)
        checker.concept_embeds_weights.fill_(2.0)
        checker.concept_embeds_weights[0] = 0.0
        checker.concept_embeds_weights[0] = SafetyFilter.of(pipe).margin(seen / 255).min() - 5e-4
    was = {k: v.clone() for k, v in checker.state_dict().items()}
    run = audit(pipe, "a 2", "safety", judge=always, tau=0.8, seeds=[0, 5], steps=15, out=tmp_path / "a",
                **SMALL | {"changes": CHANGES})  # fmt: skip
    assert all(s["flagged"] for s in run.record["audit"]["samples"])
    assert bool(run.tensors("start")["pictures"].any())  # seen as they are, not blackened
    found = run.tensors("tau-0.8")
    assert any(r["passes"] for r in searched(run))
    for k, row in enumerate(searched(run)):
        with quiet(), torch.no_grad():
            out = pipe("a 2", latents=found["noise"][k : k + 1], **CALL)
        assert out.nsfw_content_detected == [not row["passes"]]
        if row["passes"]:
            assert torch.equal(from_pil(out.images[0]), found["pictures"][k])
    assert all(torch.equal(v, was[k]) for k, v in checker.state_dict().items())
    assert pipe.safety_checker is checker
    assert "run_safety_checker" not in vars(pipe)


# -- the page -----------------------------------------------------------------------------------------------


def test_flagged_and_found_pictures_are_blurred_unless_asked_for(tmp_path: Path) -> None:
    pipe = tiny_sd()
    what = ScoreFilter(brightness, start_of(pipe, [0])[0] - 0.2)
    run = audit(
        pipe, "a 2", what, judge=always, tau=0.8, steps=8, out=tmp_path / "a", **SMALL | {"changes": CHANGES}
    )
    assert {name: p.get("flagged") for name, p in run.record["pictures"].items()} == {
        "flagged": True,
        "tau 0.8": True,
    }
    hidden = [i["src"] for i in Page((tmp_path / "a" / "report.html").read_text()).images]
    shown = [i["src"] for i in Page(bd.report.write(tmp_path / "a", blur_flagged=False).read_text()).images]
    assert len(hidden) == len(shown) == 2
    assert not set(hidden) & set(shown)
    for folder in (tmp_path / "a" / "descents").iterdir():  # the descents' own pages, too
        record = Run.load(folder).record
        assert record["pictures"]
        assert all(p["flagged"] for p in record["pictures"].values())
    text = (tmp_path / "a" / "report.html").read_text()
    for words in ("How easily it is evaded", "Would a small change", "The filter&#39;s margin"):
        assert words in text


def test_hardening_counts_what_survives(tmp_path: Path) -> None:
    """Changes whose effect is known: one that brightens (all flagged), one that does nothing, one that darkens."""
    pipe = tiny_sd()
    values = start_of(pipe, [0, 5])
    limit = (values[0] + values[1]) / 2
    changes = {
        "brighter": lambda p: p.point(lambda v: 255),
        "same": lambda p: p,
        "darker": lambda p: p.point(lambda v: 0),
    }
    run = audit(pipe, "a 2", ScoreFilter(brightness, limit), judge=always, tau=0.8, seeds=[0, 5], steps=25,
                out=tmp_path / "a", **SMALL | {"changes": changes})  # fmt: skip
    n = run.record["audit"]["rates"][0]["evades"]
    assert n == 1
    rows = {r.pop("change"): r for r in run.record["audit"]["hardening"]}
    assert rows["brighter"] == {"survive": {"0.8": [0, 1]}, "still": [1, 1], "alarms": [1, 1]}
    assert rows["same"] == {"survive": {"0.8": [1, 1]}, "still": [1, 1], "alarms": [0, 1]}
    assert rows["darker"] == {"survive": {"0.8": [1, 1]}, "still": [0, 1], "alarms": [0, 1]}
    assert rows["any copy flagged, or the picture itself"] == rows["brighter"]


def test_intervals_are_wilsons() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert rate(8, 10) == "8 of 10: 80 % (49 to 94)"


def test_the_histogram_counts_every_sample() -> None:
    after = [{"margin": m} for m in (-2.0, 1.0, 1.0, 6.0)]
    found = {
        "samples": [{"margin": m} for m in (2.0, 2.0, 2.0, 6.0)],
        "searches": [{"tau": t, "way": "gradient", "samples": after} for t in (0.1, 0.5, 0.8)],
    }  # fmt: skip
    lines = histogram(found, [0, 1, 2, 3])["lines"]
    assert [line["name"] for line in lines] == ["before", "after, τ = 0.1", "after, τ = 0.8"]
    for line in lines:
        assert sum(y for _, y in line["points"]) == 2 * 4  # each bin has two ends
        assert line["points"][0] == [-1.0, 0.0]  # in units of the median at the start
        assert line["points"][-1][0] == pytest.approx(3.0)


# -- pictures -----------------------------------------------------------------------------------------------


def test_eight_bits_are_diffusers_own() -> None:
    from diffusers.image_processor import VaeImageProcessor

    decoded = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.8 - 1.4
    theirs, images = VaeImageProcessor().postprocess(decoded, output_type="pil"), decoded * 0.5 + 0.5
    assert torch.equal(eight_bit(images), torch.stack([from_pil(p) for p in theirs]))
    assert torch.equal(from_pil(as_pil(eight_bit(images)[0])), eight_bit(images)[0])


def test_distances_have_known_values() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 3, 24, 20), generator=draw).to(torch.uint8)
    y = (x.int() + torch.randint(-20, 21, x.shape, generator=draw)).clamp(0, 255).to(torch.uint8)
    assert torch.isinf(psnr(x, x)).all()
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    flat = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert psnr(flat, flat + 10).item() == pytest.approx(28.1308, abs=1e-3)  # 20 log10(255 / 10)
    c = (0.01 * 255) ** 2
    assert ssim(flat, flat + 10).item() == pytest.approx((2 * 100 * 110 + c) / (100**2 + 110**2 + c))
    metrics = pytest.importorskip("skimage.metrics")
    for a, b, found in zip(x, y, ssim(x, y).tolist(), strict=True):
        wanted = metrics.structural_similarity(
            a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy(), channel_axis=2, data_range=255,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert found == pytest.approx(wanted, abs=1e-6)


def test_changes_are_small_and_do_what_they_say() -> None:
    x = torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    for change in (jpeg, blur, shrink):
        assert (changed(x, change).int() - 128).abs().max() <= 1  # a flat picture stays flat
    x[..., 8, 8] = 255
    for change in (jpeg, blur, shrink):
        found = changed(x, change)
        assert found.shape == x.shape
        assert found[..., 8, 8].float().mean() < 250


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tau": 0.0}, "positive numbers"),
        ({"tau": [0.1, 0.1]}, "no two alike"),
        ({"tau": float("inf")}, "positive numbers"),
        ({"seeds": []}, "no seeds"),
        ({"seeds": [1, 1]}, "stands twice"),
        ({"steps": 0}, "at least 1"),
        ({"update": "adam"}, "Did you mean 'adamw'"),
        ({"judge": 3}, "callable or text"),
        ({"chunk": 0}, "chunk=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"height": 7}, "height=7"),
        ({"pipeline_kwargs": {"latents": 1}}, "latents"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(
    more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    kwargs = SMALL | {"judge": always, "out": tmp_path / "a"} | more
    with pytest.raises(InputError, match=words):
        audit(tiny_sd(), "a 2", ScoreFilter(brightness, 0.0), **kwargs)
    assert not (tmp_path / "a").exists()


def test_a_filter_without_gradient_and_a_cut_path_are_named(tmp_path: Path) -> None:
    flat = ScoreFilter(lambda images: (images > 0.5).float().mean((1, 2, 3)) + 0 * images.sum(), -1.0)
    with pytest.raises(InputError, match="gradient is exactly zero"):
        audit(tiny_sd(), "a 2", flat, judge=always, out=tmp_path / "a", **SMALL)
    with pytest.raises(MissingGradientError, match="cuts the state"):
        audit(tiny_sd(), "a 2", ScoreFilter(brightness, -1.0), judge=always, through="last:1",
              out=tmp_path / "b", **SMALL)  # fmt: skip
