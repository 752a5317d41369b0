"""What a certificate is about: a model, where its run starts, and a loss on where it ends."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import nests
from ..accelerators import has_float64
from ..conditioning import PerStep, moves
from ..denoiser import Denoiser
from ..errors import InputError, MissingGradientError, UnsupportedError
from ..losses import Loss
from ..pipelines.load import noise
from ..pipelines.offloaded import execution_device
from ..pipelines.shadow import shadow, trained_parameters
from ..pipelines.view import View, as_denoiser
from ..pipelines.views.of_text import family_of
from .moved import MovedNetwork

Over = str | Sequence[str]
Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A run's start and a loss on its end.

    Attributes:
        model: the denoiser.
        x_T: where the run starts, (B, …), float32 or float64.
        cond: the conditioning, a nest of tensors, or a function of time.
        objective: the sample x0 (B, …) -> values (B,), or one number.
        over: by what is differentiated: ``"noise"`` (x_T), ``"cond"`` (all floating tensors of it) or ``"weights"``.
        weights: names of the network's parameters that are meant by the last.
    """

    model: Denoiser
    x_T: Tensor
    cond: Any
    objective: Objective
    over: str = "noise"
    weights: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """The run's."""
        return self.x_T.device

    @property
    def dtype(self) -> torch.dtype:
        """The least precise of the state's and the network's: it decides what counts as rounding."""
        network = self.model._network_dtype(self.x_T)
        return min((network, self.x_T.dtype), key=lambda dtype: -torch.finfo(dtype).eps)

    def leaves(self) -> tuple[Tensor, Any, list[Tensor]]:
        """Fresh copies of ``x_T`` and ``cond``, and the tensors to differentiate by: those of them that require grad,
        or the network's own parameters.

        Raises:
            InputError: the conditioning has no tensors to differentiate by.
        """

        def leaf(c: Tensor) -> Tensor:
            return c.detach().clone().requires_grad_(self.over == "cond" and c.is_floating_point())

        x = self.x_T.detach().clone().requires_grad_(self.over == "noise")
        cond = nests.transform(leaf, self.cond)
        if self.over == "weights":
            return x, cond, self._parameters()
        asked = [x] if self.over == "noise" else [c for c in nests.tensors(cond) if c.requires_grad]
        if not asked:
            raise InputError("over='cond' needs floating tensors in cond; there are none: use over='noise'")
        return x, cond, asked

    def _parameters(self) -> list[Tensor]:
        return [self._module.get_parameter(name) for name in self.weights]

    @property
    def _module(self) -> nn.Module:
        network = self.model.network
        assert isinstance(network, nn.Module)  # what has named weights is one
        return network

    def moved(self, by: list[Tensor], amount: float) -> Problem:
        """The same problem with the tensors asked for moved: ``+ amount * by``."""
        steps = iter(by)
        if self.over == "noise":
            return replace(self, x_T=self.x_T + amount * next(steps))
        if self.over == "weights":
            parameters = zip(self.weights, self._parameters(), steps, strict=True)
            model = copy.copy(self.model)
            moved = {name: p.detach() + amount * step for name, p, step in parameters}
            model.network = MovedNetwork(self._module, moved)
            return replace(self, model=model)
        cond = nests.transform(lambda c: c + amount * next(steps) if c.is_floating_point() else c, self.cond)
        return replace(self, cond=cond)

    def pull(self, x0: Tensor) -> tuple[float, Tensor]:
        """The loss of a sample, summed over the batch, and its gradient by the sample.

        Raises:
            MissingGradientError: it does not depend on the sample.
        """
        leaf = x0.detach().requires_grad_()
        with torch.enable_grad():
            total = self.value(leaf)
        if not total.requires_grad:
            raise MissingGradientError(
                "the loss does not depend on the sample in a way that autograd sees: it detaches, or it ignores it"
            )
        (gradient,) = torch.autograd.grad(total, leaf)
        return float(total.detach()), gradient

    def value(self, x0: Tensor) -> Tensor:
        """The loss of a sample, summed over the batch: ().

        Raises:
            InputError: the loss returns neither one value per sample nor one number.
        """
        found = self.objective(x0)
        if not isinstance(found, Tensor) or found.shape not in ((len(x0),), ()):
            shown = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"the loss must return a tensor of {len(x0)} values, one per sample, or one number; got {shown}"
            )
        return found.sum()

    def double(self) -> Problem:
        """The same problem in float64, on copies of its networks; itself if it is in float64 already.

        Raises:
            UnsupportedError: the device has no float64.
        """
        if self.dtype == torch.float64:
            return self
        if not has_float64(self.device):
            raise UnsupportedError(f"{self.device.type} has no float64")
        model = copy.copy(self.model)
        if isinstance(model.network, nn.Module):
            model.network = copy.deepcopy(model.network).double()
        model.dtype, model.uncond = None, _widened(model.uncond)
        objective = self.objective
        if isinstance(objective, nn.Module):
            objective = copy.deepcopy(objective).double()
        return replace(
            self, model=model, x_T=self.x_T.double(), cond=_widened(self.cond), objective=objective
        )


