"""The picture half of a CLIP (Radford et al., 2021): embeddings, and the patch tokens of an early block.

Blocks are counted from one: the tokens of block 3 are what the third residual block puts out, before the
final layer norm (``hidden_states[3]`` of transformers, where ``hidden_states[0]`` is the first block's input).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .clip import OPENAI_MEAN, OPENAI_STD
from .resize import prepare


class ImageEncoder(nn.Module):
    """A CLIP's vision network, ready for pictures in [0, 1] of any size.

    Args:
        model: A transformers ``CLIPModel`` or ``CLIPVisionModelWithProjection``; its folder or hub id; None for the
            built-in one.
        mean, std: Pixel statistics; by default those saved with the model, OpenAI's for a module that is handed in.

    Raises:
        InputError: When it cannot be loaded, or is no CLIP.
    """

    def __init__(
        self, model: Any = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if model is None:
            from ..pipelines import assets

            model = assets.load_clip()[0]
            mean, std = mean or (0.5,) * 3, std or (0.5,) * 3
        elif isinstance(model, str):
            model, *saved = load_vision(model)
            mean, std = mean or saved[0], std or saved[1]
        if not hasattr(model, "vision_model") or not hasattr(model, "visual_projection"):
            raise InputError(
                f"A CLIP must be a transformers CLIPModel or CLIPVisionModelWithProjection, got {type(model).__name__}."
            )
        config = getattr(model.config, "vision_config", model.config)
        self.network = model.vision_model
        self.projection = model.visual_projection
        self.size = int(config.image_size)
        self.blocks = len(self.network.encoder.layers)
        self.register_buffer("mean", torch.tensor(mean or OPENAI_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(std or OPENAI_STD), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def embed(self, images: Tensor) -> Tensor:
        """Unit embeddings ``(N, D)`` of ``(N, 3, H, W)`` pictures in [0, 1], in the pictures' dtype."""
        embeddings = self.projection(self._run(images).pooler_output)
        return nn.functional.normalize(embeddings.to(images.dtype), dim=-1)

    def tokens(self, images: Tensor) -> Tensor:
        """Patch tokens ``(N, patches, width)`` of the last block there is, without the class token."""
        return self._run(images).last_hidden_state[:, 1:].to(images.dtype)

    def up_to(self, block: int) -> ImageEncoder:
        """The same weights, with the blocks after ``block`` left out; only for :meth:`tokens`.

        Raises:
            InputError: When there is no such block.
        """
        if not 1 <= block <= self.blocks:
            raise InputError(f"This CLIP's blocks are 1 to {self.blocks}, got block={block}.")
        cut = _shallow(self)
        cut.network = _shallow(self.network)
        cut.network.encoder = _shallow(self.network.encoder)
        cut.network.encoder.layers = self.network.encoder.layers[:block]
        # What only the embedding needs would count as weights and travel between devices.
        cut.network.post_layernorm, cut.projection = nn.Identity(), nn.Identity()
        cut.blocks = block
        return cut

    def _run(self, images: Tensor) -> Any:
        pixels = prepare(images, self.size, self.mean, self.std)
        weight = self.network.embeddings.patch_embedding.weight
        return self.network(pixel_values=pixels.to(weight.dtype))


def as_encoder(given: Any) -> ImageEncoder:
    """``given`` as an :class:`ImageEncoder`: one, a CLIP, its folder or hub id, or None for the built-in one."""
    return given if isinstance(given, ImageEncoder) else ImageEncoder(given)


def load_vision(source: str) -> tuple[Any, Sequence[float] | None, Sequence[float] | None]:
    """The vision half of a CLIP by folder or hub id, frozen, with its mean and deviation where they are saved.

    Raises:
        InputError: When it cannot be loaded.
    """
    from transformers import AutoConfig, CLIPImageProcessor, CLIPVisionModelWithProjection

    try:
        config = AutoConfig.from_pretrained(source)
        if hasattr(
            config, "vision_config"
        ):  # of a whole CLIP, whose own projection_dim is the one that counts
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        model = CLIPVisionModelWithProjection.from_pretrained(source, config=config)
        model.eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"No CLIP model can be loaded from {source!r}: {line}") from error
    try:
        how = CLIPImageProcessor.from_pretrained(source)
    except (OSError, ValueError):  # models saved without one were trained with the usual statistics
        return model, None, None
    return model, how.image_mean, how.image_std


def _shallow(module: Any) -> Any:
    """A module with tables of its own, whose entries are the other's."""
    made = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(made, table, dict(getattr(module, table)))
    return made
