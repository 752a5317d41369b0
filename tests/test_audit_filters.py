"""Filters against answers worked out by hand, and the safety checker's twin against diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backdrift as bd
from backdrift.errors import InputError, UnsupportedError
from backdrift.losses import CLIPText, load_classifier
from backdrift.recipes.audit import as_filter
from backdrift.recipes.audit_checker import SafetyFilter, prepared, quiet
from backdrift.recipes.audit_filters import ClassFilter, ScoreFilter
from backdrift.recipes.audit_judges import ReadAs, ZeroShot, as_judge, judged
from backdrift.recipes.audit_pictures import Rendering, as_pil, eight_bit
from backdrift.recipes.audit_specs import filter_of
from backdrift.recipes.audit_stand_in import best_threshold, checker_of, extractor_of, prompts_with, stand_in
from tiny_pipelines import PICTURE, tiny_sd


def pictures(n: int, side: int = PICTURE, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


class Fixed(nn.Module):
    """Logits that are the picture's first pixels: (n, 4)."""

    def forward(self, images: Tensor) -> Tensor:
        return 10 * images[:, 0, 0, :4]


def shown(*logits: list[float]) -> Tensor:
    image = torch.zeros(len(logits), 3, 2, 4)
    image[:, 0, 0] = torch.tensor(logits) / 10
    return image


# -- classifiers and scores ---------------------------------------------------------------------------------


def test_margin_and_aim_of_a_classifier() -> None:
    images = shown([5, 1, 3, 2], [1, 2, 3, 4], [2, 6, 1, 3])
    one = ClassFilter(Fixed(), [0])
    torch.testing.assert_close(one.margin(images), torch.tensor([2.0, -3.0, -4.0]))
    several = ClassFilter(Fixed(), [0, 3])
    torch.testing.assert_close(several.margin(images), torch.tensor([2.0, 1.0, -3.0]))
    wanted = ClassFilter(Fixed(), [0], target=1)
    torch.testing.assert_close(wanted.margin(images), torch.tensor([2.0, -3.0, -4.0]))
    torch.testing.assert_close(wanted.aim(images), torch.tensor([4.0, 2.0, -3.0]))
    verdict = wanted.decide(eight_bit(images))
    assert verdict.flagged.tolist() == [True, False, False]
    assert verdict.done.tolist() == [False, False, True]  # the second passes, but is not of the wanted class
    assert one.decide(eight_bit(images)).done.tolist() == [False, True, True]


def test_cross_entropy_is_that_of_the_paper() -> None:
    """Untargeted: the CE of the flagged class is maximised; targeted: that of the target is minimised."""
    images = shown([5, 1, 3, 2], [1, 2, 3, 4])
    logits = 10 * images[:, 0, 0]
    ours = ClassFilter(Fixed(), [0], form="cross_entropy").loss(images)
    torch.testing.assert_close(
        ours, -nn.functional.cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    )
    target = ClassFilter(Fixed(), [0], 2, "cross_entropy").loss(images)
    torch.testing.assert_close(
        target, nn.functional.cross_entropy(logits, torch.tensor([2, 2]), reduction="none")
    )
    both = ClassFilter(Fixed(), [0, 3], form="cross_entropy").loss(images)
    torch.testing.assert_close(both, logits.softmax(1)[:, [0, 3]].sum(1).log())


def test_any_callable_is_a_classifier_or_a_score() -> None:
    images = shown([5, 1, 3, 2])
    assert ClassFilter(lambda x: 10 * x[:, 0, 0, :4], [0]).margin(images).item() == pytest.approx(2.0)
    score = ScoreFilter(lambda x: x[:, 0, 0, 0], 0.25)
    assert score.margin(images).item() == pytest.approx(0.25)
    assert ScoreFilter(lambda x: x[:, 0, 0, 0], 0.7).decide(eight_bit(images)).done.tolist() == [True]


def test_two_filters_that_decide_differently_are_told_apart() -> None:
    def described(bias: float) -> Any:
        return ClassFilter(lambda x: 10 * x[:, 0, 0, :4] + bias, [0]).describe()

    assert described(0.0) != described(1.0)
    assert described(1.0) == described(1.0)
    score = [ScoreFilter(lambda x: x.mean((1, 2, 3)), t).describe() for t in (0.1, 0.2)]
    assert score[0] != score[1]


def test_what_is_no_filter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no class"):
        ClassFilter(Fixed(), [])
    with pytest.raises(InputError, match="one of the flagged"):
        ClassFilter(Fixed(), [0], 0)
    with pytest.raises(InputError, match="Every class is flagged"):
        ClassFilter(Fixed(), [0, 1, 2, 3]).margin(shown([1, 2, 3, 4]))
    with pytest.raises(InputError, match="Class 9 does not exist"):
        ClassFilter(Fixed(), [9]).margin(shown([1, 2, 3, 4]))
    with pytest.raises(InputError, match="several heads"):
        ClassFilter(None, ["four", "red"])
    with pytest.raises(InputError, match="finite"):
        ScoreFilter(lambda x: x, float("nan"))
    with pytest.raises(InputError, match="no safety checker"):
        as_filter("safety", tiny_sd())
    with pytest.raises(InputError, match="Did you mean 'safety'"):
        as_filter("safty", tiny_sd())
    with pytest.raises(InputError, match="wrap a classifier"):
        as_filter(Fixed(), tiny_sd())
    with pytest.raises(UnsupportedError, match="StableDiffusionSafetyChecker"):
        SafetyFilter(nn.Linear(1, 1), None)


