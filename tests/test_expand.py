"""Vocabulary expansion: the composed loss and its gradient, the word's file, what is counted, resumption, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdrift import differentiable, expand
from backdrift import noise as draw_noise
from backdrift.errors import InputError, MissingGradientError, UnsupportedError
from backdrift.losses import Classifier, ClassTarget
from backdrift.recipes.embedding import Embedding, load_embedding
from backdrift.recipes.expand_target import classifier_of, judges_of, pull_of, sees
from backdrift.run import Run
from tiny_pipelines import PICTURE, WIDTH, noise_for, tiny_sd, tiny_sd3, tiny_sdxl
from top_or_bottom import TopOrBottom

HALVES = ["top", "bottom"]
SMALL: dict[str, Any] = {"num_inference_steps": 2, "progress": False, "cutouts": 2, "steps": 2}


def halves() -> Classifier:
    return Classifier(TopOrBottom(), {"digit": HALVES})


class Quadrants(nn.Module):
    """Four logits: the mean of each corner of the picture, through a transformers-like answer."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            id2label={0: "north-west", 1: "north-east", 2: "south-west", 3: "south-east"}
        )
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Any:
        self.seen.append(images.detach())
        h, w = images.shape[-2] // 2, images.shape[-1] // 2
        corners = [images[..., a, b] for a in (slice(h), slice(h, None)) for b in (slice(w), slice(w, None))]
        means = torch.stack([corner.mean((2, 3)) for corner in corners], 1)
        return SimpleNamespace(logits=(means * (3 + self.weight)).sum(2))


def run_expand(pipe: Any, out: Path, **kwargs: Any) -> Run:
    given = {"prompt": "a 2", "classifier": halves(), "target": "top", "out": out, **SMALL} | kwargs
    return expand(pipe, given.pop("prompt"), given.pop("classifier"), given.pop("target"), **given)


@torch.no_grad()
def picture(pipe: Any, steps: int = 2, scale: float = 7.5, **call: Any) -> Tensor:
    """Unclamped, as the loop sees it."""
    with differentiable(pipe):
        return pipe(num_inference_steps=steps, guidance_scale=scale, output_type="pt", **call).images


# -- the loss -----------------------------------------------------------------------------------------------


def by_hand(images: Tensor, network: nn.Module, index: int, crops: list[tuple[int, int, int]]) -> Tensor:
    values = []
    for top, left, side in crops:
        logits = network(images[..., top : top + side, left : left + side])
        logits = getattr(logits, "logits", None) if not isinstance(logits, dict) else logits["digit"]
        assert logits is not None
        values.append(-logits.softmax(1)[:, index].log())
    return torch.stack(values).mean(0)


