"""Text-embedding inversion (AdjointDPM, Pan et al. 2024, appendix A).

From pairs (picture, the same picture with an effect, prompt), find the embedding that produces the effect:
minimise over the embedding # the mean squared error between the pictures that the prompt *with* # makes of
the first pictures' noise and the second pictures. The gradient passes through the whole sampling run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..descent import Descent, Example, Options, Variable
from ..descent.code import describe_function
from ..descent.measure import Objective
from ..descent.optimizers import OptimizerSpec, ScheduleSpec
from ..descent.subject import (
    check_prompts,
    describe_pipeline,
    describe_value,
    encode_prompt,
    picture_size,
    sampler_call,
)
from ..descent.variables import master
from ..errors import InputError
from ..run import Run
from ..through import Through
from .embedding import Embedding, Slots, lengths, load_embedding, with_rows, without
from .pairs import Pair, PairEncoder, Picture, as_pair, effect_pairs

__all__ = ["Embedding", "Pair", "effect_pairs", "invert", "load_embedding"]


class EmbeddingVariable(Variable):
    """The vectors of an :class:`Embedding`.

    At the start they are what the pipeline has in their place: the padding's own output, averaged over the
    prompts (``"output"``), or the rows of ``init``'s tokens, or the mean of the table (``"tokens"``).
    """

    name = "embedding"

    def __init__(
        self, slots: Slots, n_slots: int | None, placeholder: str, init: str | Tensor | None
    ) -> None:
        super().__init__()
        self.slots, self.n_slots, self.placeholder, self.init = slots, n_slots, placeholder, init
        self.lr = 0.1

    @property
    def embedding(self) -> Embedding:
        return Embedding(self.parameters["embedding"], self.slots, self.placeholder)

    def prepare(self, pipe: Any, prompts: list[str]) -> None:
        """Check that it can be done, and set the number of vectors and the learning rate.

        Raises:
            InputError: the prompts do not leave enough free positions, or the settings do not fit.
            UnsupportedError: the pipeline's text encoders cannot take such an embedding.
        """
        with torch.no_grad():
            self.start = self._start(pipe, prompts)
            self.n_slots = len(self.start)
            call = Embedding(self.start, self.slots, self.placeholder)
            if self.slots == "tokens":
                encoder = with_rows(pipe, call)
                written = [call.written(p) for p in prompts]
                check_prompts(encoder, encoder.maybe_convert_prompt(written, encoder.tokenizer))
                # The paper's rate is for outputs of unit size; a table's entries are far smaller.
                self.lr = (
                    0.1
                    * pipe.text_encoder.get_input_embeddings().weight.float().square().mean().sqrt().item()
                )
            call.call(pipe, prompts)

    def _start(self, pipe: Any, prompts: list[str]) -> Tensor:
        if isinstance(self.init, Tensor):
            return self.init if self.init.ndim == 2 else self.init[None]
        if self.slots == "tokens":
            table = pipe.text_encoder.get_input_embeddings().weight
            rows = table.float().mean(0, keepdim=True)
            if self.init is not None:
                ids = pipe.tokenizer(self.init, add_special_tokens=False).input_ids
                rows = table[ids].float()
            n = self.n_slots or len(rows)
            return rows[torch.arange(n) % len(rows)]
        if self.init is not None:
            raise InputError("init= is a tensor for slots='output'; words are for slots='tokens'.")
        plain = [without(p, self.placeholder) for p in prompts]
        base, used = encode_prompt(pipe, plain)["prompt_embeds"], lengths(pipe, plain)
        free = base.shape[1] - max(used)
        n = free if self.n_slots is None else self.n_slots
        if not 1 <= n <= free:
            longest = plain[used.index(max(used))]
            raise InputError(
                f"n_slots={n}: the prompt {longest!r} leaves {free} of {base.shape[1]} positions free. Use between 1 "
                "and that, a shorter prompt, or slots='tokens'."
            )
        return torch.stack([row[k : k + n] for row, k in zip(base, used, strict=True)]).float().mean(0)

    @contextmanager
    def on(self, pipe: Any, examples: Sequence[Example]) -> Iterator[None]:
        self.parameters = {"embedding": master(self.start)}
        yield

    def call(self, pipe: Any, examples: Sequence[Example], batch: Sequence[int]) -> dict[str, Any]:
        call = super().call(pipe, examples, batch)
        return call | self.embedding.call(pipe, call.pop("prompt"))

    def export(self, pipe: Any, run: Run) -> None:
        name = "learned_embeds.safetensors" if self.slots == "tokens" else "embedding.safetensors"
        self.embedding.save(run.folder / name)
        how = (
            "pipe.load_textual_inversion(folder)"
            if self.slots == "tokens"
            else "backdrift.recipes.load_embedding(file)"
        )
        caption = f"{self.n_slots} vectors for {self.placeholder!r}; read it with {how}"
        run.record["files"]["embedding"] = {"path": name, "caption": caption}

    def settings(self) -> dict[str, Any]:
        names = ("slots", "n_slots", "placeholder")
        return {
            "over": "embedding",
            "init": describe_value(self.init),
            **{k: getattr(self, k) for k in names},
        }


def invert(
    pipe: Any,
    pairs: Sequence[Pair | tuple[Picture, Picture, str]],
    *,
    slots: Slots = "output",
    n_slots: int | None = None,
    placeholder: str | None = None,
    init: str | Tensor | None = None,
    loss: Objective | None = None,
    heldout_pairs: Sequence[Pair | tuple[Picture, Picture, str]] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 31,
    guidance_scale: float = 7.5,
    encode_iterations: int = 5,
    steps: int = 50,
    seed: int = 0,
    optimizer: OptimizerSpec = "adamw",
    optimizer_kwargs: dict[str, Any] | None = None,
    lr: float | None = None,
    lr_schedule: ScheduleSpec = None,
    clip_grad: float | None = None,
    patience: int | None = None,
    minibatch: int | None = None,
    chunk: int | None = None,
    memory: str | int = "auto",
    clamp: bool = False,
    through: Through | str = "all",
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_every: int = 1,
    callback: Callable[[Run, dict[str, Any]], Any] | None = None,
    progress: bool = True,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> Run:
    """Find the embedding that turns the first picture of every pair into the second.

    Defaults are the paper's: AdamW at 0.1 for 50 iterations, mean squared error, guidance 7.5. What is not named
    here is as in :func:`backdrift.optimize`.

    Args:
        pairs: :class:`Pair`, or (picture, picture with the effect, prompt). A pair without its noise is encoded to
            noise first (:func:`~backdrift.recipes.ddim.encode_to_noise`); the error of that is measured by making
            the first picture again and written into the record's figures.
        slots: ``"output"`` (the paper's: free positions of the text encoder's output) or ``"tokens"`` (rows of the
            input table, a file that diffusers' ``load_textual_inversion`` reads); see
            :mod:`~backdrift.recipes.embedding`.
        n_slots: how many vectors; default as many as the longest prompt leaves free, or the tokens of ``init``, or 1.
        placeholder: what stands for the effect in a prompt; default ``"#"`` (output) or ``"<effect>"`` (tokens).
        init: words to start from (``"tokens"``), or a tensor (n, width).
        loss: ``loss(images, examples)`` -> (n,), where ``examples[i].target`` is the picture with the effect;
            default the mean squared error.
        heldout_pairs: pairs that decide which embedding is best and when to stop, and are not trained on.
        encode_iterations: fixed-point iterations per step of the encoding.
        through: which of the sampler's steps carry the gradient; the embedding enters all of them, so each choice
            leaves it one.
        lr: default 0.1 (``"output"``), 0.1 × the root mean square of the input table (``"tokens"``).

    Returns:
        The run. ``run.best.tensors["embedding"]`` holds the vectors, ``run.record["files"]["embedding"]`` their file.

    Raises:
        InputError: pictures, prompts or settings do not fit.
        UnsupportedError: the pipeline cannot take the embedding, or cannot be encoded to noise.
    """
    if slots not in ("output", "tokens"):
        raise InputError(f"slots={slots!r} must be 'output' or 'tokens'.")
    if not pairs:
        raise InputError("There are no pairs; give at least one (picture, picture with the effect, prompt).")
    height, width = picture_size(pipe, height, width)
    variable = EmbeddingVariable(
        slots, n_slots, placeholder or ("#" if slots == "output" else "<effect>"), init
    )
    every = [[as_pair(p) for p in pairs], [as_pair(p) for p in heldout_pairs or ()]]
    prompts = [p.prompt for group in every for p in group]
    check_prompts(pipe, prompts)
    variable.prepare(pipe, prompts)
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, pipeline_kwargs)
    options = Options.among(locals())
    options.choice.choose(num_inference_steps)  # more steps than there are: said before anything runs
    encoder = PairEncoder(
        pipe, height, width, call, iterations=encode_iterations,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    groups = [[encoder.example(p) for p in group] for group in every]
    settings = options.settings(variable) | {
        "loss": "mean squared error" if loss is None else describe_value(loss),
        "encode_iterations": encode_iterations,
        "pairs": [describe_value([e.noise, e.target]) for e in groups[0]],
        "heldout": [describe_value([e.prompt, e.noise, e.target]) for e in groups[1]] or None,
        "pipeline": describe_pipeline(pipe),
    }
    if loss is not None:
        settings["loss_code"] = describe_function(loss)
    many = f"{len(groups[0])} pairs" if len(groups[0]) > 1 else "a pair"
    title = f"invert {many} into {variable.placeholder!r}: {prompts[0]}"
    run = Run.open(
        "invert", settings, title=title, seed=seed, out=out, resume=resume,
        prompt=[e.prompt for e in groups[0]], device=getattr(pipe, "_execution_device", None),
    )  # fmt: skip
    figures = {"vectors": len(variable.start), **encoder.figures()}
    return Descent(
        pipe, variable, groups[0], loss or squared_error, options, run, heldout_examples=groups[1] or None,
        callback=callback, progress=progress, figures=figures, scorer=OnTargets(loss or squared_error, groups[0]),
    ).go()  # fmt: skip


class OnTargets(torch.nn.Module):
    """The loss as one of the pictures alone, for a memory budget that leaves room for it.

    Args:
        loss: ``loss(images, examples)``; its weights are found if it is a module.
        examples: with targets.
    """

    targets: Tensor

    def __init__(self, loss: Objective, examples: Sequence[Example]) -> None:
        super().__init__()
        self.loss, self.prompts = loss, [e.prompt for e in examples]
        targets = [e.target for e in examples if e.target is not None]
        self.register_buffer("targets", torch.stack(targets))

    def forward(self, images: Tensor) -> Tensor:
        rows = zip(self.prompts, self.targets, images, strict=False)
        return self.loss(images, [Example(prompt, image, target) for prompt, target, image in rows])


def squared_error(images: Tensor, examples: Sequence[Example]) -> Tensor:
    """Mean over pixels and channels of the squared difference to each example's target: (n,)."""
    targets = torch.stack([e.target for e in examples if e.target is not None]).to(images)
    return (images - targets).square().flatten(1).mean(1)