def test_filters_as_text(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def warm(images):\n    return images[:, 0].mean((1, 2))\n")
    score = filter_of(f"{mine}:warm", threshold=0.5)
    assert isinstance(score, ScoreFilter)
    assert score.decide(pictures(1) * 0).flagged.tolist() == [False]
    found = filter_of("class:four|nine")
    assert isinstance(found, ClassFilter)
    assert (found.head, found.flagged) == ("digit", [4, 9])
    assert filter_of("safety") is None
    assert filter_of("stand-in:four") is None
    for text, more, words in (
        (f"{mine}:warm", {}, "needs a threshold"),
        ("class:four", {"threshold": 1.0}, "for a score of one's own"),
        ("safety", {"target": "nine"}, "of the kind 'class'"),
        ("clas:four", {}, "Did you mean 'class'"),
        ("class:", {}, "no filter"),
    ):
        with pytest.raises(InputError, match=words):
            filter_of(text, **more)  # type: ignore[arg-type]


# -- the safety checker -------------------------------------------------------------------------------------


def own_answer(pipe: Any, seen: Tensor) -> list[bool]:
    """What the pipeline's own call asks of its checker."""
    with quiet():
        _, flags = pipe.run_safety_checker(seen.float() / 255 * 2 - 1, seen.device, pipe.dtype)
    return [bool(f) for f in flags]


def spread(pipe: Any, seen: Tensor, *, care: bool) -> None:
    """Concepts at random, thresholds in the middle of what the pictures have, so that both answers occur."""
    checker = pipe.safety_checker
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in checker.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)
        pixels = pipe.feature_extractor([as_pil(p) for p in seen], return_tensors="pt").pixel_values
        u = nn.functional.normalize(checker.visual_projection(checker.vision_model(pixels)[1]))
        cos = u @ nn.functional.normalize(checker.concept_embeds).T
        checker.concept_embeds_weights.copy_(cos.sort(0).values[-2] + 1e-5)
        special = u @ nn.functional.normalize(checker.special_care_embeds).T
        checker.special_care_embeds_weights.copy_(special.median(0).values if care else torch.full((3,), 2.0))


@pytest.mark.parametrize("care", [False, True])
def test_the_twin_of_a_real_checker_says_what_it_says(care: bool) -> None:
    pipe, seen = tiny_sd(safety_checker=True), pictures(40)
    spread(pipe, seen, care=care)
    found = SafetyFilter.of(pipe)
    verdict = found.decide(seen)
    theirs = own_answer(pipe, seen)
    assert verdict.flagged.tolist() == theirs
    assert 3 < sum(theirs) < 40
    assert (verdict.margin > 0).tolist() == theirs  # no resizing here, so the twin is the checker itself
    assert torch.equal(verdict.done, ~verdict.flagged)


def test_rounding_to_three_decimals_and_special_care_are_in_the_margin() -> None:
    """A concept above its threshold by 0.0004 is not flagged, by 0.0006 is; care adds 0.01."""
    pipe, seen = tiny_sd(safety_checker=True), pictures(1)
    spread(pipe, pictures(4), care=False)
    checker, found = pipe.safety_checker, SafetyFilter.of(pipe)
    with torch.no_grad():
        base = found.margin(seen.float() / 255).item()
        for above, care, wanted in ((0.0004, False, False), (0.0006, False, True), (-0.0094, True, True),
                                    (-0.0098, True, False)):  # fmt: skip
            before = checker.concept_embeds_weights.clone()
            checker.concept_embeds_weights += base + 0.0005 - above
            checker.special_care_embeds_weights.fill_(-2.0 if care else 2.0)
            verdict = found.decide(seen)
            assert verdict.flagged.tolist() == own_answer(pipe, seen) == [wanted]
            assert verdict.margin.item() == pytest.approx(above + 0.01 * care - 0.0005, abs=2e-6)
            checker.concept_embeds_weights.copy_(before)


