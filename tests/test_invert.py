"""Inversion to an embedding: known answers, both kinds of file, and the encoding of pictures to noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backdrift import invert
from backdrift.descent.subject import encode_prompt
from backdrift.errors import InputError, UnsupportedError
from backdrift.pictures import to_pil
from backdrift.recipes import Embedding, Pair, effect_pairs, load_embedding
from backdrift.recipes.ddim import DDIM, encode_to_noise
from backdrift.recipes.pairs import to_tensor
from backdrift.run import Run
from tiny_pipelines import LATENT, PICTURE, TOKENS, WIDTH, noise_for, tiny_sd, tiny_sd3, tiny_sdxl

STEPS = 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def picture(pipe: Any, embedding: Embedding, prompt: str, noise: Tensor) -> Tensor:
    """Unclamped, as the loop sees it."""
    from backdrift import differentiable

    with differentiable(pipe):
        return pipe(
            prompt_embeds=embedding.apply(pipe, prompt),
            latents=noise,
            num_inference_steps=STEPS,
            guidance_scale=7.5,
        ).images[0]


def known_pairs(pipe: Any, embedding: Embedding, prompts: tuple[str, ...] = ("a 2", "b 7")) -> list[Pair]:
    noises = [noise_for(pipe, seed=i) for i in range(len(prompts))]
    return [Pair(p, picture(pipe, embedding, p, n), noise=n) for p, n in zip(prompts, noises, strict=True)]


def run_invert(pipe: Any, pairs: Any, out: Path, **kwargs: Any) -> Run:
    return invert(pipe, pairs, out=out, **{"num_inference_steps": STEPS, "progress": False, **kwargs})


# -- known answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", ["output", "tokens"])
def test_the_paper_s_settings_recover_an_effect_that_an_embedding_made(tmp_path: Path, slots: Any) -> None:
    """The loss falls by 90 %, on a pair that was not trained on by half."""
    pipe = tiny_sd()
    table = pipe.text_encoder.get_input_embeddings().weight
    size = 1.5 if slots == "output" else 3 * table.detach().square().mean().sqrt().item()
    hidden = Embedding(random(3, WIDTH) * size, slots, "#")
    pairs, unseen = known_pairs(pipe, hidden, ("a 2",)), known_pairs(pipe, hidden, ("q", "b 7"))[1]
    run = run_invert(pipe, pairs, tmp_path / "a", slots=slots, n_slots=3, placeholder="#")
    settings = run.record["settings"]
    assert (settings["optimizer"], settings["steps"], settings["loss"]) == ("adamw", 50, "mean squared error")
    assert settings["lr"] == pytest.approx(
        0.1 if slots == "output" else 0.1 * table.square().mean().sqrt().item()
    )
    figures = run.record["figures"]
    assert figures["best loss"] <= 0.1 * figures["loss before"]
    found = load_embedding(run.folder / run.record["files"]["embedding"]["path"])
    assert (found.slots, found.placeholder) == (slots, "#")
    assert torch.equal(found.vectors, run.best.tensors["embedding"])
    assert unseen.noise is not None
    plain = picture_of_prompt(pipe, unseen.prompt, unseen.noise)
    error = (picture(pipe, found, unseen.prompt, unseen.noise) - unseen.target).square().mean()
    assert error <= 0.5 * (plain - unseen.target).square().mean()


@torch.no_grad()
def picture_of_prompt(pipe: Any, prompt: str, noise: Tensor) -> Tensor:
    from backdrift import differentiable

    with differentiable(pipe):
        return pipe(prompt, latents=noise, num_inference_steps=STEPS, guidance_scale=7.5).images[0]


def test_the_start_is_the_picture_without_the_effect(tmp_path: Path) -> None:
    """The free slots start as the padding's own output, so with one prompt nothing is changed at first."""
    pipe, noise = tiny_sd(), noise_for(tiny_sd())
    plain = picture_of_prompt(pipe, "a 2", noise)
    run = run_invert(pipe, [Pair("a 2", plain + 0.1, noise=noise)], tmp_path / "a", steps=1)
    assert run.record["iterations"][0]["loss"] == pytest.approx(0.01, rel=1e-4)
    assert run.record["figures"]["vectors"] == TOKENS - 4  # start, a, 2, end


