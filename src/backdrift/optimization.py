"""``optimize``: any loss on finished pictures, over the noise, the prompt's embedding or weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .descent import Descent, Options, Variable, variable_for
from .descent.code import code_settings
from .descent.optimizers import OptimizerSpec, ScheduleSpec
from .descent.subject import (
    describe_pipeline,
    describe_tensors,
    describe_value,
    make_examples,
    picture_size,
    sampler_call,
)
from .errors import InputError, MissingGradientError
from .run import Run
from .through import Through


def optimize(
    pipe: Any,
    prompt: str | Sequence[str],
    loss: Any,
    *,
    over: str | Sequence[str] | Variable = "noise",
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 31,
    guidance_scale: float | None = None,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 1,
    noise: Tensor | None = None,
    rank: int | None = None,
    optimizer: OptimizerSpec = "adamw",
    optimizer_kwargs: dict[str, Any] | None = None,
    lr: float | None = None,
    lr_schedule: ScheduleSpec = None,
    clip_grad: float | None = None,
    noise_prior: float = 0.0,
    heldout: Any = None,
    heldout_prompts: Sequence[str] | None = None,
    patience: int | None = None,
    enough: float | None = None,
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
    """Make pictures whose ``loss`` is small, by gradient descent through the whole sampling run.

    Args:
        pipe: a diffusers pipeline. It comes back as it was; what was found is in the run.
        prompt: one prompt, or several.
        loss: a loss's name, or a callable ``loss(images)`` or ``loss(images, prompts)`` -> one value per sample;
            images (N, 3, H, W) are meant for [0, 1] and not clamped.
        over: ``"noise"``, ``"prompt_embeds"``, ``"lora"`` (the active adapters, or a new one of ``rank`` beside them),
            a component (``"unet"``), patterns of weights (``"unet.*attn2*"``), or a
            :class:`~backdrift.descent.Variable`.
        height, width: the pictures' size in pixels; default the network's own.
        num_inference_steps, guidance_scale: as diffusers spells them; default guidance the pipeline's own.
        steps: updates. ``steps + 1`` sets of pictures are measured.
        seed: of the noise, of the loss's randomness and of the sampler's noise.
        batch_size: pictures per prompt.
        noise: (prompts × batch_size, …), the noise to start from instead of a seeded one, standard normal.
        optimizer, optimizer_kwargs: ``"adamw"``, ``"adam"``, ``"sgd"``, … or a callable ``(parameters, lr=…)``.
        lr: learning rate; default 0.05 (noise), 0.1 (prompt_embeds), 1e-3 (lora), 1e-4 (weights).
        lr_schedule: ``"constant"``, ``"linear"``, ``"cosine"`` (both end at 0), or a callable of the optimizer.
        clip_grad: the largest norm of an update's gradient (over the noise: of each sample's).
        noise_prior: weight of the Gaussian prior on the noise (:class:`~backdrift.descent.Noise` has its equation).
        heldout: a loss that is not optimised, lower is better; decides what is best and when to stop.
        heldout_prompts: further prompts, with noise of their own, on which ``heldout`` (default ``loss``) is measured.
        patience: stop after so many iterations without improvement.
        enough: a sample whose score is at most this is kept as it is then (pushed on, pictures please the loss and
            look worse); when all are, stop.
        minibatch: examples per iteration (not for the noise); default all.
        chunk: examples per call of the pipeline; the gradients are added up.
        memory: the plan of ``differentiable``; it does not change the result. A size leaves room for the loss.
        clamp: whether pictures are clamped to [0, 1] as diffusers does, which loses the gradient of clamped pixels.
        through: which of the sampler's steps carry the gradient: ``All()``, ``Last(K)``, ``Random(K)`` (drawn anew in
            each iteration), ``Steps([...])`` or their text, as in :func:`~backdrift.differentiable`. Norms of the
            gradient at each step are in the record's ``trace``.
        out: the run's folder; default ``runs/optimize-<digits of the settings>``. One that holds the same
            settings' unfinished run is continued, a finished one is returned as it is.
        resume: ``False`` refuses a folder that already holds a run.
        checkpoint_every: iterations between checkpoints.
        callback: called after each update as ``callback(run, entry)``.
        progress: show a bar with the loss and the time that remains.
        pipeline_kwargs: further keywords of the pipeline's call.

    Returns:
        The finished :class:`~backdrift.run.Run`.

    Raises:
        InputError: a setting cannot be used, the loss does not depend on the pictures or returns another shape,
            or the folder holds another run.
        NonFiniteError: pictures, loss or gradient became NaN or infinite; the run so far stays saved.
        MissingGradientError: the pictures do not depend on what was to be optimised, or ``through`` cuts it off.
    """
    from .losses import resolve

    if not isinstance(prompt, str | Sequence):
        raise InputError(f"prompt={prompt!r} must be a text, or a list of texts.")
    variable = variable_for(over, rank)
    objective = resolve(loss)
    judge = None if heldout is None else resolve(heldout)
    prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(batch_size)]
    height, width = picture_size(pipe, height, width)
    examples = make_examples(pipe, prompts, height, width, seed, noise)
    more = None
    if heldout_prompts is not None:
        if variable.name in ("noise", "prompt_embeds"):
            raise InputError(
                f"heldout_prompts= needs something that other prompts share; {variable.name!r} is not."
            )
        more = make_examples(pipe, list(heldout_prompts), height, width, seed + 1, None)
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, pipeline_kwargs)
    options = Options.among(locals())
    cut = options.choice.choose(num_inference_steps).cut
    if cut and variable.name == "noise":
        raise MissingGradientError(
            f"over='noise' with through={options.choice.spec!r}: the state is cut where step {cut} of "
            f"{num_inference_steps} begins, so no gradient would reach the noise: Steps(range({cut}, "
            f"{num_inference_steps})) keeps the state's path, All() everything"
        )
    settings = options.settings(variable) | {
        "loss": objective.spec,
        "loss_tensors": describe_tensors(objective),
        "heldout": None if judge is None else judge.spec,
        "heldout_prompts": None if heldout_prompts is None else list(heldout_prompts),
        "batch_size": batch_size,
        "noise": describe_value(noise),
        "pipeline": describe_pipeline(pipe),
    }
    settings |= code_settings(objective, judge)
    if judge is not None and (held := describe_tensors(judge)) is not None:
        settings["heldout_tensors"] = held
    title = f"optimize {variable.name}: {prompts[0]}" + (" …" if len(set(prompts)) > 1 else "")
    run = Run.open(
        "optimize", settings, title=title, prompt=prompts, seed=seed, out=out, resume=resume,
        device=getattr(pipe, "_execution_device", None),
    )  # fmt: skip
    return Descent(
        pipe,
        variable,
        examples,
        lambda images, chosen: objective(images, [e.prompt for e in chosen]),
        options,
        run,
        heldout=None if judge is None else lambda images, chosen: judge(images, [e.prompt for e in chosen]),
        heldout_examples=more,
        callback=callback,
        progress=progress,
        judge=_reading(objective) if hasattr(objective, "reads") else None,
        scorer=objective,
        heldout_scorer=judge,
    ).go()


def _reading(objective: Any) -> Callable[[Tensor], dict[str, Any]]:
    """For losses that can tell success from a small value (``reads(images)``: (n, k) booleans, all to be true)."""

    def said(images: Tensor) -> dict[str, Any]:
        right = objective.reads(images.float().clamp(0, 1)).all(1)
        return {"read as wanted by the loss's own network": f"{int(right.sum())} of {len(right)}"}

    return said