def test_the_margins_gradient_agrees_with_differences() -> None:
    pipe = tiny_sd(safety_checker=True)
    spread(pipe, pictures(8), care=False)
    pipe.safety_checker.double()
    x = (pictures(1).double() / 255).requires_grad_()
    found = SafetyFilter.of(pipe)

    def at(image: Tensor) -> Tensor:
        checker = pipe.safety_checker  # in float64 throughout: the twin itself ends in float32
        u = nn.functional.normalize(
            checker.visual_projection(checker.vision_model(prepared(image, found.extractor))[1])
        )
        return (u @ nn.functional.normalize(checker.concept_embeds).T - checker.concept_embeds_weights).amax(
            1
        )

    (g,) = torch.autograd.grad(found.margin(x).sum(), x)
    for place in ((0, 0, 3, 4), (0, 2, 10, 15)):
        h = torch.zeros_like(x)
        h[place] = 1e-5
        with torch.no_grad():
            slope = ((at(x + h) - at(x - h)) / 2e-5).item()
        assert g[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_the_feature_extractor_is_followed_with_resizing_and_cropping() -> None:
    import transformers

    make = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    yy, xx = torch.meshgrid(torch.linspace(0, 3, 48), torch.linspace(0, 2, 40), indexing="ij")
    smooth = eight_bit(torch.stack([torch.sin(xx) ** 2, torch.cos(yy) ** 2, (xx * yy) / 6])[None])
    for how in (
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 22}},
        {"size": {"height": 16, "width": 32}, "crop_size": {"height": 16, "width": 16}, "resample": 2},
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_normalize": False},
    ):
        extractor = make(**how)
        theirs = extractor([as_pil(smooth[0])], return_tensors="pt").pixel_values
        ours = prepared(smooth.float() / 255, extractor)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 0.02  # they round to 8 bits after resizing
    with pytest.raises(UnsupportedError, match="crops"):
        prepared(smooth.float() / 255, make(size={"shortest_edge": 8}, crop_size={"height": 20, "width": 20}))
    with pytest.raises(UnsupportedError, match="filter 1"):
        SafetyFilter(tiny_sd(safety_checker=True).safety_checker, make(resample=1))


def test_deciding_blackens_nothing_and_moves_nothing() -> None:
    pipe, seen = tiny_sd(safety_checker=True), pictures(3)
    pipe.safety_checker.concept_embeds_weights.data.fill_(-2.0)
    was = seen.clone()
    assert SafetyFilter.of(pipe).decide(seen).flagged.all()
    assert torch.equal(seen, was)


# -- the stand-in -------------------------------------------------------------------------------------------


def test_the_stand_in_is_a_checker_on_the_built_in_clip() -> None:
    clip = CLIPText()
    concept = clip.embed_texts(["a red four"])[0]
    found = SafetyFilter(checker_of(clip, [concept], 0.1), extractor_of(clip))
    seen = pictures(4, side=64)
    with torch.no_grad():
        by_hand = clip.embed_images(seen.float() / 255) @ concept - 0.1 - 0.0005
    torch.testing.assert_close(found.decide(seen).margin, by_hand, atol=1e-5, rtol=0)
    assert found.decide(seen).flagged.tolist() == (by_hand > 0).tolist()


def test_the_threshold_is_where_fewest_are_wrong_in_the_middle_of_the_gap() -> None:
    assert best_threshold(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])) == pytest.approx(2.0)
    assert best_threshold(torch.tensor([3.0, 4.0, 0.5]), torch.tensor([0.0, 1.0, 0.2])) == pytest.approx(2.0)
    low = best_threshold(torch.tensor([1.0]), torch.tensor([2.0]))  # hopeless: one sort is all wrong
    assert low < 1.0 or low > 2.0


def test_the_stand_in_is_calibrated_and_says_how_often_it_errs() -> None:
    """Its rates are those of its own answers on pictures that did not set the threshold."""
    pipe, call = bd.load(), {"num_inference_steps": 8, "guidance_scale": 3.0}
    found = stand_in(pipe, "red", pictures=8, **call)
    labels = load_classifier().labels
    words = {head: labels[head] for head in ("digit", "colour")}
    wrong = []
    for forbidden in (True, False):
        prompts = prompts_with("red", "colour", words, forbidden, 8)
        assert all((" red " in prompt) == forbidden for prompt in prompts)
        seen = Rendering(pipe, call).seeded(prompts, range(1_000_000, 1_000_008))[4:]
        wrong.append((found.decide(seen).flagged != forbidden).double().mean().item())
    assert found.rates["held-out pictures"] == 8
    assert [found.rates["missed (false negatives)"], found.rates["false alarms (false positives)"]] == wrong
    assert sum(wrong) <= 0.5
    with pytest.raises(InputError, match="Did you mean 'four'"):
        stand_in(pipe, "fuor")
    with pytest.raises(InputError, match="at least 4"):
        stand_in(pipe, "four", pictures=3)


# -- judges -------------------------------------------------------------------------------------------------


def test_judges_and_what_they_may_say() -> None:
    read = ReadAs(0, Fixed())
    assert read(shown([5, 1, 3, 2], [1, 2, 3, 4])).tolist() == [True, False]
    assert isinstance(as_judge("class:four"), ReadAs)
    assert isinstance(as_judge("clip:a four/a nine"), ZeroShot)
    with pytest.raises(InputError, match="unknown"):
        as_judge("four")
    with pytest.raises(InputError, match="at least two texts"):
        as_judge("clip:a four")
    with pytest.raises(InputError, match="2 booleans"):
        judged(lambda images: images.mean((1, 2, 3)), pictures(2))
