"""One call of a pipeline, seen alike for ordinary and modular pipelines: its arguments, its code, its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnsupportedError
from . import modular
from .refusals import plain_class
from .twins import twin


@dataclass
class PipelineCall:
    """What the user asked a pipeline for.

    Attributes:
        code: the pipeline's ``__call__`` that can run with gradients: ``code(pipe, *args, **kwargs)``.
        arguments: every argument by its name, those of ``**kwargs`` and of a modular state among them.
        latent: the result is to be latents.
    """

    code: Callable[..., Any]
    bound: inspect.BoundArguments
    extra: str | None  # the name of the ** parameter
    latent: bool
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe: Any, args: Any, kwargs: Any, output_type: str = "pt") -> PipelineCall:
        """Bind a call, and ask for tensors.

        Args:
            pipe: the user's pipeline.
            args, kwargs: the call's arguments, without the pipeline.
            output_type: what to ask the pipeline for, unless the user asked for latents.

        Raises:
            TypeError: for a wrong call, as from the pipeline itself.
            UnsupportedError: the arguments ask for what has no gradient.
        """
        own = plain_class(type(pipe))
        code = getattr(twin(own), "__call__")  # noqa: B004, B009
        signature = inspect.signature(code)
        bound = signature.bind(pipe, *args, **kwargs)
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        call = cls(code, bound, extra, latent=False)
        call.latent = call._given("output_type") == "latent"
        if call._given("padding_mask_crop") is not None:
            raise UnsupportedError(
                "padding_mask_crop pastes the result in PIL, where gradients end; crop yourself"
            )
        in_blocks = modular.is_modular(own) and modular.takes_output_type(pipe)
        if not call.latent and ("output_type" in signature.parameters or in_blocks):
            call.set("output_type", output_type)
        call.arguments = call._by_name()
        return call

    def set(self, name: str, value: Any) -> None:
        """Give an argument another value."""
        if name in self.bound.signature.parameters or self.extra is None:
            self.bound.arguments[name] = value
        else:
            self.bound.arguments.setdefault(self.extra, {})[name] = value

    def run(self, pipe: Any) -> Any:
        """The call on another pipeline object."""
        return self.code(pipe, *self.bound.args[1:], **self.bound.kwargs)

    def _given(self, name: str) -> Any:
        extra = self.bound.arguments.get(self.extra, {}) if self.extra else {}
        return self.bound.arguments.get(name, extra.get(name))

    def _by_name(self) -> dict[str, Any]:
        found = {k: v for k, v in self.bound.arguments.items() if k != self.extra}
        found |= self.bound.arguments.get(self.extra, {}) if self.extra else {}
        state = found.pop("state", None)
        if isinstance(getattr(state, "values", None), Mapping):
            found |= {k: v for k, v in state.values.items() if v is not None and k not in found}
        return found
