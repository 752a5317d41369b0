"""Stylisation: its loss and gradient by hand, its epochs, its files, its bits after a kill, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backdrift import stylize
from backdrift.descent import Example, Noise
from backdrift.errors import InputError
from backdrift.losses import load_classifier
from backdrift.losses.clip_images import ImageEncoder
from backdrift.recipes import stylize_originals
from backdrift.recipes.stylize_loss import Features, StyleAndContent
from backdrift.run import Run
from html_page import Page
from tiny_losses import vgg_weights
from tiny_pipelines import PICTURE, tiny_sd, tiny_sd3, tiny_sdxl

STEPS = 2
CLASSIFIER = "built-in:classifier"


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(seed))


REFERENCE = pictures(1, seed=9)[0]


def small(pipe: Any, out: Path, **kwargs: Any) -> Run:
    """Two prompts with three noises each, four a minibatch."""
    given: dict[str, Any] = {
        "noises": 3, "minibatch": 4, "epochs": 2, "num_inference_steps": STEPS, "guidance_scale": 2.0, "shown": 2,
        "network": CLASSIFIER, "lr": 1e-2, "progress": False,
    }  # fmt: skip
    return stylize(pipe, kwargs.pop("reference", REFERENCE), ["a 2", "b 7"], out=out, **{**given, **kwargs})


# -- the loss -----------------------------------------------------------------------------------------------


def by_hand(
    images: Tensor, originals: Tensor, reference: Tensor, layers: Any, weights: tuple[float, float]
) -> Tensor:
    """Eq. (30) written out; ``layers(images)`` gives the style and the content layers' (N, positions, channels)."""
    known = layers(reference[None])
    values = []
    for image, original in zip(images, originals, strict=True):
        (style, content), (_, wanted) = layers(image[None]), layers(original[None])
        first = [
            ((f[0].T @ f[0] - a[0].T @ a[0]) ** 2).sum() / ((a[0].T @ a[0]) ** 2).sum()
            for f, a in zip(style, known[0], strict=True)
        ]
        second = [
            ((f - g) ** 2).mean() / (a**2).mean() for f, g, a in zip(content, wanted, known[1], strict=True)
        ]
        values.append(weights[0] * sum(first) / len(first) + weights[1] * sum(second) / len(second))
    return torch.stack(values)


