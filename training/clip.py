"""The small CLIP: its text half is the pipelines' text encoder, both halves serve losses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .loop import WORK, device, train
from .scenes import BACKGROUNDS, COLOURS, DIGITS, EFFECTS, Scene, random_scene, render

MAX_LENGTH = 24
VOCABULARY = WORK / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"


def write_vocabulary(folder: Path) -> None:
    """A byte-level BPE vocabulary in which every word of the captions is one token.

    Pairs are merged by how many words have them, ties by the alphabet: the same every time, which the trainers
    of the tokenizer libraries do not promise.
    """
    from tokenizers import pre_tokenizers

    words = ["a", "an", "and", "on", "in", "the", "of", "with", "digit", "picture", ",", ".", "!"]
    words += [w for name in (*DIGITS, *COLOURS, *BACKGROUNDS, *EFFECTS) for w in name.split()]
    split = {w: [*w[:-1], f"{w[-1]}</w>"] for w in sorted(set(words))}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every byte must also exist as the end of a word, or an unknown word would fall back to the end token.
    tokens, merges = [*letters, *(f"{c}</w>" for c in letters)], []
    while pairs := Counter(p for parts in split.values() for p in pairwise(parts)):
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        tokens.append("".join(best))
        split = {w: _merged(parts, best) for w, parts in split.items()}
    save_vocabulary(folder, {t: i for i, t in enumerate([*tokens, START, END])}, merges)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def save_vocabulary(folder: Path, vocab: dict[str, int], merges: Iterable[Sequence[str]]) -> None:
    """The two files of a CLIP vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the captions; 24 tokens at most."""
    if not (VOCABULARY / "merges.txt").exists():
        write_vocabulary(VOCABULARY)
    vocab = json.loads((VOCABULARY / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (VOCABULARY / "merges.txt").read_text().splitlines()[1:]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP: 4 layers of width 128 on either side, pictures of 64×64 in patches of 8."""
    torch.manual_seed(0)
    shared = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 128,
    }
    vision = {"image_size": 64, "patch_size": 8, "projection_dim": 128}
    return CLIPModel(
        CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=128)
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, 24) padded ids, as the pipelines make them."""
    out = tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    )
    return out.input_ids


class Attributes(nn.Module):
    """A scene's attributes as a vector (n, 128): the stand-in for a picture while the text half learns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (11, len(COLOURS), 12, len(COLOURS) + 1, len(BACKGROUNDS), len(EFFECTS) + 1)
        self.mix = nn.Sequential(nn.Linear(sum(self.sizes), 256), nn.SiLU(), nn.Linear(256, 128))

    def forward(self, scenes: list[Scene]) -> Tensor:
        rows = []
        for s in scenes:
            digits = [d if s.named else 10 for d in s.digits] + [11]
            colours = [*s.colours, len(COLOURS)]
            rows.append([digits[0], colours[0], digits[1], colours[1], s.background, s.effect + 1])
        columns = torch.tensor(rows).T
        hot = [F.one_hot(c, n) for c, n in zip(columns, self.sizes, strict=True)]
        return self.mix(torch.cat(hot, 1).float().to(self.mix[0].weight.device))


def _scenes(rng: np.random.Generator, batch: int) -> list[Scene]:
    """Half of the batches share background and colour in groups of eight, so that digits have to be told apart."""
    if rng.random() < 0.5:
        return [random_scene(rng) for _ in range(batch)]
    groups = [random_scene(rng) for _ in range(batch // 8)]
    return [
        replace(s, digits=tuple(int(rng.integers(10)) for _ in s.digits)) for s in groups for _ in range(8)
    ]


def contrast(one: Tensor, other: Tensor, captions: list[str], scale: Tensor) -> Tensor:
    """The symmetric contrastive loss of two sets of embeddings (n, d); equal captions are the same class."""
    known = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([known[c] for c in captions], device=one.device)
    target = (same[:, None] == same[None]).float()
    target = target / target.sum(1, keepdim=True)
    logits = scale.exp() * F.normalize(one.float(), dim=1) @ F.normalize(other.float(), dim=1).T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def embed_text(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Projected text embeddings (n, 128)."""
    ids = token_ids(tokenizer, captions)
    # The end token is what is pooled and attention is causal: padding after it changes nothing.
    longest = int((ids != tokenizer.pad_token_id).sum(1).max()) + 1
    return clip.text_projection(clip.text_model(ids[:, :longest].to(device())).pooler_output)


def train_text(steps: int = 1500, batch: int = 128) -> CLIPModel:
    """First stage: the text half learns to name scenes, contrasted with their attributes.

    Pictures would do, but a vision transformer takes long to tell handwritten digits apart, and until it
    does, the loss pulls the names of the digits together.
    """
    tokenizer, where = build_tokenizer(), device()
    clip = build(tokenizer)
    both = nn.ModuleDict({"clip": clip, "attributes": Attributes()})
    clip.logit_scale.data.fill_(np.log(1 / 0.07))
    clip.vision_model.requires_grad_(False)

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        scenes = _scenes(rng, batch)
        captions = [s.caption for s in scenes]
        return contrast(
            both["attributes"](scenes),
            embed_text(clip, tokenizer, captions),
            captions,
            clip.logit_scale.clamp(max=3.5),
        )

    train("text", both.to(where), loss, steps=steps, lr=1e-3, ema=0.99, weight_decay=0.05)
    return clip


def train_vision(clip: CLIPModel, steps: int = 2200, batch: int = 64) -> CLIPModel:
    """Second stage: the vision half learns from pictures, contrasted with the text half, which stays as it is."""
    tokenizer, where = build_tokenizer(), device()
    clip.requires_grad_(False)
    clip.vision_model.requires_grad_(True)
    clip.visual_projection.requires_grad_(True)
    known: dict[str, Tensor] = {}

    def names(captions: list[str]) -> Tensor:
        new = [c for c in dict.fromkeys(captions) if c not in known]
        if new:
            with torch.no_grad():
                known.update(zip(new, embed_text(clip, tokenizer, new).float(), strict=True))
        return torch.stack([known[c] for c in captions])

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        scenes = _scenes(rng, batch)
        captions = [s.caption for s in scenes]
        pixels = render(scenes, rng).to(where) * 2 - 1
        pixels = pixels + 0.03 * torch.randn(pixels.shape, generator=generator).to(where)
        seen = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        return contrast(seen, names(captions), captions, clip.logit_scale)

    train("vision", clip, loss, steps=steps, lr=1e-3, ema=0.995, weight_decay=0.05)
    return clip


@torch.no_grad()
def retrieval(clip: CLIPModel, tokenizer: CLIPTokenizer, rounds: int = 10, among: int = 100) -> float:
    """How often the right caption is found among 100 different ones, on held-out digits and crops."""
    right = 0
    for round_ in range(rounds):
        rng = np.random.default_rng((13, round_))
        scenes: dict[str, Scene] = {}
        while len(scenes) < among:
            scene = random_scene(rng, unnamed=0)
            scenes.setdefault(scene.caption, scene)
        pixels = render(list(scenes.values()), rng, held_out=True).to(device()) * 2 - 1
        out = clip(input_ids=token_ids(tokenizer, list(scenes)).to(device()), pixel_values=pixels)
        right += int((out.logits_per_image.argmax(1).cpu() == torch.arange(among)).sum())
    return right / (rounds * among)
