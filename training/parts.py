"""Every part of the built-in assets, in the order in which they need each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .loop import WORK, save_atomically


def _keep(name: str, module: nn.Module, **more: object) -> None:
    state = {k: v.detach().cpu() for k, v in module.state_dict().items()}
    save_atomically({"module": state, **more}, WORK / f"{name}-done.pt")


def _vae() -> None:
    from .vae import psnr, train_vae

    vae = train_vae()
    _keep("vae", vae, scaling_factor=vae.config.scaling_factor)
    print(
        f"PSNR on flat backgrounds {psnr(vae, flat=True):.2f} dB, on photographs {psnr(vae, flat=False):.2f} dB"
    )


def _text() -> None:
    from .clip import train_text

    _keep("text", train_text())


def _vision() -> None:
    from .clip import build, build_tokenizer, retrieval, train_vision

    clip = build(build_tokenizer())
    clip.load_state_dict(torch.load(WORK / "text-done.pt", weights_only=True)["module"])
    clip = train_vision(clip)
    _keep("clip", clip)
    print(f"right caption among 100: {retrieval(clip, build_tokenizer()):.3f}")


def _classifier() -> None:
    from .classifier import measure, train_classifier

    net = train_classifier()
    _keep("classifier", net)
    print(measure(net))


def _unet() -> None:
    from .unet import train_unet

    _keep("unet", train_unet())


def _flow() -> None:
    from .flow import train_flow

    _keep("flow", train_flow())


def _digits() -> None:
    from .digits import train_digits, velocity_error

    network = train_digits()
    _keep("digits", network)
    for held_out in (False, True):
        print(f"squared error on v, held out {held_out}: {velocity_error(network, held_out=held_out):.4f}")


def _preference() -> None:
    from .preference import train_preference

    _keep("preference", train_preference())


def _kinds() -> None:
    from .kinds import train_kinds

    _keep("kinds", train_kinds())


def _restore() -> None:
    from .restore import restore

    restore()


def _export() -> None:
    from .export import export

    export()


def _cards() -> None:
    from .cards import write_cards

    write_cards()


# Not among the parts: it takes the place of those that made what ships, to train on from there.
EXTRA: dict[str, Callable[[], None]] = {"restore": _restore}
PARTS: dict[str, Callable[[], None]] = {
    "vae": _vae,
    "text": _text,
    "vision": _vision,
    "classifier": _classifier,
    "unet": _unet,
    "flow": _flow,
    "digits": _digits,
    "preference": _preference,
    "kinds": _kinds,
    "export": _export,
    "cards": _cards,
}
