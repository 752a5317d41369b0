"""Losses by networks trained on people's judgement, on small ones of the same classes and checkpoint layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from backdrift import losses
from backdrift.errors import InputError
from backdrift.losses.clip import OPENAI_MEAN, OPENAI_STD
from backdrift.losses.hpsv2 import letterbox
from backdrift.losses.image_reward import SCORE_MEAN, SCORE_STD, TOKENS
from backdrift.losses.open_clip import from_open_clip
from tiny_losses import (
    head_weights,
    pictures,
    reward_weights,
    save_clip,
    save_vocabulary,
    slopes,
    tiny_clip,
)

PROMPTS = ["a red two", "a blue seven"]


@pytest.fixture
def clip(tmp_path: Path) -> dict[str, Any]:
    made = tiny_clip(tmp_path)
    save_clip(tmp_path / "clip", made)
    return {**made, "folder": str(tmp_path / "clip")}


def as_png(images: Tensor) -> tuple[list[Image.Image], Tensor]:
    eight = (images * 255).round().to(torch.uint8)
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in eight], eight.float() / 255


def embedded(clip: dict[str, Any], opened: list[Image.Image]) -> Tensor:
    """Unit embeddings by transformers' own processor and model."""
    from transformers import CLIPImageProcessor

    pixels = CLIPImageProcessor.from_pretrained(clip["folder"])(opened, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = clip["model"].vision_model(pixel_values=pixels).pooler_output
        found = clip["model"].visual_projection(pooled)
    return found / found.norm(dim=-1, keepdim=True)


# ---- LAION's aesthetic predictors --------------------------------------------------------------------


@pytest.mark.parametrize(("side", "tolerance"), [(16, 1e-5), (40, 1e-2)])
def test_aesthetic_v2_is_its_linear_layers_on_the_embedding(
    clip: dict[str, Any], tmp_path: Path, side: int, tolerance: float
) -> None:
    # The published numbering, with dropout at 1, 3 and 5: layers 0, 2, 4, 6, 7.
    state = head_weights((8, 6, 5, 4)) | {
        f"layers.{n}.{kind}": t
        for n, old in ((6, 0), (7, 1))
        for kind in ("weight", "bias")
        for t in [head_weights((4, 3, 1), every=1)[f"layers.{old}.{kind}"]]
    }
    torch.save(state, tmp_path / "v2.pth")
    net = nn.Sequential(
        nn.Linear(8, 6), nn.Dropout(0.2), nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 4), nn.Dropout(0.1),
        nn.Linear(4, 3), nn.Linear(3, 1),
    )  # fmt: skip
    net.load_state_dict({name.removeprefix("layers."): t for name, t in state.items()})
    opened, images = as_png(pictures(2, side))
    with torch.no_grad():
        expected = net.eval()(embedded(clip, opened))[:, 0]
    loss = losses.resolve(f"aesthetic:{tmp_path / 'v2.pth'}@{clip['folder']}")
    torch.testing.assert_close(loss(images), -expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["weight", "predictor.weight"])
def test_aesthetic_v1_is_one_linear_layer_in_either_layout(
    clip: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    weight, bias = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0])
    state = {layout: weight, layout.replace("weight", "bias"): bias, "vision_model.x": torch.zeros(1)}
    torch.save(state, tmp_path / "v1.pth")
    opened, images = as_png(pictures(2, 16))
    loss = losses.Aesthetic(tmp_path / "v1.pth", clip["folder"])
    expected = -(embedded(clip, opened) @ weight[0] + 5)
    torch.testing.assert_close(loss(images), expected, rtol=1e-5, atol=1e-5)


def test_aesthetic_names_what_does_not_fit(clip: dict[str, Any], tmp_path: Path) -> None:
    torch.save(head_weights((768, 1)), tmp_path / "wide.pth")
    with pytest.raises(InputError, match="takes embeddings of 768 values, this CLIP's have 8"):
        losses.Aesthetic(tmp_path / "wide.pth", clip["model"])
    torch.save(head_weights((8, 2)), tmp_path / "two.pth")
    with pytest.raises(InputError, match="linear layers that end in one value"):
        losses.Aesthetic(tmp_path / "two.pth", clip["model"])
    with pytest.raises(InputError, match="weights of an aesthetic predictor are not there: 'v3'"):
        losses.Aesthetic("v3", clip["model"])