def test_held_out_pairs_are_measured_and_not_trained_on(tmp_path: Path) -> None:
    pipe = tiny_sd()
    pairs = known_pairs(pipe, Embedding(random(2, WIDTH)), ("a 2", "b 7", "c 5"))
    run = run_invert(pipe, pairs[:2], tmp_path / "a", n_slots=2, steps=2, heldout_pairs=pairs[2:])
    first = run.record["iterations"][0]
    assert first["examples"] == [0, 1]
    expected = run_invert(
        pipe, pairs[2:], tmp_path / "b", n_slots=2, steps=0, init=_start(pipe, ["a 2", "b 7", "c 5"])
    )
    assert first["heldout"] == pytest.approx(expected.record["iterations"][0]["loss"], rel=1e-5)


def _start(pipe: Any, prompts: list[str]) -> Tensor:
    return encode_prompt(pipe, prompts)["prompt_embeds"][:, 4:6].mean(0).detach()


# -- the embedding in a prompt ------------------------------------------------------------------------------


def test_output_slots_follow_the_prompt_and_leave_the_rest() -> None:
    pipe, vectors = tiny_sd(), random(2, WIDTH)
    base = encode_prompt(pipe, ["a 2"])["prompt_embeds"][0]
    for prompt in ("a 2", "a 2 #", "a 2, #"):  # the placeholder is for the reader
        placed = Embedding(vectors).apply(pipe, prompt)[0]
        assert torch.equal(placed[4:6], vectors)
        assert torch.equal(placed[:4], base[:4])
        assert torch.equal(placed[6:], base[6:])


def test_a_prompt_with_too_few_slots_is_refused_or_gets_the_first_vectors() -> None:
    pipe, vectors = tiny_sd(), random(4, WIDTH)
    with pytest.raises(InputError, match="leaves 2 of 8 positions, the embedding has 4"):
        Embedding(vectors).apply(pipe, "a b c 2")
    with pytest.warns(UserWarning, match="the last 2 are dropped"):
        placed = Embedding(vectors).apply(pipe, "a b c 2", strict=False)[0]
    assert torch.equal(placed[6:], vectors[:2])
    with pytest.raises(InputError, match="leaves 0"):
        Embedding(vectors).apply(pipe, "a b c d e 2", strict=False)


def test_a_trained_embedding_is_refused_where_the_prompts_leave_no_room(tmp_path: Path) -> None:
    pipe = tiny_sd()
    pair = Pair("a b c 2", torch.zeros(3, PICTURE, PICTURE), noise=noise_for(pipe))
    with pytest.raises(InputError, match="n_slots=3: the prompt 'a b c 2' leaves 2 of 8"):
        run_invert(pipe, [pair], tmp_path / "a", n_slots=3)


@pytest.mark.parametrize("n", [1, 2])
def test_diffusers_own_loader_makes_the_same_picture_bit_for_bit(tmp_path: Path, n: int) -> None:
    pipe = tiny_sd()
    embedding = Embedding(random(n, WIDTH), "tokens", "<effect>")
    embedding.save(tmp_path / "learned_embeds.safetensors")
    noise, call = noise_for(pipe), {"num_inference_steps": STEPS, "output_type": "pt"}
    vocabulary, table = len(pipe.tokenizer), pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        ours = pipe(prompt_embeds=embedding.apply(pipe, "a 2 <effect>"), latents=noise, **call).images
    assert len(pipe.tokenizer) == vocabulary
    assert pipe.text_encoder.get_input_embeddings().weight is table
    other = tiny_sd()
    other.load_textual_inversion(str(tmp_path))
    assert torch.equal(other("a 2 <effect>", latents=noise, **call).images, ours)
    assert not torch.equal(pipe("a 2", latents=noise, **call).images, ours)


