"""An effect as an embedding: how it enters a prompt, and the files it is kept in.

``slots="output"`` (AdjointDPM, appendix A): n vectors in the text encoder's *output*. A prompt of k tokens
(start and end marks counted) leaves L - k positions of the encoder's L, which hold padding; the vectors take
the first n of them, and what remains keeps its padding. **A prompt that leaves m < n positions is refused
with ``strict=True``; with ``strict=False`` it gets the first m vectors and a warning.** The file is
safetensors with one tensor ``embedding`` (n, width) and the metadata ``format``, ``placeholder`` and
``tokens`` (L). The placeholder may stand in a prompt for the reader's sake and is taken out.

``slots="tokens"`` (Gal et al. 2022): n rows of the *input* embedding table, which pass through the text
encoder like words. The file is diffusers' own (one tensor under the placeholder's name), so
``pipe.load_textual_inversion(file)`` reads it. The placeholder says where the rows go in the prompt; a
prompt without it gets it at its end.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..descent.subject import encode_prompt
from ..errors import InputError, UnsupportedError
from ..files import write_atomically

FORMAT = "backdrift-embedding/1"
Slots = Literal["output", "tokens"]


@dataclass
class Embedding:
    """Vectors that stand for an effect.

    Attributes:
        vectors: (n, width) of the text encoder's output or of its input table.
        slots: ``"output"`` or ``"tokens"``.
        placeholder: what stands for the effect in a prompt.
    """

    vectors: Tensor
    slots: Slots = "output"
    placeholder: str = "#"

    def apply(self, pipe: Any, prompt: str | list[str], *, strict: bool = True) -> Tensor:
        """``prompt_embeds`` for the pipeline's call: (prompts, tokens, width), differentiable in the vectors.

        Raises:
            InputError: a prompt leaves too few free positions (``slots="output"``: see ``strict``).
            UnsupportedError: the pipeline's text encoders cannot take the embedding.
        """
        return self.call(pipe, [prompt] if isinstance(prompt, str) else list(prompt), strict=strict)[
            "prompt_embeds"
        ]

    def call(self, pipe: Any, prompts: list[str], *, strict: bool = True) -> dict[str, Tensor]:
        """The keywords of the pipeline's call that replace ``prompt``: embeddings, and pooled ones if it has any."""
        if self.slots == "tokens":
            return encode_prompt(with_rows(pipe, self), [self.written(p) for p in prompts])
        plain = [without(p, self.placeholder) for p in prompts]
        with torch.no_grad():
            found = encode_prompt(pipe, plain)
        base = found["prompt_embeds"]
        if base.shape[1] != pipe.tokenizer.model_max_length or base.shape[2] != self.vectors.shape[1]:
            raise UnsupportedError(
                f"The embedding has vectors of {self.vectors.shape[1]} numbers for an encoder whose positions are "
                f"tokens; this pipeline's output is {tuple(base.shape[1:])} for "
                f"{pipe.tokenizer.model_max_length} tokens."
            )
        vectors = self.vectors.to(base)
        rows = [
            self._place(row, k, vectors, p, strict)
            for row, k, p in zip(base, lengths(pipe, plain), plain, strict=True)
        ]
        return found | {"prompt_embeds": torch.stack(rows)}

    def _place(self, row: Tensor, start: int, vectors: Tensor, prompt: str, strict: bool) -> Tensor:
        n, free = len(vectors), len(row) - start
        if free < n:
            message = (
                f"The prompt {prompt!r} leaves {free} of {len(row)} positions, the embedding has {n} vectors"
            )
            if strict or free < 1:
                raise InputError(
                    f"{message}. Shorten the prompt, or use strict=False to take the first {free}."
                )
            warnings.warn(f"{message}; the last {n - free} are dropped.", stacklevel=4)
            n = free
        return torch.cat([row[:start], vectors[:n], row[start + n :]])

    def written(self, prompt: str) -> str:
        """The prompt with the placeholder in it (at the end if it has none)."""
        return prompt if self.placeholder in prompt else f"{prompt} {self.placeholder}"

    def save(self, path: str | Path) -> Path:
        """Write the file described above."""
        from safetensors.torch import save

        vectors = self.vectors.detach().cpu().contiguous()
        if self.slots == "tokens":
            data = save({self.placeholder: vectors})
        else:
            meta = {"format": FORMAT, "placeholder": self.placeholder, "slots": self.slots}
            data = save({"embedding": vectors}, metadata=meta)
        write_atomically(Path(path), lambda file: file.write(data))
        return Path(path)


