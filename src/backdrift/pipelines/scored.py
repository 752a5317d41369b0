"""What a loss needs to score pictures, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackdriftError
from ..losses import CLIPText, InParts, prepare, resolve
from ..losses import Loss as Scorer
from ..planning.job import Loss
from ..planning.meta import like, to_meta, weight_bytes
from ..planning.profile import profile
from .configured import loss_networks
from .shadow import shadow

__all__ = ["count_loss"]

_PROMPT = "one"


def count_loss(loss: Any, pictures: Tensor, *, graded: bool = True) -> tuple[Loss | None, tuple[str, ...]]:
    """The bytes of a loss on given pictures, and a note if they could not be counted.

    Args:
        loss: the name of a CLIP model whose configuration ships with the package, or anything that
            :func:`backdrift.losses.resolve` takes. A callable's networks are found if it is a module.
        pictures: (N, 3, H, W) on the meta device.
        graded: whether its gradient by the pictures is taken.

    Raises:
        InputError: a spec that means no loss.
    """
    rows = len(pictures)
    loss = loss.loss if isinstance(loss, InParts) else loss
    scorer: Any = None
    if isinstance(loss, str) and loss in loss_networks():
        network, name = _Vision(loss), loss
        weights = weight_bytes(network)
    else:
        scorer = resolve(loss)
        for part in scorer.modules():
            if isinstance(part, CLIPText):  # texts are embedded once, without gradients, and remembered
                part.embed_texts([part.text] if part.text is not None else [_PROMPT])
        name, weights = scorer.spec or type(scorer).__name__, weight_bytes(scorer)
    images = like(pictures.detach()).requires_grad_(graded)
    try:
        values = network if scorer is None else _values(to_meta(shadow(scorer, set())), rows)
        with torch.set_grad_enabled(graded):
            counted = profile(lambda: values(images).sum(), [images])
    except BackdriftError:
        raise
    except Exception as error:  # it reads values, or networks that cannot be found or copied
        note = f"The loss {name} could not be counted ({type(error).__name__}: {error}); leave room for it."
        return None, (note,)
    return Loss(name, weights, rows, counted, images.nbytes if graded else 0), ()


def _values(scorer: Any, rows: int) -> Callable[[Tensor], Tensor]:
    prompts = [_PROMPT] * rows

    def values(images: Tensor) -> Tensor:
        wide = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        if type(scorer).values is not Scorer.values:
            return scorer.values(wide, prompts)
        return scorer.ask(images, prompts)  # a user's own function

    return values


class _Vision(nn.Module):
    """A CLIP vision network that is only counted, in float32, with the resizing in front of it."""

    def __init__(self, name: str) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        with torch.device("meta"):
            self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**loss_networks()[name]))
        self.model.requires_grad_(False).eval()
        self.size = loss_networks()[name]["image_size"]

    def forward(self, images: Tensor) -> Tensor:
        one = torch.ones(3, device=images.device)
        pixels = prepare(images.float(), self.size, one, one)
        return self.model(pixel_values=pixels).image_embeds
