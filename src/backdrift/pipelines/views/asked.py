"""The call of a pipeline that a view is made of: the user's arguments under the names that the pipeline takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import InputError, UnsupportedError
from ..modular import is_modular
from ..refusals import plain_class, undecorated_call

__all__ = ["asked"]

_CALLBACKS = ("callback", "callback_on_step_end", "callback_steps", "callback_on_step_end_tensor_inputs")


def asked(pipe: Any, given: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments to call a pipeline with.

    Args:
        pipe: a diffusers pipeline.
        given: :func:`~backdrift.as_denoiser`'s own arguments, None where the user gave none.
        call: the others, for the pipeline's call.

    Returns:
        Those that are not None, and the empty text where a text is wanted and none was given. Generators are copies, so
        the user's are not drawn from.

    Raises:
        InputError: the pipeline takes none of that name, text and embeddings do not go together, or a text is wanted
            and there is nothing to encode it with.
        UnsupportedError: a modular pipeline.
    """
    cls = plain_class(type(pipe))
    name = cls.__name__
    if is_modular(cls):
        raise UnsupportedError(
            f"{name} is a modular pipeline, whose loop is a chain of blocks: use bd.differentiable, or an ordinary "
            "pipeline of the same parts"
        )
    parameters = inspect.signature(undecorated_call(cls)).parameters
    found = {key: value for key, value in given.items() if value is not None} | dict(call)
    # Those with **kwargs take old names there, and drop all others without a word.
    names = [key for key, p in parameters.items() if key != "self" and p.kind is not p.VAR_KEYWORD]
    unknown = [key for key in found if key not in (*names, *_CALLBACKS)]
    if unknown:
        raise InputError(f"{name}'s call takes no {unknown[0]}; it takes {', '.join(names)}")
    for key in _CALLBACKS:
        if found.get(key) is not None:
            raise InputError(
                f"{key} belongs to the pipeline's own loop, which a view does not run: leave it out"
            )
    for text in ("prompt", "negative_prompt"):
        if found.get(text) is not None and found.get(f"{text}_embeds") is not None:
            raise InputError(f"give {text} or {text}_embeds, not both")
        if text in parameters and found.get(f"{text}_embeds") is not None:
            found[text] = None  # its default is the empty text in some
    if "prompt" in parameters and found.get("prompt") is None and found.get("prompt_embeds") is None:
        found["prompt"] = ""
    if isinstance(found.get("prompt"), str | list | tuple):
        _check_encoders(pipe, name)
    return {key: _copied(value) for key, value in found.items()}


def _check_encoders(pipe: Any, name: str) -> None:
    encoders = [key for key in vars(pipe) if key.startswith("text_encoder")]
    if encoders and all(getattr(pipe, key) is None for key in encoders):
        raise InputError(
            f"{name} was loaded without its text encoders ({', '.join(encoders)}), so nothing can encode a text: give "
            "prompt_embeds (and what goes with them), or load it with them"
        )


def _copied(value: Any) -> Any:
    """A generator as it is now; anything else itself."""
    if isinstance(value, list) and any(isinstance(item, torch.Generator) for item in value):
        return [_copied(item) for item in value]
    if not isinstance(value, torch.Generator):
        return value
    copy = torch.Generator(value.device)
    copy.set_state(value.get_state())
    return copy
