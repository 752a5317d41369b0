"""Small random networks of the losses' real classes, in memory and saved as their checkpoints are."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = ["a", "blue", "red", "two", "one", "seven"]


def pictures(n: int = 2, side: int = 64, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_clip(folder: Path) -> dict[str, Any]:
    """A CLIP of random weights for 16x16 pictures and 16 tokens, with a tokenizer of a few words."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    pieces = [*"abcdefghijklmnopqrstuvwxyz", *(c + "</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = [*dict.fromkeys([*pieces, *(w + "</w>" for w in WORDS)]), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    last = len(vocabulary) - 1
    ends = {"eos_token_id": last, "bos_token_id": last - 1, "pad_token_id": last}
    config = CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 16},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval().requires_grad_(False)
    return {"model": model, "tokenizer": tokenizer}


def save_clip(folder: Path, clip: dict[str, Any], mean: Any = None, std: Any = None) -> None:
    """The CLIP as its published checkpoints are: weights, tokenizer, pixel statistics."""
    from transformers import CLIPImageProcessor

    clip["model"].save_pretrained(folder)
    clip["tokenizer"].save_pretrained(folder)
    size = clip["model"].config.vision_config.image_size
    CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=mean or [0.4, 0.5, 0.6],
        image_std=std or [0.2, 0.3, 0.4],
    ).save_pretrained(folder)


def vgg_weights(widths: tuple[int, ...] = (3, 4, 5, 6, 7)) -> dict[str, Tensor]:
    """VGG-19's convolutions by torchvision's names, narrow, of random weights that keep the signal's size."""
    generator, state, position, before = torch.Generator().manual_seed(0), {}, 0, 3
    for width, convolutions in zip(widths, (2, 2, 4, 4, 4), strict=True):
        for _ in range(convolutions):
            weight = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
            state[f"features.{position}.weight"] = weight
            state[f"features.{position}.bias"] = torch.randn(width, generator=generator) * 0.1
            before, position = width, position + 2
        position += 1
    return state


def head_weights(sizes: tuple[int, ...], prefix: str = "layers.", every: int = 2) -> dict[str, Tensor]:
    """Linear layers from ``sizes[0]`` to ``sizes[-1]`` values, numbered as between dropout layers."""
    generator, state = torch.Generator().manual_seed(0), {}
    for i, (narrow, wide) in enumerate(pairwise(sizes)):
        state[f"{prefix}{every * i}.weight"] = torch.randn(wide, narrow, generator=generator) / narrow**0.5
        state[f"{prefix}{every * i}.bias"] = torch.randn(wide, generator=generator)
    return state


def preference_weights(widths: tuple[int, ...] = (4, 5, 6), hidden: int = 5) -> dict[str, Tensor]:
    """A preference network's tensors, narrow, of random weights that keep the signal's size."""
    generator, state, before = torch.Generator().manual_seed(0), {}, 3
    for i, width in enumerate(widths):
        side = 5 if i == 0 else 3
        weight = torch.randn(width, before, side, side, generator=generator)
        state[f"convolutions.{i}.weight"] = weight * (2 / (side**2 * before)) ** 0.5
        state[f"convolutions.{i}.bias"] = torch.randn(width, generator=generator) * 0.1
        before = width
    seen = 2 * (3 + sum(widths))
    for name, rows, columns in (("first", hidden, seen), ("last", 1, hidden)):
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        state[f"{name}.bias"] = torch.randn(rows, generator=generator)
    return state


def reward_weights(width: int = 64, depth: int = 2, words: int = 40) -> dict[str, Tensor]:
    """ImageReward's tensors by its checkpoint's names, narrow: pictures of 32 pixels in patches of 16."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    state: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(rows, columns), draw(rows)

    def norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width), draw(width)

    seen = "blip.visual_encoder"
    state[f"{seen}.cls_token"], state[f"{seen}.pos_embed"] = draw(1, 1, width), draw(1, 5, width)
    state[f"{seen}.patch_embed.proj.weight"] = draw(width, 3, 16, 16)
    state[f"{seen}.patch_embed.proj.bias"] = draw(width)
    for i in range(depth):
        block = f"{seen}.blocks.{i}"
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", 2 * width, width)
        linear(f"{block}.mlp.fc2", width, 2 * width)
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
    norm(f"{seen}.norm")
    read = "blip.text_encoder"
    state[f"{read}.embeddings.word_embeddings.weight"] = draw(words, width)
    state[f"{read}.embeddings.position_embeddings.weight"] = draw(48, width)
    state[f"{read}.embeddings.position_ids"] = torch.arange(48)[None]
    norm(f"{read}.embeddings.LayerNorm")
    for i in range(depth):
        block = f"{read}.encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{block}.{attention}.self.{part}", width, width)
            linear(f"{block}.{attention}.output.dense", width, width)
            norm(f"{block}.{attention}.output.LayerNorm")
        linear(f"{block}.intermediate.dense", 2 * width, width)
        linear(f"{block}.output.dense", width, 2 * width)
        norm(f"{block}.output.LayerNorm")
    return state | {f"mlp.{k}": v for k, v in head_weights((width, 8, 4, 1)).items()}


class TinyFaces(torch.nn.Module):
    """A small face network: RGB squares of 112 pixels in [-1, 1] to 8 values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 7, stride=7),
            torch.nn.BatchNorm2d(4),
            torch.nn.PReLU(4),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 16 * 16, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def tiny_faces() -> TinyFaces:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyFaces().eval().requires_grad_(False)


def save_vocabulary(folder: Path) -> None:
    """A BERT vocabulary of a few words, as ``vocab.txt``."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")


def save_all(folder: Path, clip: dict[str, Any]) -> None:
    """What the examples of the registered losses name: a picture, a CLIP, and the other networks' files."""
    from PIL import Image
    from safetensors.torch import save_file

    Image.new("RGB", (64, 64), (51, 102, 204)).save(folder / "target.png")
    save_clip(folder / "clip", clip)
    torch.save(vgg_weights(), folder / "vgg19.pth")
    torch.save(head_weights((8, 6, 1)), folder / "head.pth")
    torch.save(reward_weights(), folder / "ImageReward.pt")
    save_file(preference_weights(), folder / "preference.safetensors")
    save_vocabulary(folder)
    torch.jit.script(tiny_faces()).save(str(folder / "face.pt"))


def slopes(loss: Any, images: Tensor, step: float = 1e-6, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Each sample's slope along a random direction: by the gradient, and by central differences."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(images, **kwargs).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=images.dtype)
    with torch.no_grad():
        ahead, behind = (loss(images + sign * step * direction, **kwargs) for sign in (1, -1))
    return (gradient * direction).flatten(1).sum(1), (ahead - behind) / (2 * step)
