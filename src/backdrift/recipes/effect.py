"""Does an embedding do what the effect's own words do, on noise and prompts it has not seen?

For every (prompt, seed) three pictures are made from the same noise: of the prompt, of "prompt, effect" and of
the prompt with the embedding. Mean saturation and high-frequency energy (of the clamped pictures) say how
strong the effect is, and a classifier whether the picture still shows what the prompt names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..descent.subject import check_prompts, make_examples, picture_size, sampler_call
from ..errors import InputError
from ..losses import Classifier
from ..losses.measurements import high_frequency_energy, mean_saturation
from .embedding import Embedding

MEASURES = {"saturation": mean_saturation, "high-frequency energy": high_frequency_energy}


@torch.no_grad()
def measure_effect(
    pipe: Any,
    embedding: Embedding,
    effect: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    classifier: Classifier | None = None,
    head: str = "digit",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 31,
    guidance_scale: float = 7.5,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Compare the embedding with the words ``effect``.

    Args:
        prompts, seeds: one picture for each pair of them (same length).
        classifier: judges whether the class that the prompt names under ``head`` is still what is read.

    Returns:
        Figures, ``{measure}: plain | words | embedding`` (means over the pictures) and
        ``{measure}: embedding / words``, and with a classifier ``right: plain | words | embedding`` (parts of 1);
        and the pictures ``plain``, ``words`` and ``embedding``, each (n, 3, H, W) in [0, 1].

    Raises:
        InputError: prompts and seeds are not pairs, or the classifier knows no class that a prompt names.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise InputError(
            f"Needs one seed for each prompt, got {len(prompts)} prompts and {len(seeds)} seeds."
        )
    height, width = picture_size(pipe, height, width)
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, None)
    check_prompts(pipe, [f"{p}, {effect}" for p in prompts])
    noise = torch.cat(
        [make_examples(pipe, [p], height, width, s)[0].noise for p, s in zip(prompts, seeds, strict=True)]
    )
    texts: dict[str, dict[str, Any]] = {
        "plain": {"prompt": list(prompts)},
        "words": {"prompt": [f"{p}, {effect}" for p in prompts]},
        "embedding": embedding.call(pipe, list(prompts)),
    }
    pictures: dict[str, Tensor] = {}
    for name, text in texts.items():
        again = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(**text, latents=noise, generator=again, output_type="pt", **call).images
        pictures[name] = images.float()
    figures: dict[str, float] = {}
    for measure, function in MEASURES.items():
        means = {name: function(images).mean().item() for name, images in pictures.items()}
        figures |= {f"{measure}: {name}": value for name, value in means.items()}
        figures[f"{measure}: embedding / words"] = means["embedding"] / max(means["words"], 1e-12)
    if classifier is not None:
        for name, images in pictures.items():
            read = classifier(images)[head].argmax(1).tolist()
            wanted = [_named(classifier, prompt, head) for prompt in prompts]
            figures[f"right: {name}"] = sum(a == b for a, b in zip(read, wanted, strict=True)) / len(wanted)
    return figures, pictures


def _named(classifier: Classifier, prompt: str, head: str) -> int:
    found = classifier.find(prompt)
    if head not in found:
        raise InputError(f"The prompt {prompt!r} names no {head} that the classifier knows.")
    return found[head]
