"""``plan``: what a job with gradients needs, before it runs."""

from __future__ import annotations

import dataclasses
import inspect
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..budget import parse_size
from ..errors import InputError, MissingGradientError
from ..losses import InParts
from ..planning.choices import Choices
from ..planning.job import Job, Loss
from ..planning.plan import Plan, make_plan
from ..through import All, Through
from .configured import configured
from .homes import way_of
from .load import noise
from .modular import is_modular
from .offloaded import execution_device
from .refusals import plain_class
from .rehearsal import rehearse
from .scored import count_loss
from .shadow import Train, networks
from .twins import twin

__all__ = ["plan"]

#: How many tensors of a weight's size an optimizer keeps beside it.
OPTIMIZERS = dict.fromkeys(("adamw", "adam", "nadam", "radam", "adamax", "adadelta"), 2)
OPTIMIZERS |= {"rmsprop": 1, "adagrad": 1, "sgd": 0}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def plan(
    pipe: Any,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    *,
    loss: Any = None,
    heldout: Any = None,
    memory: str | int | None = None,
    train: Train = None,
    through: Through | str = "all",
    dtype: torch.dtype | str | None = None,
    batch: int = 1,
    guidance: bool = True,
    optimizer: str = "adamw",
    rank: int = 16,
    tiles: bool = False,
    offload: bool | None = None,
    choices: Choices | None = None,
    **call: Any,
) -> Plan:
    """What one sampling run with its loss and its backward pass needs, and the fastest way to run it in a budget.

    Nothing is computed: the pipeline's own loop runs once on zeros the size of latents, its networks stand on the meta
    device. No GPU and no weights are needed. Counted is every byte on the device: weights, latents and arguments, what
    autograd saves (each storage once), gradients in flight, the loss, gradients of weights and the optimizer's state.
    Not counted: scratch memory inside kernels (on a CPU up to some MiB for each thread, on CUDA the libraries'
    workspaces) and what the allocator cannot use.

    Args:
        pipe: a pipeline; the name of a model whose configuration ships with the package (``"sd15"``, ``"sdxl"``,
            ``"sd3-medium"``, ``"flux-dev"``, or their hub ids); or a folder with a saved pipeline, whose weights are
            not read.
        height, width: of the pictures in pixels; by default the model's.
        num_inference_steps: of the sampler.
        loss: None, for one that holds a few pictures at most; ``"clip-vit-base-patch32"`` or
            ``"clip-vit-large-patch14"`` for a loss on such a network; or anything that
            :func:`backdrift.losses.resolve` takes. Where the plan scores one picture at a time,
            :func:`~backdrift.optimize` does so by itself, and :class:`backdrift.losses.InParts` elsewhere.
        heldout: what else scores the pictures, without a gradient (of :func:`~backdrift.optimize`); like ``loss``.
        memory: bytes of everything on the device, or a size such as ``"16GiB"``; None for no limit.
        train: which weights get gradients, as in :func:`~backdrift.differentiable`. ``"lora"`` on a model without
            adapters: of rank ``rank``, on the attentions' projections.
        through: which steps carry the gradient, as in :func:`~backdrift.differentiable`; the others' calls keep nothing
            and are not redone. Of ``Random(K)`` the first draw is counted; others differ little.
        dtype: of a model that is given by name or folder (default bfloat16); a pipeline has its own.
        batch: pictures per call.
        guidance: whether a guidance scale above 1 doubles the batch, where the pipeline does that.
        optimizer: by which trained weights are updated; its state is counted.
        tiles: also consider decoding in tiles, which gives slightly different pictures.
        offload: also consider keeping latents and weights on the CPU while they are not needed; by default unless the
            pipeline is on the CPU. The weights of an offloaded pipeline always wait there.
        choices: count these choices instead of searching.
        call: more arguments of the pipeline's call (``prompt_embeds=``, ``image=`` …).

    Raises:
        BudgetError: ``memory`` is malformed or too small; names the smallest that works.
        InputError: an unknown model, loss or optimizer, or a size that does not fit.
        MissingGradientError: ``through`` cuts the noise off, and nothing else asks for a gradient.
        UnsupportedError: the pipeline's loop cannot be run on zeros.

    Example:
        >>> print(bd.plan("sdxl", 1024, 1024, 30, loss="clip-vit-large-patch14", memory="16GiB"))
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer={optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
    if batch < 1 or num_inference_steps < 1:
        raise InputError(f"batch={batch} and num_inference_steps={num_inference_steps} must be at least 1")
    budget = None if memory is None else parse_size(memory)
    through = Through.parse(through)
    if isinstance(pipe, str | PathLike):
        pipe, size = configured(Path(pipe) if isinstance(pipe, PathLike) else pipe, _dtype(dtype))
        height, width = size if height is None else height, size if width is None else width
        if train == "lora":
            _add_lora(pipe, rank)
    elif dtype is not None:
        raise InputError("dtype= is for models given by name or folder; a loaded pipeline has its own")
    arguments = _arguments(pipe, height, width, num_inference_steps, batch, guidance, call)
    states = OPTIMIZERS[optimizer]
    job = count_job(pipe, arguments, train, loss, states, through=through, heldout=heldout)
    if not job.backward and not through.exact:
        raise MissingGradientError(
            f"through={through.spec!r} cuts the noise off, and no weights are trained, so there is no gradient to plan "
            "for: name weights with train= (--train), or keep the state's path with Steps([...])"
        )
    device = execution_device(pipe)
    if choices is not None and choices.weights == "device" and device is not None:
        # They come as they are set up.
        ways = {way_of(module) for module in networks(pipe).values()}
        choices = dataclasses.replace(choices, weights="stream" if ways - {"model", None} else "offload")
    if offload is None:
        offload = (device or pipe.device).type != "cpu"
    return make_plan(job, budget, tiles=tiles, offload=offload, offloaded=device is not None, fixed=choices)


def count_job(
    pipe: Any,
    kwargs: dict[str, Any],
    train: Train,
    loss: Any,
    states: int,
    *,
    args: tuple[Any, ...] = (),
    clamp: bool = False,
    noise: torch.Tensor | None = None,
    through: Through = All(),  # noqa: B008
    heldout: Any = None,
) -> Job:
    """The job of one call with its losses and, per trained weight, ``states`` tensors of optimizer state."""
    job, pictures = rehearse(pipe, args, kwargs, train, clamp=clamp, noise=noise, through=through)
    heldout = loss.heldout if heldout is None and isinstance(loss, InParts) else heldout
    scored, notes = count_loss(loss, pictures) if loss is not None and pictures is not None else (None, ())
    judged: Loss | None = None
    if heldout is not None and pictures is not None:
        judged, more = count_loss(heldout, pictures, graded=False)
        notes = (*notes, *more)
    if not through.exact:
        some = f"{job.graded_calls} of {job.network_calls} network calls carry the gradient (through={through.spec!r})"
        notes = (f"{some}; the others are made once and keep nothing.", *notes)
    return dataclasses.replace(job, loss=scored, heldout=judged, state=states * job.gradients, notes=notes)


def _arguments(
    pipe: Any,
    height: int | None,
    width: int | None,
    steps: int,
    batch: int,
    guidance: bool,
    call: dict[str, Any],
) -> dict[str, Any]:
    """The keywords of a typical call."""
    accepted = inspect.signature(getattr(twin(plain_class(type(pipe))), "__call__")).parameters  # noqa: B004, B009
    anything = is_modular(plain_class(type(pipe)))  # its blocks say what they take
    unknown = set(call) - set(accepted)
    if unknown and not anything:
        raise InputError(f"{plain_class(type(pipe)).__name__} takes no argument {min(unknown)!r}")
    given: dict[str, Any] = {"num_inference_steps": steps}
    if height is not None:
        given["height"] = height
    if width is not None:
        given["width"] = width
    if "prompt_embeds" not in call and "prompt" in accepted:
        given["prompt"] = ["one"] * batch
        if getattr(pipe, "tokenizer", None) is None and getattr(pipe, "text_encoder", None) is None:
            raise InputError(
                "this pipeline has no text encoder: give prompt_embeds= and what belongs to them"
            )
    if not guidance:
        given["guidance_scale"] = 1.0
    if "latents" in accepted and "latents" not in call:
        start = noise(pipe, height=height, width=width, batch_size=batch, device="cpu")
        given["latents"] = start.requires_grad_()
    return {k: v for k, v in {**given, **call}.items() if anything or k in accepted}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype or "bfloat16"]


def _add_lora(pipe: Any, rank: int) -> None:
    """The usual adapter on the attentions of the denoising network."""
    from peft import LoraConfig

    network = getattr(pipe, "unet", None) or pipe.transformer
    with torch.device("meta"):
        network.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