class PictureLoss(nn.Module):
    """A loss on the pictures that a pipeline's decoder makes of a sample.

    Args:
        vae: the decoder, an AutoencoderKL; it is not changed.
        loss: on pictures (B, 3, H, W), meant for [0, 1] and not clamped, and prompts.
        prompts: one for each sample, or one.
    """

    def __init__(self, vae: nn.Module, loss: Loss, prompts: list[str]) -> None:
        super().__init__()
        self.vae, self.loss, self.prompts = shadow(vae, set()), loss, prompts

    def pictures(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], not clamped."""
        vae: Any = self.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = (x0 / vae.config.scaling_factor + shift).to(vae.dtype)
        return vae.decode(latents, return_dict=False)[0] / 2 + 0.5

    def forward(self, x0: Tensor) -> Tensor:
        return self.loss(self.pictures(x0), self.prompts)


class DecodedLoss(nn.Module):
    """A loss on what a view decodes of a sample.

    Args:
        view: of a pipeline.
        x_T: a state of it.
        loss: on pictures (B, 3, H, W), or videos, meant for [0, 1] and not clamped, and prompts.
        prompts: one for each sample, or one.

    Raises:
        UnsupportedError: how the pipeline decodes is not known.
    """

    def __init__(self, view: View, x_T: Tensor, loss: Loss, prompts: list[str]) -> None:
        super().__init__()
        self.vae, self.loss, self.prompts = view.autoencoder(x_T), loss, prompts
        # A function of its own: copies of this module copy the autoencoder, and not the pipeline.
        self._pictures = lambda vae, x0: view.decoding(vae)(x0)

    def forward(self, x0: Tensor) -> Tensor:
        return self.loss(self._pictures(self.vae, x0), self.prompts)


def of_pipeline(
    pipe: Any,
    prompt: str,
    loss: Loss,
    *,
    over: Over = "noise",
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> Problem:
    """The problem of a pipeline, through its ``Denoiser`` view.

    Args:
        pipe: a pipeline that :func:`~backdrift.as_denoiser` takes.
        prompt: one text.
        loss: on its pictures.
        guidance_scale: the pipeline's own default if None.
        height, width: of the picture in pixels; the pipeline's own if None.
        seed: of the noise.

    Raises:
        InputError: a size does not fit.
        UnsupportedError: another family of pipeline, or an offloaded one.
    """
    if execution_device(pipe) is not None:
        raise UnsupportedError(
            f"{type(pipe).__name__} is offloaded, and its gradients are checked in float64 too, on copies of its "
            "networks that stay where they are: verify a pipeline on one device"
        )
    train = None if over in ("noise", "cond") else _train(pipe, over)
    texts: dict[str, Any] = {"negative_prompt": negative_prompt, "train": train}
    objective: nn.Module
    if family_of(pipe) is not None:
        if guidance_scale is None:
            guidance_scale = own_guidance(pipe)
        view = as_denoiser(pipe, prompt, guidance_scale, **texts)
        x_T = noise(pipe, height=height, width=width, seed=seed)
        objective = PictureLoss(pipe.vae, loss, [prompt])
    else:
        texts |= {k: v for k, v in (("height", height), ("width", width)) if v is not None}
        texts["generator"] = torch.Generator().manual_seed(seed)
        view = as_denoiser(pipe, prompt, guidance_scale, **texts)
        assert view.x_T is not None
        x_T = view.x_T.detach()
        objective = DecodedLoss(view, x_T, loss, [prompt])
    if x_T.dtype not in (torch.float32, torch.float64):
        x_T = x_T.float()
    problem = Problem(view.model, x_T, view.cond, objective)
    if train is None:
        return replace(problem, over=str(over))
    network: Any = view.model.network
    weights = tuple(name for name, p in network.named_parameters() if p.requires_grad)
    return replace(problem, over="weights", weights=weights)


def _train(pipe: Any, over: Over) -> Over:
    """What ``train=`` has to name for ``over``.

    Raises:
        InputError: it names nothing, or weights of another network than the denoising one.
    """
    component = "unet" if isinstance(getattr(pipe, "unet", None), nn.Module) else "transformer"
    train = component if over == "weights" else over
    others = [name for name in trained_parameters(pipe, train) if not name.startswith(f"{component}.")]
    if others:
        raise InputError(
            f"a certificate differentiates by weights of the denoising network alone, and over={over!r} names "
            f"{others[0]} as well ({len(others)} in all): name those of the {component}, such as '{component}.*lora*'"
        )
    return train


def own_guidance(pipe: Any) -> float:
    """The ``guidance_scale`` that the pipeline's call has by default."""
    import inspect

    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return float(parameter.default) if parameter is not None and parameter.default else 1.0


