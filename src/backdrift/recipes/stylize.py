"""Stylisation by fine-tuning from one picture (AdjointDPM, Pan et al. 2024, section 4.2, eq. 30, and appendix D).

    min over the weights of  w_s style + w_c content,  in the mean over prompts and noises,

where the style is that of one reference picture and the content that of the pictures which the untouched weights make
of the same prompts and noises (:mod:`.stylize_loss`). The gradient passes through the whole sampling run, so nothing is
known of the style but the one picture, and no picture of the subjects in that style is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..descent import Descent, Options, Variable
from ..descent.optimizers import OptimizerSpec, ScheduleSpec
from ..descent.subject import (
    check_prompts,
    describe_pipeline,
    describe_tensors,
    describe_value,
    make_examples,
    picture_size,
    sampler_call,
)
from ..errors import InputError
from ..run import Run
from ..through import Through
from .references import open_reference
from .stylize_loss import BUILT_IN, Features, Layers, Network, OnThemselves, StyleAndContent
from .stylize_originals import Originals
from .stylize_page import Shown, show, shown_already
from .stylize_weights import CROSS_ATTENTION, check_there, variable_for

__all__ = ["stylize"]


def stylize(
    pipe: Any,
    reference: str | Path | Tensor,
    prompts: str | Sequence[str],
    *,
    noises: int = 10,
    style_weight: float = 1.0,
    content_weight: float = 0.3,
    network: Network = BUILT_IN,
    style_layers: Layers = None,
    content_layers: Layers = None,
    over: str | Sequence[str] | Variable = CROSS_ATTENTION,
    rank: int | None = None,
    unseen_prompts: Sequence[str] = (),
    shown: int = 8,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 31,
    guidance_scale: float | None = None,
    epochs: int = 8,
    steps: int | None = None,
    minibatch: int = 10,
    seed: int = 0,
    optimizer: OptimizerSpec = "adamw",
    optimizer_kwargs: dict[str, Any] | None = None,
    lr: float | None = None,
    lr_schedule: ScheduleSpec = None,
    clip_grad: float | None = None,
    patience: int | None = None,
    chunk: int | None = None,
    memory: str | int = "auto",
    clamp: bool = False,
    through: Through | str = "all",
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_every: int = 10,
    callback: Callable[[Run, dict[str, Any]], Any] | None = None,
    progress: bool = True,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> Run:
    """Fine-tune a pipeline until what it makes is in the style of one picture and still shows what it showed.

    The paper's: cross-attention, ten prompts, ten noises, 8 epochs, AdamW at 1e-4, VGG-19 (``network="vgg19"``); w_s
    and w_c are not stated there. What is not named here is as in :func:`backdrift.optimize`.

    Args:
        pipe: any diffusers pipeline that makes pictures of prompts. It comes back as it was; the weights are files.
        reference: a picture file, a photograph's name such as ``"skimage/ihc"``, or a tensor (3, H, W) in [0, 1]. Its
            centre square is looked at.
        prompts: what is trained on, with ``noises`` pictures of each.
        style_weight, content_weight: w_s and w_c, at least 0: see :mod:`.stylize_loss` for their units.
        network: whose features tell style and content: ``"built-in:clip"`` (made for 64×64 pixels),
            ``"built-in:classifier"``, ``"vgg19"`` (the published weights) or ``"vgg19:<file>"``, a CLIP's folder or hub
            id, or a module.
        style_layers, content_layers: VGG-19's names, such as ``["relu1_1", "relu2_1"]``, else numbers of blocks.
        over: ``"cross-attention"`` (transformers without one: the joint attentions), ``"lora"`` (with ``rank``, a new
            one), a component, or patterns such as ``"unet.*attn2*"``.
        unseen_prompts: prompts to show at the end, which are not trained on.
        shown: pictures in each row of the page.
        epochs: each example is used once in each, in an order of the epoch's own that the seed gives.
        steps: updates, in place of ``epochs``; one for each ``minibatch`` examples.
        lr: default 1e-4 for weights, 1e-3 for a LoRA; the built-in pipelines want more.
        chunk: examples per call of the pipeline; default ``minibatch``.
        through: which of the sampler's steps carry the gradient; the weights work in all of them, so each choice leaves
            them one.

    Returns:
        The run. ``run.best.tensors`` are the weights at the lowest loss of an epoch, ``run.record["files"]`` their
        files and how to load them, ``run.tensors("pictures")`` what the page shows, ``<group>: before`` and ``after``.

    Raises:
        InputError: the reference, a prompt or a setting cannot be used; nothing was computed then.
        UnsupportedError: the pipeline has no denoising network to train.
    """
    every = [prompts] if isinstance(prompts, str) else list(prompts)
    unseen = list(unseen_prompts)
    _check_counts(noises=noises, epochs=epochs, shown=shown, minibatch=minibatch)
    if not every:
        raise InputError("There are no prompts; give at least one to train on.")
    variable = variable_for(over, rank)
    picture, name = open_reference(reference)
    loss = StyleAndContent(
        picture, Features(network, style_layers, content_layers), style_weight, content_weight
    )
    check_there(pipe, variable)
    height, width = picture_size(pipe, height, width)
    check_prompts(pipe, [*every, *unseen])
    trained = [prompt for prompt in every for _ in range(noises)]
    examples = make_examples(pipe, trained, height, width, seed)
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, pipeline_kwargs)
    minibatch = min(minibatch, len(examples))
    if steps is None:
        steps = epochs * -(-len(examples) // minibatch)
    chunk = minibatch if chunk is None else chunk
    options = Options.among(locals())
    options.choice.choose(num_inference_steps)  # more steps than there are: said before anything runs
    settings = options.settings(variable) | {
        "reference": name,
        "reference_picture": describe_value(picture),
        "noises": noises,
        "style_weight": style_weight,
        "content_weight": content_weight,
        "network": describe_value(network),
        "style_layers": list(loss.features.style),
        "content_layers": list(loss.features.content),
        "loss_tensors": describe_tensors(loss),
        "unseen_prompts": unseen,
        "shown": shown,
        "pipeline": describe_pipeline(pipe),
    }
    run = Run.open(
        "stylize", settings, title=f"stylize like {name}", prompt=every, seed=seed, out=out, resume=resume,
        device=getattr(pipe, "_execution_device", None),
    )  # fmt: skip
    if run.finished and shown_already(run):
        return run
    originals = Originals(run, pipe, options, loss)
    examples = originals.of(examples, progress)
    Descent(
        pipe, variable, examples, loss, options, run, callback=callback, progress=progress, scorer=OnThemselves(loss),
    ).go()  # fmt: skip
    other = replace(options, seed=options.seed + 1)  # a sampler's own noise is another, too

    def fresh(group: Sequence[str], salt: int) -> Shown:
        chosen = [group[i % len(group)] for i in range(shown)]
        return Shown(make_examples(pipe, chosen, height, width, _other_seed(seed, salt)), other)

    groups = {"unseen noises": fresh(every, 1)} | ({"unseen prompts": fresh(unseen, 2)} if unseen else {})
    show(run, pipe, variable, loss, picture, name, examples, originals.flagged, groups, shown)
    return run


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}={value!r} must be a whole number, at least 1.")


def _other_seed(seed: int, salt: int) -> int:
    """Seeds of noises that no picture of the training starts from."""
    from ..descent.randomness import seed_of

    return seed_of(seed, "unseen", salt)