def test_the_loss_is_the_paper_s_weight_times_the_mean_over_crops_plus_what_is_kept() -> None:
    images = torch.rand(3, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = Quadrants().double()
    loss = pull_of(
        ClassTarget("south-west", network), scale=0.05, cutouts=16, cut_power=0.3, cut_least=0.5,
        keep=lambda x: x.mean((1, 2, 3)),
    )  # fmt: skip
    crops = [c for part in loss.modules() if hasattr(part, "crops") for c in part.crops(20, 20)]
    assert len(crops) == 16
    expected = 0.05 * by_hand(images, network, 2, crops) + images.mean((1, 2, 3))
    assert torch.allclose(loss(images), expected, rtol=1e-12)
    whole = pull_of(ClassTarget(2, network), scale=2.0, cutouts=0, cut_power=0.3, cut_least=0.5, keep=None)
    assert torch.allclose(whole(images), 2 * by_hand(images, network, 2, [(0, 0, 20)]), rtol=1e-12)


@pytest.mark.parametrize("over", ["noise", "word"])
def test_one_step_of_descent_is_the_loss_s_slope_by_finite_differences(tmp_path: Path, over: Any) -> None:
    pipe = tiny_sd().to(dtype=torch.float64)
    init = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    more: dict[str, Any] = {"init": init, "unseen": 0} if over == "word" else {}
    classifier = Classifier(TopOrBottom().double(), {"digit": HALVES})
    lr = 1e-3
    run = run_expand(
        pipe, tmp_path / "a", classifier=classifier, over=over, steps=1, optimizer="sgd", lr=lr, optimizer_kwargs={},
        keep=lambda x: 0.3 * x.square().mean((1, 2, 3)), **more,
    )  # fmt: skip
    noise = noise_for(pipe).double()
    name, start = ("embedding", init) if over == "word" else ("noise", noise)
    assert run.record["best"]["iteration"] == 1
    slope = (start - run.best.tensors[name]) / lr
    objective = pull_of(
        ClassTarget("top", classifier), scale=0.05, cutouts=2, cut_power=0.3, cut_least=0.5,
        keep=lambda x: 0.3 * x.square().mean((1, 2, 3)),
    )  # fmt: skip

    def value(at: Tensor) -> float:
        if over == "noise":
            images = picture(pipe, prompt="a 2", latents=at)
        else:
            with torch.no_grad():
                words = Embedding(at, "tokens", "<kind>").call(pipe, ["a 2"])
            images = picture(pipe, latents=noise, **words)
        return float(objective(images).detach())

    way = torch.randn(start.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    known = (value(start + 1e-5 * way) - value(start - 1e-5 * way)) / 2e-5
    assert abs(known) > 1e-6
    assert (slope * way).sum().item() == pytest.approx(known, rel=1e-4)


# -- over the noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_sd3])
def test_noise_of_any_pipeline_is_moved_until_the_classifier_sees_the_class(
    tmp_path: Path, make: Any
) -> None:
    run = run_expand(
        make(), tmp_path / "a", batch_size=2, steps=6, lr=0.2, judges={"another": ClassTarget(0, halves())}
    )
    plain, after = run.tensors("plain")["images"], run.best.images
    wanted = ClassTarget("top", halves())
    assert all(after < before for after, before in zip(wanted(after), wanted(plain), strict=True))
    for when, images in (("the prompt alone", plain), ("after", after)):
        for who in ("the loss's own classifier", "another"):
            assert (
                run.record["figures"][f"{when}: seen by {who}"] == f"{int(sees(wanted, images).sum())} of 2"
            )
    assert run.record["iterations"][0]["per_sample"] == pytest.approx(
        run_expand(make(), tmp_path / "b", batch_size=2, steps=0).record["iterations"][0]["per_sample"]
    )


def test_the_judges_have_no_part_in_the_result(tmp_path: Path) -> None:
    with_judge = run_expand(tiny_sd(), tmp_path / "a", judges={"another": ClassTarget("bottom", halves())})
    assert torch.equal(with_judge.best.images, run_expand(tiny_sd(), tmp_path / "b").best.images)


def test_a_noise_is_the_same_alone_and_in_company_whatever_the_chunks(tmp_path: Path) -> None:
    whole = run_expand(tiny_sd(), tmp_path / "a", batch_size=3)
    parts = run_expand(tiny_sd(), tmp_path / "b", batch_size=3, chunk=2, memory="min")
    alone = run_expand(tiny_sd(), tmp_path / "c")
    assert torch.allclose(parts.best.images, whole.best.images, rtol=0, atol=1e-5)
    assert torch.allclose(alone.best.images, whole.best.images[:1], rtol=0, atol=1e-5)


# -- a word -------------------------------------------------------------------------------------------------

WORD: dict[str, Any] = {
    "over": "word", "prompt": ["a <kind> 2", "b"], "batch_size": 2, "unseen": 2, "unseen_prompts": ["q <kind>"],
    "lr": 0.05, "steps": 4,
}  # fmt: skip


@pytest.mark.parametrize("n_slots", [1, 2])
def test_diffusers_own_loader_makes_the_pictures_of_unseen_noise_bit_for_bit(
    tmp_path: Path, n_slots: int
) -> None:
    pipe = tiny_sd()
    run = run_expand(pipe, tmp_path / "a", n_slots=n_slots, **WORD)
    vocabulary = len(pipe.tokenizer)
    file = run.folder / run.record["files"]["embedding"]["path"]
    assert file.name == "learned_embeds.safetensors"
    found, unseen = load_embedding(file), run.tensors("unseen")
    assert torch.equal(found.vectors, run.best.tensors["embedding"])
    noise = draw_noise(pipe, seed=1_000_003, batch_size=2, height=PICTURE, width=PICTURE)
    pipe.load_textual_inversion(str(file))
    assert len(pipe.tokenizer) == vocabulary + n_slots
    for prompt, name in (("q <kind>", "word"), ("q", "plain")):
        images = pipe(
            [prompt] * 2, latents=noise, num_inference_steps=2, guidance_scale=7.5, output_type="pt"
        ).images
        assert torch.equal(images, unseen[name].clamp(0, 1)), name
    wanted = ClassTarget("top", halves())
    seen = int(sees(wanted, unseen["word"]).sum())
    assert (
        run.record["figures"]["unseen noise, with the word: seen by the loss's own classifier"]
        == f"{seen} of 2"
    )


def test_a_word_helps_on_noise_it_was_not_learnt_from_and_output_slots_suit_sdxl(tmp_path: Path) -> None:
    wanted = ClassTarget("top", halves())
    for make, slots in ((tiny_sd, "tokens"), (tiny_sdxl, "output")):
        run = run_expand(
            make(), tmp_path / slots, **WORD | {"slots": slots, "n_slots": 1, "steps": 12, "unseen": 4}
        )
        before, after = (wanted(run.tensors("unseen")[name]).mean() for name in ("plain", "word"))
        assert after < before
        assert run.record["iterations"][0]["examples"] == [0, 1, 2, 3]


def test_what_is_kept_is_told_the_prompt_without_the_word(tmp_path: Path) -> None:
    told: set[str] = set()

    def keep(images: Tensor, prompts: list[str]) -> Tensor:
        told.update(prompts)
        return 0 * images.mean((1, 2, 3))

    shown = run_expand(tiny_sd(), tmp_path / "a", keep=keep, **WORD).record["pictures"]
    assert list(shown) == ["before", "after", "unseen noise", "unseen noise, the word"]
    assert told == {"a 2", "b", "q"}
    told.clear()
    run = run_expand(tiny_sd(), tmp_path / "b", keep=keep, **WORD | {"init": "z", "steps": 0})
    assert told == {"a z 2", "b", "q z"}
    unseen = run.tensors("unseen")
    assert torch.allclose(unseen["plain"], unseen["word"], atol=1e-5)  # the word is a copy of z as yet


def test_only_some_steps_may_carry_a_word_s_gradient(tmp_path: Path) -> None:
    run = run_expand(tiny_sd(), tmp_path / "a", **WORD | {"through": "last:1"})
    assert run.record["iterations"][0]["grad_norm"] > 0
    with pytest.raises(MissingGradientError, match="the state is cut"):
        run_expand(tiny_sd(), tmp_path / "b", through="last:1,detach_input")


# -- taken up again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["noise", "word"])
def test_a_killed_run_goes_on_with_the_same_bits(
    tmp_path: Path, over: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = WORD | {"minibatch": 2} if over == "word" else {"batch_size": 2, "steps": 4}
    whole = run_expand(tiny_sd(), tmp_path / "whole", **how)

    def kill(run: Run, entry: dict[str, Any]) -> None:
        if entry["iteration"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_expand(tiny_sd(), tmp_path / "part", callback=kill, **how)
    with monkeypatch.context() as patch:  # and again after the descent, while the pictures are made

        def killed(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(Run, "save_tensors", _all_but("plain", killed))
        with pytest.raises(KeyboardInterrupt):
            run_expand(tiny_sd(), tmp_path / "part", **how)
    part = run_expand(tiny_sd(), tmp_path / "part", **how)
    assert part.finished
    assert part.record["figures"] == whole.record["figures"]
    for name in whole.record["tensors"]:
        for key, value in whole.tensors(name).items():
            assert torch.equal(part.tensors(name)[key], value), (name, key)
    assert run_expand(tiny_sd(), tmp_path / "part", **how).record == part.record


def _all_but(name: str, otherwise: Any) -> Any:
    save = Run.save_tensors

    def saved(run: Run, which: str, tensors: Any) -> None:
        otherwise() if which == name else save(run, which, tensors)

    return saved


# -- classifiers --------------------------------------------------------------------------------------------


def test_any_classifier_is_asked_for_pictures_prepared_as_said() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network = Quadrants()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    found = classifier_of(network, size=8, mean=mean, std=std)
    assert found.find("south-east") == {"class": 3} == found.find(3)
    found(images)
    normal = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(network.seen[-1], normal)
    classifier_of(network, size=4)(images)
    assert network.seen[-1].shape == (2, 3, 4, 4)
    called = classifier_of(lambda x: x.mean((2, 3)), labels=["red", "green", "blue"])
    assert torch.equal(called(images)["class"], images.mean((2, 3)))
    assert sees(ClassTarget("green", called), torch.eye(3)[..., None, None].expand(3, 3, 4, 4)).tolist() == [
        False,
        True,
        False,
    ]
    assert classifier_of(found) is found
    assert classifier_of("kinds").find("plain seven") == {"class": 2}
    assert "digit" in classifier_of("digits").labels


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"over": "weights"}, "over='weights' must be 'noise' or 'word'"),
        ({"target": "left"}, "knows no class 'left'"),
        ({"classifier": 3}, "classifier=3 must be"),
        ({"size": 4}, "size= tell how a module's pictures are prepared"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"cutouts": -1}, "cutouts=-1"),
        ({"cut_least": 2.0}, "least=2.0"),
        ({"keep": "no-such-loss"}, "There is no loss called 'no-such-loss'"),
        ({"judges": ["brightness"]}, "judge 'brightness' must be a loss of a class"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"minibatch": 2}, "minibatch= is for over='word'"),
        ({"init": "a", "n_slots": 2}, "init=, n_slots= make a word"),
        ({"over": "word", "noise_prior": 0.1}, "noise_prior= is for over='noise'"),
        ({"over": "word", "unseen": -1}, "unseen=-1"),
        ({"over": "word", "slots": "inputs"}, "slots='inputs'"),
        ({"over": "word", "placeholder": "a"}, "already knows 'a'"),
        ({"over": "word", "prompt": "a b c d e 2"}, "has 9 tokens"),
        ({"prompt": []}, "There is no prompt"),
        ({"height": 7}, "height=7"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_made(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    pipe = tiny_sd()
    pipe.unet.forward = None  # nothing may be sampled
    with pytest.raises(InputError, match=message):
        run_expand(pipe, tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


def test_tokens_need_a_pipeline_with_one_text_encoder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="one text encoder"):
        run_expand(tiny_sdxl(), tmp_path / "a", over="word")


def test_judges_are_named_by_their_text() -> None:
    found = judges_of(["class:seven", "kind:plain seven"])
    assert list(found) == ["class:seven", "kind:plain seven"]
    assert found["kind:plain seven"].target == {"class": 2}
    assert judges_of(None) == {}