def of_denoiser(model: Denoiser, x_T: Any, cond: Any, loss: Objective, over: Over) -> Problem:
    """The problem of a denoiser.

    Raises:
        InputError: ``x_T`` is no batch of states, ``loss`` cannot be called, ``cond`` is given per step, or ``over``
            names no weights.
    """
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point() or x_T.ndim == 0 or not len(x_T):
        shown = f"{x_T.dtype} {tuple(x_T.shape)}" if isinstance(x_T, Tensor) else type(x_T).__name__
        raise InputError(f"a Denoiser needs x_T, a floating tensor (B, …) with B >= 1; got {shown}")
    if not callable(loss):
        raise InputError(f"for a Denoiser, loss is a function of the sample x0 (B, …); got {loss!r}")
    if isinstance(cond, PerStep) or isinstance(model.uncond, PerStep):
        raise InputError(
            "conditioning per step fits one number of steps, and a certificate measures several: give a nest of "
            "tensors or a function of time"
        )
    if moves(cond) and over == "cond":
        raise InputError("over='cond' needs cond as tensors, not as a function of time: use over='noise'")
    wide = x_T if x_T.dtype in (torch.float32, torch.float64) else x_T.float()
    if over in ("noise", "cond"):
        return Problem(model, wide, cond, loss, str(over))
    return Problem(model, wide, cond, loss, "weights", _named(model.network, over))


def _named(network: Any, over: Over) -> tuple[str, ...]:
    """The names of a network's parameters that require grad and that ``over`` means."""
    trained = {} if not isinstance(network, nn.Module) else dict(network.named_parameters())
    trained = {name: p for name, p in trained.items() if p.requires_grad}
    patterns = ["*"] if over == "weights" else [over] if isinstance(over, str) else list(over)
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = fnmatch.filter(trained, "*lora_*" if pattern == "lora" else pattern)
        if not found:
            held = f"such as {next(iter(trained))!r}" if trained else "of which there are none"
            raise InputError(
                f"over is 'noise', 'cond', 'weights', 'lora' or names of weights; {pattern!r} fits none of the "
                f"network's parameters with requires_grad ({held})"
            )
        chosen |= dict.fromkeys(found)
    return tuple(name for name in trained if name in chosen)


def _widened(nest: Any) -> Any:
    return nests.transform(lambda c: c.double() if c.is_floating_point() else c, nest)
