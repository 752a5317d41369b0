"""Clean latents → pictures in [0, 1], by the pipeline's own decoder, differentiable and not clamped.

What lies between latents and decoder is the pipeline's: division by the scaling factor, shift or per-channel mean and
standard deviation (where its code says so), packing into tokens, the way of videos. A pipeline for which that is not
known is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from .frozen import Frozen
from .modular import is_modular
from .recorded import Recorded
from .refusals import image_processors, plain_class, reached
from .shadow import unwrapped
from .twins import names

__all__ = ["Decoder"]

_KNOWN = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
# Decoders of videos: of frames one by one, and of the whole.
_OF_VIDEO = ("AutoencoderKL", "AutoencoderKLCogVideoX", "AutoencoderKLWan")


class Decoder:
    """A pipeline's decoder on frozen copies of its networks.

    Args:
        pipe: the pipeline; it is not changed.
        decode: takes the decoder's place: clean latents, as the pipeline's scheduler steps them, to pictures
            (B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1].
        frozen: the copy of its autoencoder to use, such as :meth:`autoencoder` gave; one of its own if None.
        networks: makes such copies; one of its own if None.
    """

    def __init__(
        self,
        pipe: Any,
        decode: Callable[[Tensor], Tensor] | None = None,
        frozen: nn.Module | None = None,
        networks: Frozen | None = None,
    ) -> None:
        self._pipe, self._given, self._frozen = pipe, decode, frozen
        self._own = Frozen(pipe) if networks is None else networks

    def autoencoder(self, x0: Tensor) -> nn.Module | None:
        """The frozen copy of the network that decodes such latents; None for a pipeline in pixels.

        Raises:
            UnsupportedError: how this pipeline decodes is not known.
        """
        if not any(hasattr(value, "decode") for value in _networks(self._pipe)):
            return None
        return self._vae(x0.device, _OF_VIDEO if x0.ndim == 5 else _KNOWN)

    def of(self, calls: Sequence[Recorded]) -> Callable[[Tensor], Tensor]:
        """``decode(x0)`` for the latents of a step with these calls (packed ones say their size there)."""
        return partial(self._decode, calls)

    def state_in(self, call: Recorded) -> Tensor:
        """The state's own part of what a network is about to be given: without the mask, the masked picture or the
        reference's tokens that some pipelines put beside or behind it."""
        given, config = call.input, getattr(getattr(self._pipe, "vae", None), "config", None)
        channels = getattr(config, "latent_channels", None) or getattr(config, "z_dim", None)
        if not isinstance(channels, int):
            return given
        if given.ndim != 3:
            return given[:, :channels]
        ids = _places([call])  # 2 x 2 latents lie in a token
        return given[:, : given.shape[1] if ids is None else len(ids), : 4 * channels]

    def _decode(self, calls: Sequence[Recorded], x0: Tensor) -> Tensor:
        if self._given is not None:
            pictures = self._given(x0)
        elif not any(hasattr(value, "decode") for value in _networks(self._pipe)):
            pictures = self._pixels(x0)
        elif x0.ndim == 5:
            pictures = self._video(x0)
        else:
            pictures = self._decoded(self._unpacked(calls, x0))
        shape = pictures.shape if isinstance(pictures, Tensor) else ()
        if len(shape) not in (4, 5) or shape[0] != len(x0) or shape[-3] != 3:
            shown = tuple(shape) if isinstance(pictures, Tensor) else type(pictures).__name__
            raise InputError(
                f"decoding {tuple(x0.shape)} gives pictures ({len(x0)}, 3, H, W) or videos ({len(x0)}, F, 3, H, W); "
                f"got {shown}"
            )
        return pictures

    def _pixels(self, x0: Tensor) -> Tensor:
        """Of pipelines that have no autoencoder: [-1, 1] to [0, 1]."""
        if x0.ndim != 4 or x0.shape[1] != 3:
            raise self._unknown(f"has no decoder, and its state {tuple(x0.shape)} is no picture (B, 3, H, W)")
        return x0 / 2 + 0.5

    def _video(self, x0: Tensor) -> Tensor:
        """Videos (B, F, 3, H, W) of latents in space and time: by the pipeline's ``decode_latents``, or as Wan's."""
        cls = plain_class(type(self._pipe))
        own = hasattr(cls, "decode_latents")
        vae: Any = self._vae(x0.device, _OF_VIDEO)
        given = x0.to(next(vae.parameters()).dtype)
        if own:
            clone = copy.copy(self._pipe)
            clone.__dict__["vae"] = vae
            video = cls.decode_latents(clone, given)
        elif type(vae).__name__ == "AutoencoderKLWan" and {"latents_mean", "latents_std"} <= _said(
            self._pipe
        ):
            mean, std = (
                torch.tensor(v).view(1, -1, 1, 1, 1).to(given)
                for v in (vae.config.latents_mean, vae.config.latents_std)
            )
            # The pipeline's own arithmetic: divided by the inverse.
            video = vae.decode(given / (1.0 / std) + mean, return_dict=False)[0]
        else:
            raise self._unknown(f"steps {tuple(x0.shape)}, whose way to pictures is not known")
        return video.transpose(1, 2).to(x0.dtype) / 2 + 0.5

    def _unpacked(self, calls: Sequence[Recorded], x0: Tensor) -> Tensor:
        """Latents (B, channels, h, w) of tokens (B, h w / 4, 4 channels)."""
        if x0.ndim == 4:
            return x0
        pipe = self._pipe
        if x0.ndim != 3 or not hasattr(pipe, "_unpack_latents"):
            raise self._unknown(
                f"steps {tuple(x0.shape)}, whose way to pictures is not known (video, sound, tokens)"
            )
        own = _places(calls)
        if own is None:
            raise self._unknown("packs its latents and does not tell its network their places as img_ids")
        rows, columns = (int(own[:, d].max()) + 1 for d in (1, 2))
        if rows * columns != x0.shape[1]:
            raise self._unknown(f"has {x0.shape[1]} tokens at {rows} x {columns} places")
        unit = 2 * pipe.vae_scale_factor
        return pipe._unpack_latents(x0, rows * unit, columns * unit, pipe.vae_scale_factor)

    def _decoded(self, latents: Tensor) -> Tensor:
        vae: Any = self._vae(latents.device, _KNOWN)
        config = vae.config
        said = _said(self._pipe)
        given = latents.to(next(vae.parameters()).dtype)
        scaling = getattr(config, "scaling_factor", None) or 1.0
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        if "latents_mean" in said and mean is not None and std is not None:
            mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(given) for v in (mean, std))
            given = given * std / scaling + mean
        else:
            given = given / scaling
            if "shift_factor" in said and getattr(config, "shift_factor", None) is not None:
                given = given + config.shift_factor
        pictures = vae.decode(given, return_dict=False)[0]
        return pictures.to(latents.dtype) / 2 + 0.5

    def _vae(self, device: torch.device, known: tuple[str, ...]) -> nn.Module:
        """The frozen copy of the autoencoder, on the latents' device; of one of the ``known`` classes."""
        if self._frozen is not None:
            return self._frozen
        pipe = self._pipe
        vae: Any = getattr(pipe, "vae", None)
        cls = type(unwrapped(vae)).__name__ if isinstance(vae, nn.Module) else "another decoder than vae"
        if cls not in known or is_modular(plain_class(type(pipe))):
            raise self._unknown(f"has {cls}; known are {', '.join(known)} in an ordinary pipeline")
        processor = image_processors(pipe).get("image_processor")
        if processor is not None and not processor.config.get("do_normalize", True):
            raise self._unknown("has an image processor without do_normalize")

        def ready(frozen: Any) -> nn.Module:
            overflows = frozen.config.get("force_upcast") and "force_upcast" in _said(pipe)
            if next(frozen.parameters()).dtype == torch.float16 and overflows:
                frozen = frozen.float()
            return frozen if self._own.comes_and_goes("vae") else frozen.to(device)

        return self._own.of("vae", vae, ready)

    def _unknown(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{type(self._pipe).__name__} {what}: pass decode=, a function from its clean latents to pictures "
            "(B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1], not clamped"
        )


def _networks(pipe: Any) -> list[nn.Module]:
    return [value for value in vars(pipe).values() if isinstance(value, nn.Module)]


def _places(calls: Sequence[Recorded]) -> Tensor | None:
    """Where the state's own tokens lie, (tokens, 3), without a reference picture's; None where no network is told."""
    ids = next((c.kwargs["img_ids"] for c in calls if isinstance(c.kwargs.get("img_ids"), Tensor)), None)
    if ids is None or ids.shape[-1] != 3:
        return None
    ids = ids.reshape(-1, 3)
    return ids[ids[:, 0] == 0]


def _said(pipe: Any) -> set[str]:
    """What the code of a pipeline's call mentions."""
    return {name for _, code in reached(plain_class(type(pipe))) for name in names(code)}