def load_embedding(path: str | Path) -> Embedding:
    """Read either kind of file.

    Raises:
        InputError: it is missing, or is neither.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta, names = file.metadata() or {}, list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{str(path)!r} is not a readable safetensors file: {error}.") from error
    if meta.get("format") == FORMAT and names == ["embedding"]:
        return Embedding(tensors["embedding"], "output", meta["placeholder"])
    if meta.get("format", "pt") == "pt" and len(names) == 1 and tensors[names[0]].ndim in (1, 2):
        value = tensors[names[0]]
        return Embedding(value if value.ndim == 2 else value[None], "tokens", names[0])
    raise InputError(
        f"{str(path)!r} holds {names} in the format {meta.get('format')!r}, which is no embedding."
    )


def lengths(pipe: Any, prompts: list[str]) -> list[int]:
    """Tokens of each prompt, start and end marks counted, at most what the encoder reads."""
    limit = pipe.tokenizer.model_max_length
    return [min(len(pipe.tokenizer(p, verbose=False).input_ids), limit) for p in prompts]


def without(prompt: str, placeholder: str) -> str:
    """The prompt without the placeholder and the blanks and comma it leaves behind."""
    return (
        " ".join(prompt.replace(placeholder, " ").split()).rstrip(" ,") if placeholder in prompt else prompt
    )


def with_rows(pipe: Any, embedding: Embedding) -> Any:
    """A stand-in for ``pipe`` that only encodes prompts: its tokenizer and table know the embedding's rows.

    The pipeline itself is not touched. The rows get the ids that ``load_textual_inversion`` would give them.

    Raises:
        InputError: the placeholder is a word the tokenizer knows already, or the width is not the table's.
        UnsupportedError: the pipeline has not exactly one text encoder.
    """
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "text_encoder_2", None) is not None:
        raise UnsupportedError(
            f"slots='tokens' needs a pipeline with one text encoder, not {type(pipe).__name__}."
        )
    names = [embedding.placeholder] + [
        f"{embedding.placeholder}_{i}" for i in range(1, len(embedding.vectors))
    ]
    known = [name for name in names if name in pipe.tokenizer.get_vocab()]
    if known:
        raise InputError(
            f"The tokenizer already knows {known[0]!r}; choose another placeholder, such as '<effect>'."
        )
    tokenizer = copy.deepcopy(pipe.tokenizer)
    count = len(tokenizer)
    for name in names:
        tokenizer.add_tokens(name)
    table = pipe.text_encoder.get_input_embeddings().weight
    if table.shape[1] != embedding.vectors.shape[1]:
        raise InputError(
            f"The rows have {embedding.vectors.shape[1]} numbers, the encoder's table {table.shape[1]}."
        )
    clone = copy.copy(pipe)
    # Not by assignment: a pipeline's __setattr__ would write the stand-ins into the shared configuration.
    clone.__dict__["tokenizer"] = tokenizer
    rows = torch.cat([table.detach()[:count], embedding.vectors.to(table)])
    clone.__dict__["text_encoder"] = EncoderWithTable(pipe.text_encoder, rows)
    return clone


class EncoderWithTable:
    """A text encoder called with another input table; its weights get no gradient, the table does."""

    def __init__(self, encoder: torch.nn.Module, table: Tensor) -> None:
        self._encoder = encoder
        weight = encoder.get_input_embeddings().weight  # type: ignore[operator]
        names = [name for name, p in encoder.named_parameters(remove_duplicate=False) if p is weight]
        self._values = {name: p.detach() for name, p in encoder.named_parameters()} | dict.fromkeys(
            names, table
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._encoder, self._values, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)