# ---- PickScore and HPSv2 -----------------------------------------------------------------------------


def test_pickscore_is_transformers_scaled_logit(clip: dict[str, Any]) -> None:
    opened, images = as_png(pictures(2, 16))
    tokens = clip["tokenizer"](PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    from transformers import CLIPImageProcessor

    pixels = CLIPImageProcessor.from_pretrained(clip["folder"])(opened, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = clip["model"](pixel_values=pixels, **tokens).logits_per_image
    loss = losses.resolve(f"pickscore:@{clip['folder']}")
    torch.testing.assert_close(loss(images, PROMPTS), -logits.diagonal(), rtol=1e-5, atol=1e-5)
    fixed = losses.resolve(f"pickscore:{PROMPTS[1]}@{clip['folder']}")
    torch.testing.assert_close(fixed(images), -logits[:, 1], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="'pickscore' has neither a text nor a prompt"):
        loss(images)


def test_hpsv2_in_transformers_layout_is_the_cosine(clip: dict[str, Any]) -> None:
    opened, images = as_png(pictures(2, 16))
    tokens = clip["tokenizer"](PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        texts = clip["model"].text_projection(clip["model"].text_model(**tokens).pooler_output)
    cosines = (embedded(clip, opened) * texts / texts.norm(dim=-1, keepdim=True)).sum(1)
    loss = losses.resolve(f"hpsv2:@{clip['folder']}")
    torch.testing.assert_close(loss(images, PROMPTS), -cosines, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(10, 20), (20, 10), (13, 8)])
def test_letterboxed_pictures_are_whole_and_on_black(height: int, width: int) -> None:
    images = torch.ones(1, 3, height, width, dtype=torch.float64)
    square = letterbox(images, 8)
    assert square.shape == (1, 3, 8, 8)
    rows, columns = round(8 * height / max(height, width)), round(8 * width / max(height, width))
    assert square.sum().item() == pytest.approx(3 * rows * columns)  # white remains white, the rest is black
    top, left = (8 - rows) // 2, (8 - columns) // 2
    assert square[0, 0, top : top + rows, left : left + columns].min().item() == pytest.approx(1)


class OpenCLIP(nn.Module):
    """CLIP's definition with open_clip's names, by PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.randn(160))
        self.visual.positional_embedding = nn.Parameter(torch.randn(5, 160))
        self.visual.conv1 = nn.Conv2d(3, 160, 8, stride=8, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(160), nn.LayerNorm(160)
        self.visual.transformer = self.blocks(160, 2)
        self.visual.proj = nn.Parameter(torch.randn(160, 12) / 12)
        self.token_embedding = nn.Embedding(80, 128)
        self.positional_embedding = nn.Parameter(torch.randn(16, 128))
        self.transformer = self.blocks(128, 2)
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.randn(128, 12) / 12)
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    @staticmethod
    def blocks(width: int, heads: int) -> nn.Module:
        made = nn.Module()
        made.resblocks = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            block.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            block.mlp = nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            nn.init.normal_(block.attn.in_proj_bias)
            made.resblocks.append(block)
        return made

    @staticmethod
    def run(blocks: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in blocks.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp.c_proj(nn.functional.gelu(block.mlp.c_fc(block.ln_2(x))))
        return x

    def encode_image(self, pixels: Tensor) -> Tensor:
        patches = self.visual.conv1(pixels).flatten(2).mT
        first = self.visual.class_embedding.expand(len(pixels), 1, -1)
        x = self.visual.ln_pre(torch.cat([first, patches], 1) + self.visual.positional_embedding)
        return self.visual.ln_post(self.run(self.visual.transformer, x)[:, 0]) @ self.visual.proj

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((16, 16), float("-inf")).triu(1)
        x = self.ln_final(self.run(self.transformer, x, mask))
        return x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection


def open_clip() -> OpenCLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OpenCLIP().eval().requires_grad_(False)


def test_hpsv2_reads_open_clip_weights(clip: dict[str, Any], tmp_path: Path) -> None:
    """The converted network agrees with CLIP's definition, through the published kind of file."""
    theirs = open_clip()
    torch.save({"epoch": 1, "state_dict": theirs.state_dict()}, tmp_path / "HPS_v2_compressed.pt")
    words = clip["tokenizer"](PROMPTS, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    shift = 79 - int(words.max())  # the tiny tokenizer's end has to be the table's last row
    tokenizer = Shifted(clip["tokenizer"], shift)
    loss = losses.HPSv2(None, str(tmp_path / "HPS_v2_compressed.pt"), tokenizer)
    images = pictures(2, 16, torch.float32)
    mean, std = (torch.tensor(s)[:, None, None] for s in (OPENAI_MEAN, OPENAI_STD))
    u, v = theirs.encode_image((images - mean) / std), theirs.encode_text(words + shift)
    torch.testing.assert_close(
        loss(images, PROMPTS), -nn.functional.cosine_similarity(u, v), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(loss.embed_images(images), nn.functional.normalize(u, dim=-1))
    torch.testing.assert_close(loss.embed_texts(PROMPTS), nn.functional.normalize(v, dim=-1))
    assert loss.model.logit_scale.item() == pytest.approx(4.6)


class Shifted:
    """A tokenizer whose numbers are ``by`` larger."""

    def __init__(self, tokenizer: Any, by: int) -> None:
        self.tokenizer, self.by = tokenizer, by

    def __call__(self, texts: Any, **kwargs: Any) -> Any:
        made = self.tokenizer(texts, **kwargs)
        if kwargs:
            made["input_ids"] = made["input_ids"] + self.by
        return made


def test_weights_that_are_no_clip_are_named(clip: dict[str, Any], tmp_path: Path) -> None:
    state = open_clip().state_dict()
    del state["visual.ln_pre.weight"]
    with pytest.raises(InputError, match=r"not a CLIP in open_clip's layout .* 'visual\.ln_pre\.weight'"):
        from_open_clip(state, vision_head=80)
    with pytest.raises(InputError, match="weights of HPSv2 are not there"):
        losses.resolve("hpsv2:@v9")


# ---- ImageReward -------------------------------------------------------------------------------------


def image_reward_by_hand(state: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """BLIP's picture encoder, its text encoder with cross-attention, and the head, from their equations."""
    gelu, norm = nn.functional.gelu, nn.functional.layer_norm

    def get(name: str) -> Tensor:
        return state[name].to(pixels)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def normal(x: Tensor, name: str, eps: float) -> Tensor:
        return norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
        scores = q @ k.mT / q.shape[-1] ** 0.5  # one head of 64
        if allowed is not None:
            scores = scores.masked_fill(allowed[:, None] == 0, float("-inf"))
        return scores.softmax(-1) @ v

    seen = "blip.visual_encoder"
    patch = get(f"{seen}.patch_embed.proj.weight")
    x = nn.functional.conv2d(pixels, patch, get(f"{seen}.patch_embed.proj.bias"), stride=16).flatten(2).mT
    x = torch.cat([get(f"{seen}.cls_token").expand(len(x), -1, -1), x], 1) + get(f"{seen}.pos_embed")
    for i in range(2):
        q, k, v = linear(normal(x, f"{seen}.blocks.{i}.norm1", 1e-6), f"{seen}.blocks.{i}.attn.qkv").chunk(
            3, -1
        )
        x = x + linear(attend(q, k, v), f"{seen}.blocks.{i}.attn.proj")
        inner = linear(normal(x, f"{seen}.blocks.{i}.norm2", 1e-6), f"{seen}.blocks.{i}.mlp.fc1")
        x = x + linear(gelu(inner), f"{seen}.blocks.{i}.mlp.fc2")
    x = normal(x, f"{seen}.norm", 1e-6)
    read = "blip.text_encoder"
    y = get(f"{read}.embeddings.word_embeddings.weight")[tokens]
    y = y + get(f"{read}.embeddings.position_embeddings.weight")[: tokens.shape[1]]
    y = normal(y, f"{read}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        for kind, other, allowed in (("attention", None, mask), ("crossattention", x, None)):
            name, source = f"{read}.encoder.layer.{i}.{kind}", y if other is None else other
            q = linear(y, f"{name}.self.query")
            k, v = linear(source, f"{name}.self.key"), linear(source, f"{name}.self.value")
            out = linear(attend(q, k, v, allowed), f"{name}.output.dense")
            y = normal(y + out, f"{name}.output.LayerNorm", 1e-12)
        name = f"{read}.encoder.layer.{i}"
        out = linear(gelu(linear(y, f"{name}.intermediate.dense")), f"{name}.output.dense")
        y = normal(y + out, f"{name}.output.LayerNorm", 1e-12)
    score = y[:, 0]
    for n in (0, 2, 4):
        score = linear(score, f"mlp.layers.{n}")
    return (score[:, 0] - SCORE_MEAN) / SCORE_STD


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    torch.save(reward_weights(), tmp_path / "ImageReward.pt")
    save_vocabulary(tmp_path)
    return tmp_path


def test_image_reward_is_its_equations(reward: Path) -> None:
    from transformers import BertTokenizer

    loss = losses.resolve(f"imagereward:@{reward}").double()
    images = pictures(2, 32)
    mean, std = (torch.tensor(s).double()[:, None, None] for s in (OPENAI_MEAN, OPENAI_STD))
    long = [PROMPTS[0], "a blue seven " * 20]  # over 35 tokens: what is beyond is not seen
    read = BertTokenizer.from_pretrained(reward)(
        long, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    expected = image_reward_by_hand(
        reward_weights(), (images - mean) / std, read["input_ids"], read["attention_mask"]
    )
    torch.testing.assert_close(-loss(images, long), expected, rtol=1e-6, atol=1e-6)
    assert expected.std() > 1e-3
    fixed = losses.resolve(f"imagereward:{PROMPTS[0]}@{reward}").double()
    torch.testing.assert_close(fixed(images)[:1], loss(images, long)[:1], rtol=1e-12, atol=0)
    assert (fixed(images)[1] - loss(images, long)[1]).abs() > 1e-4  # the prompt matters


def test_image_reward_names_what_is_missing(reward: Path, tmp_path: Path) -> None:
    state = reward_weights()
    del state["blip.visual_encoder.norm.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(InputError, match="not those of ImageReward"):
        losses.ImageReward(None, tmp_path / "part.pt")
    with pytest.raises(InputError, match="'imagereward' has neither a text nor a prompt"):
        losses.ImageReward(None, reward)(pictures(1, 32))


# ---- of all of them ----------------------------------------------------------------------------------


def every(clip: dict[str, Any], folder: Path) -> list[losses.Loss]:
    torch.save(head_weights((8, 6, 1)), folder / "head.pth")
    torch.save(reward_weights(), folder / "ImageReward.pt")
    save_vocabulary(folder)
    model, tokenizer = clip["model"], clip["tokenizer"]
    return [
        losses.Aesthetic(folder / "head.pth", model),
        losses.PickScore(None, model, tokenizer),
        losses.HPSv2(None, model, tokenizer),
        losses.ImageReward(None, folder),
    ]


def test_gradients_agree_with_differences(clip: dict[str, Any], tmp_path: Path) -> None:
    for loss in every(clip, tmp_path):
        by_gradient, by_differences = slopes(loss.double(), pictures(2, 24), prompts=PROMPTS)
        torch.testing.assert_close(by_gradient, by_differences, rtol=1e-5, atol=1e-8)
        assert by_gradient.abs().min() > 0


def test_networks_in_half_precision_give_a_gradient(clip: dict[str, Any], tmp_path: Path) -> None:
    images = pictures(2, 24, torch.float32)
    wide = [loss(images, PROMPTS) for loss in every(clip, tmp_path)]
    for loss, expected in zip(every(clip, tmp_path), wide, strict=True):
        half = images.to(torch.bfloat16).requires_grad_()
        values = loss.to(torch.bfloat16)(half, PROMPTS)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected, rtol=0.1, atol=0.1)
        (gradient,) = torch.autograd.grad(values.sum(), half)
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_plans_count_them(clip: dict[str, Any], tmp_path: Path) -> None:
    from backdrift.pipelines.scored import count_loss
    from backdrift.planning.meta import weight_bytes

    for loss in every(clip, tmp_path):
        found, notes = count_loss(loss, torch.empty(2, 3, 24, 24, device="meta"))
        assert notes == ()
        assert found is not None
        assert found.weights == weight_bytes(loss)
        assert found.profile.saved > 0