def test_both_files_come_back_and_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for slots, placeholder in (("output", "#"), ("tokens", "<effect>")):
        saved = Embedding(random(3, WIDTH), slots, placeholder)  # type: ignore[arg-type]
        found = load_embedding(saved.save(tmp_path / "a.safetensors"))
        assert (found.slots, found.placeholder) == (slots, placeholder)
        assert torch.equal(found.vectors, saved.vectors)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="is no embedding"):
        load_embedding(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"rubbish")
    for name in ("c.safetensors", "missing.safetensors"):
        with pytest.raises(InputError, match="not a readable safetensors file"):
            load_embedding(tmp_path / name)


def test_other_pipelines(tmp_path: Path) -> None:
    """SDXL's two encoders share their positions, so output slots fit; SD3's output is longer than the prompt."""
    xl = tiny_sdxl()
    placed = Embedding(random(2, 2 * WIDTH)).call(xl, ["a 2"])
    assert torch.equal(placed["prompt_embeds"][0, 4:6], random(2, 2 * WIDTH))
    assert placed["pooled_prompt_embeds"].shape == (1, WIDTH)
    with pytest.raises(UnsupportedError, match="one text encoder"):
        Embedding(random(2, WIDTH), "tokens", "<effect>").apply(xl, "a 2")
    with pytest.raises(UnsupportedError, match="8 tokens"):
        Embedding(random(2, 2 * WIDTH)).apply(tiny_sd3(), "a 2")


# -- pictures without their noise ---------------------------------------------------------------------------