def clip_layers(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    encoder = ImageEncoder()
    pixels = torch.nn.functional.interpolate(
        images, size=(64, 64), mode="bicubic", antialias=True, align_corners=False
    )
    states = encoder.network(pixel_values=(pixels - 0.5) / 0.5, output_hidden_states=True).hidden_states
    return [states[i][:, 1:] for i in (1, 2, 3)], [states[3][:, 1:]]


def classifier_layers(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    maps: list[Tensor] = []
    network: Any = load_classifier().network
    x = torch.nn.functional.interpolate(
        images, size=(64, 64), mode="bicubic", antialias=True, align_corners=False
    )
    x = 2 * x - 1
    for i, layer in enumerate(network.features):
        x = layer(x)
        if i % 6 == 5:
            maps.append(x.flatten(2).mT)
    return [maps[0], maps[2]], [maps[1]]


@pytest.mark.parametrize("network", ["built-in:clip", CLASSIFIER])
def test_the_loss_is_the_equation(network: str) -> None:
    layers = clip_layers if network == "built-in:clip" else classifier_layers
    chosen = (None, None) if network == "built-in:clip" else ([1, 3], [2])
    images, originals = pictures(2, 1), pictures(2, 2)
    with torch.no_grad():
        loss = StyleAndContent(REFERENCE, Features(network, *chosen), 0.7, 0.2)
        found = loss.of(images, originals)
        wanted = by_hand(images, originals, REFERENCE, layers, (0.7, 0.2))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_vgg19_s_loss_is_the_equation_too(tmp_path: Path) -> None:
    save_file(vgg_weights(), tmp_path / "vgg.safetensors")
    images, originals = pictures(2, 1), pictures(2, 2)
    features = Features(f"vgg19:{tmp_path / 'vgg.safetensors'}")
    assert features.style == ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    assert features.content == ("relu4_2",)

    def layers(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        assert features.vgg is not None
        found = features.vgg(x)
        return [found[n].mT for n in features.style], [found[n].mT for n in features.content]

    loss = StyleAndContent(REFERENCE, features)
    wanted = by_hand(images, originals, REFERENCE, layers, (1, 1))
    torch.testing.assert_close(loss.of(images, originals), wanted, rtol=1e-4, atol=0)


def test_the_reference_has_its_own_style_and_an_original_its_own_content() -> None:
    loss = StyleAndContent(REFERENCE, Features(CLASSIFIER))
    style, content = loss.terms(torch.stack([REFERENCE, pictures(1)[0]]), pictures(2, 3))
    assert float(style[0]) < 1e-10 < float(style[1])
    _, same = loss.terms(pictures(2, 3), pictures(2, 3))
    assert same.tolist() == [0, 0]
    assert (content > 0).all()


# -- the gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["cross-attention", "unet.mid_block.*"])
def test_an_update_follows_plain_autograd_through_the_stock_call(tmp_path: Path, over: str) -> None:
    """One step of plain descent moves every weight by -lr times the gradient of the mean loss."""
    lr, pipe = 0.1, tiny_sd()
    run = small(
        pipe,
        tmp_path / "a",
        over=over,
        noises=1,
        steps=1,
        clamp=True,
        optimizer="sgd",
        lr=lr,
        content_weight=0.5,
    )
    assert run.record["settings"]["steps"] == 1
    other = tiny_sd()
    from backdrift import noise

    start = noise(other, height=PICTURE, width=PICTURE, seed=0, batch_size=2)
    for network in (other.unet, other.vae, other.text_encoder):
        network.requires_grad_(False)
    call = type(other).__call__.__wrapped__  # without its torch.no_grad()
    kwargs = {"latents": start, "num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "pt"}
    with torch.no_grad():
        originals = call(other, ["a 2", "b 7"], **kwargs).images
    values = dict(other.unet.named_parameters())
    before = {k: v.detach().clone() for k, v in values.items()}
    other.unet.requires_grad_(True)
    images = call(other, ["a 2", "b 7"], **kwargs).images
    # At the start the content's gradient is zero, and the style's alone is left.
    by_hand(images, originals, REFERENCE, _default_layers, (1.0, 0.5)).mean().backward()
    assert run.best.iteration == 1  # the update lowered the loss, so its weights were kept
    moved = run.best.tensors
    for name, value in moved.items():
        key = name.removeprefix("unet.")
        gradient = values[key].grad
        assert gradient is not None
        step = value - before[key]
        torch.testing.assert_close(
            step, -lr * gradient, rtol=2e-2, atol=1e-6 + 1e-3 * lr * float(gradient.abs().max())
        )
    assert any(float(values[n.removeprefix("unet.")].grad.abs().max()) > 1e-6 for n in moved)


def _default_layers(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    features = Features(CLASSIFIER)
    return features(images)


# -- epochs -------------------------------------------------------------------------------------------------


def test_each_epoch_goes_through_all_examples_once_in_an_order_that_the_seed_gives(tmp_path: Path) -> None:
    def order(name: str, seed: int) -> list[list[int]]:
        run = small(tiny_sd(), tmp_path / name, seed=seed, epochs=2)
        assert run.record["settings"]["steps"] == 2 * 2  # six examples, four a minibatch
        return [entry["examples"] for entry in run.record["iterations"]]

    first, again, other = order("a", 0), order("b", 0), order("c", 1)
    epochs = [first[i] + first[i + 1] for i in (0, 2)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert first == again != other


# -- the files ----------------------------------------------------------------------------------------------


#: All examples at once, towards the style alone, slowly: the loss falls, and trained weights are the best.
WELL: dict[str, Any] = {"minibatch": 6, "content_weight": 0.0, "lr": 3e-3, "epochs": 4}


def stock(pipe: Any, run: Run, n: int = 2) -> Tensor:
    """The first pictures that were trained on, by the pipeline's own call with the weights it has."""
    from backdrift import noise

    start = noise(pipe, height=PICTURE, width=PICTURE, seed=0, batch_size=6)[:n]
    with torch.no_grad():
        return pipe(
            ["a 2"] * n, latents=start, num_inference_steps=STEPS, guidance_scale=2.0, height=PICTURE, width=PICTURE,
            output_type="pt",
        ).images  # fmt: skip


@pytest.mark.parametrize(
    ("build", "component"), [(tiny_sd, "unet"), (tiny_sdxl, "unet"), (tiny_sd3, "transformer")]
)
def test_the_weights_are_loaded_again_and_make_the_same_pictures(
    tmp_path: Path, build: Any, component: str
) -> None:
    pipe = build()
    state = {k: v.clone() for k, v in getattr(pipe, component).state_dict().items()}
    run = small(pipe, tmp_path / "a", **WELL)
    assert all(torch.equal(v, state[k]) for k, v in getattr(pipe, component).state_dict().items())
    other = build()
    plain = stock(other, run)
    entry = run.record["files"][f"{component} weights"]
    found = load_file(run.folder / entry["path"])
    assert {f"{component}.{k}" for k in found} == set(run.best.tensors)
    missing, unexpected = getattr(other, component).load_state_dict(found, strict=False)
    assert not unexpected
    assert set(missing) == set(state) - set(found)
    made = stock(other, run)
    assert torch.allclose(made, run.best.images[:2].clamp(0, 1), atol=1e-5)
    assert run.best.iteration > 0
    assert not torch.allclose(made, plain, atol=1e-4)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_a_lora_is_loaded_by_diffusers_and_makes_the_same_pictures(tmp_path: Path, build: Any) -> None:
    pipe = build()
    names = set(pipe.unet.state_dict())
    run = small(pipe, tmp_path / "a", over="lora", rank=2, **WELL)
    assert set(pipe.unet.state_dict()) == names  # the adapter is off again
    other = build()
    plain = stock(other, run)
    other.load_lora_weights(str(run.folder / "lora"))
    made = stock(other, run)
    assert torch.allclose(made, run.best.images[:2].clamp(0, 1), atol=1e-5)
    assert run.best.iteration > 0
    assert not torch.allclose(made, plain, atol=1e-4)


def test_what_the_page_shows(tmp_path: Path) -> None:
    pipe = tiny_sd()
    run = small(pipe, tmp_path / "a", unseen_prompts=["c 5", "d 8", "e"], **WELL)
    assert list(run.record["pictures"]) == [
        "reference",
        "seen noises and prompts",
        "unseen noises",
        "unseen prompts",
    ]
    assert sorted(p.name for p in (run.folder / "pictures").iterdir()) == [
        "reference.png", "seen-noises-and-prompts.png", "unseen-noises.png", "unseen-prompts.png"
    ]  # fmt: skip
    page = Page((run.folder / "report.html").read_text())
    assert len(page.images) == 4
    assert "the style to take: a tensor" in page.text
    assert "unseen prompts; above before, below after: c 5; d 8" in page.text
    shown, figures = run.tensors("pictures"), run.record["figures"]
    loss = StyleAndContent(REFERENCE, Features(CLASSIFIER))
    for group in ("unseen noises", "unseen prompts"):
        before, after = shown[f"{group}: before"], shown[f"{group}: after"]
        style, content = loss.terms(after, before)
        assert figures[f"style, {group}: after"] == pytest.approx(style.mean().item(), rel=1e-4)
        assert figures[f"content, {group}: after"] == pytest.approx(content.mean().item(), rel=1e-4)
        assert figures[f"style, {group}: before"] == pytest.approx(
            loss.terms(before, before)[0].mean().item(), rel=1e-4
        )
    # "before" is what an untouched pipeline makes, "after" what one with the files makes
    start = _unseen_noise(pipe, 1)
    kwargs = {"latents": start, "num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "pt"}
    other = tiny_sd()
    with torch.no_grad():
        plain = other(["a 2", "b 7"], **kwargs).images
        other.unet.load_state_dict(load_file(run.folder / "weights" / "unet.safetensors"), strict=False)
        styled = other(["a 2", "b 7"], **kwargs).images
    assert torch.allclose(shown["unseen noises: before"].clamp(0, 1), plain, atol=1e-5)
    assert torch.allclose(shown["unseen noises: after"].clamp(0, 1), styled, atol=1e-5)


def _unseen_noise(pipe: Any, salt: int) -> Tensor:
    from backdrift import noise
    from backdrift.descent.randomness import seed_of

    return noise(pipe, height=PICTURE, width=PICTURE, seed=seed_of(0, "unseen", salt), batch_size=2)


def test_the_loss_falls_on_noises_it_was_not_trained_on(tmp_path: Path) -> None:
    run = small(tiny_sd(), tmp_path / "a", over="unet", **WELL | {"epochs": 10, "shown": 6})
    figures = run.record["figures"]
    assert figures["best loss"] < 0.9 * figures["loss before"]
    assert figures["style, unseen noises: after"] < 0.98 * figures["style, unseen noises: before"]


def test_more_weight_on_the_content_keeps_more_of_it(tmp_path: Path) -> None:
    free, held = (
        small(tiny_sd(), tmp_path / str(w), **WELL | {"content_weight": w}).record["figures"]
        for w in (0.0, 30.0)
    )
    assert held["content, unseen noises: after"] < 0.5 * free["content, unseen noises: after"]


def test_fewer_steps_with_a_gradient_are_passed_on(tmp_path: Path) -> None:
    runs = [
        small(tiny_sd(), tmp_path / t, through=t, steps=1, num_inference_steps=3) for t in ("all", "last:1")
    ]
    assert [run.record["settings"]["through"] for run in runs] == ["all", "last:1"]
    traces = [run.record["trace"]["steps"] for run in runs]
    assert traces == [[0, 1, 2], [2]]
    one, other = (r.record["iterations"][0]["grad_norm"] for r in runs)
    assert one != pytest.approx(other, rel=1e-3)


def test_chunks_and_memory_do_not_change_the_result(tmp_path: Path) -> None:
    whole = small(tiny_sd(), tmp_path / "a", steps=2)
    parts = small(tiny_sd(), tmp_path / "b", steps=2, chunk=2, memory="min")
    losses = [[e["loss"] for e in run.record["iterations"]] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# -- after a kill -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"over": "lora", "rank": 2}], ids=["weights", "lora"])
def test_a_killed_run_goes_on_with_the_same_bits_and_its_own_originals(
    tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small(tiny_sd(), tmp_path / "whole", checkpoint_every=2, **more)

    def kill(run: Run, entry: dict[str, Any]) -> None:
        if entry["iteration"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tiny_sd(), tmp_path / "part", checkpoint_every=2, callback=kill, **more)
    made = (tmp_path / "part" / stylize_originals.FILE).stat().st_mtime_ns
    monkeypatch.setattr(
        stylize_originals.Originals, "_make", lambda *args: pytest.fail("sampled the originals again")
    )
    part = small(tiny_sd(), tmp_path / "part", checkpoint_every=2, **more)
    assert (tmp_path / "part" / stylize_originals.FILE).stat().st_mtime_ns == made
    assert part.finished
    _same(part, whole)


def _same(part: Run, whole: Run) -> None:
    assert part.record["figures"] == whole.record["figures"]
    for name in ("best", "best_images", "pictures"):
        found, wanted = part.tensors(name), whole.tensors(name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_a_run_killed_among_its_originals_or_before_its_page_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small(tiny_sd(), tmp_path / "whole")
    write, read = stylize_originals.Originals._write, []

    def first_chunk(self: Any, images: Tensor) -> None:
        write(self, images)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stylize_originals.Originals, "_write", first_chunk)
        with pytest.raises(KeyboardInterrupt):
            small(tiny_sd(), tmp_path / "part")
    assert len(load_file(tmp_path / "part" / stylize_originals.FILE)["images"]) == 4
    with monkeypatch.context() as patch:
        import backdrift.recipes.stylize_page as page

        patch.setattr(page, "_sample", lambda *args: read.append(1) or pytest.fail("x"))
        with pytest.raises(BaseException, match="x"):
            small(tiny_sd(), tmp_path / "part")
    part = small(tiny_sd(), tmp_path / "part")
    assert part.finished
    _same(part, whole)
    assert small(tiny_sd(), tmp_path / "part").record == part.record  # and is then returned as it is


def test_another_reference_does_not_take_a_folder_over(tmp_path: Path) -> None:
    small(tiny_sd(), tmp_path / "a", steps=1)
    with pytest.raises(InputError, match="other settings"):
        small(tiny_sd(), tmp_path / "a", steps=1, reference=pictures(1, 4)[0])


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"noises": 0}, "noises=0 must be a whole number, at least 1"),
        ({"epochs": True}, "epochs=True"),
        ({"minibatch": 0}, "minibatch=0"),
        ({"shown": -1}, "shown=-1"),
        ({"style_weight": 0.0}, "style_weight=0 leaves nothing to learn"),
        ({"content_weight": -1.0}, "content_weight=-1.0 must be a finite number"),
        ({"over": "noise"}, "'noise' belongs to one picture"),
        ({"over": Noise()}, "must be weights"),
        ({"over": "unet.nothing"}, "matches no weight"),
        ({"over": "lora"}, "carries no active LoRA: load one, or give rank=4"),
        ({"rank": 4}, "rank=4 makes a LoRA"),
        ({"network": "built-in:vgg"}, "No network called 'built-in:vgg'"),
        ({"style_layers": [9]}, "blocks are 1 to 4, got block=9"),
        ({"style_layers": ["relu1_1"]}, "numbers of blocks, 1 to 4, got 'relu1_1'"),
        ({"content_layers": []}, "at least one entry"),
        ({"reference": "nowhere.png"}, "'nowhere.png' does not exist"),
        ({"reference": REFERENCE * 255}, "values are in"),
        ({"through": "last:9"}, "9"),
        ({"height": 17}, "height=17"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_used_is_refused_before_anything_is_sampled(
    tmp_path: Path, given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stylize_originals.Originals, "of", lambda *args: pytest.fail("began to work"))
    with pytest.raises(InputError, match=words.replace("(", "\\(")):
        small(tiny_sd(), tmp_path / "a", **given)


def test_no_prompt_and_a_prompt_that_is_too_long_are_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {"network": CLASSIFIER, "out": tmp_path / "a", "progress": False}
    with pytest.raises(InputError, match="no prompts"):
        stylize(tiny_sd(), REFERENCE, [], **given)
    with pytest.raises(InputError, match="tokens"):
        stylize(tiny_sd(), REFERENCE, "abcdefghijkl", **given)
    with pytest.raises(InputError, match="tokens"):
        stylize(tiny_sd(), REFERENCE, "a", unseen_prompts=["abcdefghijkl"], **given)
    assert not (tmp_path / "a").exists()


def test_the_originals_are_the_targets() -> None:
    loss = StyleAndContent(REFERENCE, Features(CLASSIFIER))
    images, originals = pictures(2, 1), pictures(2, 2)
    examples: Sequence[Example] = [Example("a", torch.zeros(1), target) for target in originals]
    assert torch.equal(loss(images, examples), loss.of(images, originals))
