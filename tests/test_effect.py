"""The measure of an effect, on embeddings whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backdrift.descent.subject import encode_prompt
from backdrift.errors import InputError
from backdrift.losses import Classifier
from backdrift.losses.measurements import mean_saturation
from backdrift.recipes import Embedding, measure_effect
from tiny_pipelines import tiny_sd

CALL = {"num_inference_steps": 2, "seeds": [3, 4]}


class Always(nn.Module):
    """Reads class 1 in whatever it sees."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"digit": torch.tensor([[0.0, 1.0]]).expand(len(images), 2)}


def test_the_padding_itself_is_no_effect_and_the_words_own_output_is_the_effect() -> None:
    pipe = tiny_sd()
    prompts = ["a 2", "a 2"]
    plain = encode_prompt(pipe, ["a 2"])["prompt_embeds"][0, 4:].detach()
    reader = Classifier(Always(), {"digit": ["1", "2"]})
    figures, pictures = measure_effect(pipe, Embedding(plain), "b", prompts, classifier=reader, **CALL)
    assert torch.allclose(pictures["embedding"], pictures["plain"], rtol=0, atol=1e-6)
    assert figures["saturation: embedding"] == pytest.approx(
        mean_saturation(pictures["plain"]).mean().item(), rel=1e-4
    )
    assert figures["right: plain"] == figures["right: embedding"] == 1.0
    # A causal encoder: "a 2" has the same first positions in "a 2, b", all that follows is taken from the words.
    words = encode_prompt(pipe, ["a 2, b"])["prompt_embeds"][0]
    assert torch.allclose(words[:3], encode_prompt(pipe, ["a 2"])["prompt_embeds"][0, :3], atol=1e-5)
    assert not torch.allclose(pictures["words"], pictures["plain"], rtol=0, atol=1e-4)


def test_a_reader_that_sees_another_class_is_counted_as_wrong() -> None:
    pipe, reader = tiny_sd(), Classifier(Always(), {"digit": ["2", "7"]})
    plain = encode_prompt(pipe, ["a 2"])["prompt_embeds"][0, 4:].detach()
    figures, _ = measure_effect(pipe, Embedding(plain), "b", ["a 2", "a 7"], classifier=reader, **CALL)
    assert figures["right: plain"] == 0.5
    with pytest.raises(InputError, match=r"names no digit|knows no class"):
        measure_effect(pipe, Embedding(plain), "b", ["a q", "a 7"], classifier=reader, **CALL)
    with pytest.raises(InputError, match="one seed for each"):
        measure_effect(pipe, Embedding(plain), "b", ["a 2"], **CALL)