def test_the_steps_are_diffusers_own_ddim() -> None:
    pipe, noise = tiny_sd(), noise_for(tiny_sd())
    ddim = DDIM(pipe, ["a 2"], num_inference_steps=4, guidance_scale=7.5)
    x = noise
    with torch.no_grad():
        for i in range(len(ddim)):
            x = ddim.step(x, ddim.predict(x, i)[0], i)
        theirs = pipe(
            "a 2", latents=noise, num_inference_steps=4, guidance_scale=7.5, output_type="latent"
        ).images
        assert torch.allclose(x, theirs, rtol=0, atol=1e-5)
        pictures = pipe(
            "a 2", latents=noise, num_inference_steps=4, guidance_scale=7.5, output_type="pt"
        ).images
        assert torch.allclose(ddim.decode(x).clamp(0, 1), pictures, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_more_iterations_invert_the_steps_to_rounding(prediction: str) -> None:
    pipe = tiny_sd()
    pipe.scheduler.register_to_config(prediction_type=prediction)
    ddim = DDIM(pipe, ["a 2"], num_inference_steps=5, guidance_scale=1.0)
    noise, errors = noise_for(pipe), []
    with torch.no_grad():
        x = noise
        for i in range(len(ddim)):
            x = ddim.step(x, ddim.predict(x, i)[0], i)
        for iterations in (1, 3, 15):
            y = x
            for i in reversed(range(len(ddim))):
                y = ddim.unstep(y, i, iterations)
            errors.append((y - noise).abs().max().item())
    assert errors[2] < 1e-4, errors
    assert errors[0] > errors[1] > errors[2]


def test_a_picture_without_noise_is_encoded_and_its_error_written_down(tmp_path: Path) -> None:
    """With an autoencoder that is exact, what is left is the error of the steps."""
    pipe = exact_autoencoder(tiny_sd())
    noise = noise_for(pipe)
    call = {"num_inference_steps": 5, "guidance_scale": 1.0}
    with torch.no_grad():
        source = pipe("a 2", latents=noise, output_type="pt", **call).images
    assert 0 < source.min() < source.max() < 1  # else the clamp would lose something
    found = encode_to_noise(pipe, source, ["a 2"], iterations=15, **call)
    assert torch.allclose(found, noise, rtol=0, atol=1e-3)
    pair = (source[0], source[0] * 0.9, "a 2")
    run = run_invert(pipe, [pair], tmp_path / "a", steps=0, encode_iterations=15, **call)
    assert run.record["figures"]["error of encoding to noise (RMSE, mean)"] < 1e-4
    rough = run_invert(pipe, [pair], tmp_path / "b", steps=0, encode_iterations=1, **call)
    assert rough.record["figures"]["error of encoding to noise (RMSE, worst)"] > 1e-3


def exact_autoencoder(pipe: Any) -> Any:
    """Put in a decoder that shows three of the four channels enlarged, and an encoder that reads them back."""
    from types import SimpleNamespace

    class Shuffle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.config = SimpleNamespace(scaling_factor=0.5, latent_channels=4, block_out_channels=(1, 1))
            self.dtype, self.device = torch.float32, torch.device("cpu")

        def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
            quads = torch.nn.functional.pixel_shuffle(z * 0.02, 2)  # (n, 1, 2h, 2w)
            return (quads.expand(-1, 3, -1, -1),)

        def encode(self, x: Tensor) -> Any:
            z = torch.nn.functional.pixel_unshuffle(x[:, :1], 2) / 0.02
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    pipe.vae = Shuffle()
    return pipe


def test_the_pipeline_makes_pairs_of_its_own() -> None:
    pipe = tiny_sd()
    pairs = effect_pairs(pipe, ["a 2", "b"], "c", seeds=[3, 4], num_inference_steps=2)
    assert pairs[0].noise is not None
    assert pairs[0].noise.shape == (1, 4, LATENT, LATENT)
    for pair, wanted in ((pairs[0], "a 2, c"), (pairs[1], "b, c")):
        again = pipe(wanted, latents=pair.noise, num_inference_steps=2, output_type="pt").images[0]
        assert torch.equal(pair.target, again)
        without = pipe(pair.prompt, latents=pair.noise, num_inference_steps=2, output_type="pt").images[0]
        assert torch.equal(pair.source, without)
    assert not torch.equal(pairs[0].noise, pairs[1].noise)


# -- refusals -----------------------------------------------------------------------------------------------

BLACK = torch.zeros(3, PICTURE, PICTURE)


@pytest.mark.parametrize(
    ("pair", "kwargs", "message"),
    [
        (Pair("a", torch.zeros(3, 8, 8), noise=random(1, 4, 8, 8)), {}, "8x8 pixels .*16x16"),
        (Pair("a", BLACK), {}, "neither noise nor a source"),
        (Pair("a", torch.zeros(1, 16, 16), noise=random(1, 4, 8, 8)), {}, "must be"),
        (Pair("a", "missing.png", noise=random(1, 4, 8, 8)), {}, "does not exist"),
        ((BLACK, BLACK), {}, "A pair must be"),
        (Pair("a b c d e f g", BLACK, noise=random(1, 4, 8, 8)), {}, "tokens"),
        (Pair("a", BLACK, noise=random(1, 4, 8, 8)), {"slots": "pads"}, "slots='pads'"),
        (Pair("a", BLACK, noise=random(1, 4, 8, 8)), {"init": "b"}, "init="),
        (
            Pair("a b c d", BLACK, noise=random(1, 4, 8, 8)),
            {"slots": "tokens", "n_slots": 3},
            "has 9 tokens",
        ),
        (
            Pair("a", BLACK, noise=random(1, 4, 8, 8)),
            {"slots": "tokens", "placeholder": "b</w>"},
            "already knows",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, pair: Any, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_invert(tiny_sd(), [pair], tmp_path / "a", **kwargs)
    assert not (tmp_path / "a").exists()


def test_no_pairs_and_no_unet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pairs"):
        run_invert(tiny_sd(), [], tmp_path / "a")
    with pytest.raises(UnsupportedError, match="not a UNet pipeline"):
        encode_to_noise(tiny_sd3(), BLACK[None], ["a"])


def test_pictures_are_read_from_tensors_files_and_pil(tmp_path: Path) -> None:
    levels = torch.arange(3 * 4 * 4).view(3, 4, 4).float() / 255
    to_pil(levels).save(tmp_path / "a.png")
    for given in (levels, to_pil(levels), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(to_tensor(given), levels)
