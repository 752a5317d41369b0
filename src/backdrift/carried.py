"""What a network carries from call to call in its buffers: put back for a redone call, and left as it was by it.

In train mode some layers edit their own buffers while they are called: BatchNorm its running statistics, spectral
normalisation the vectors of its power iteration, others an exponential average. A redone call has to find them as the
first call found them, or its gradient is another's; and it must not edit them once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .errors import StateChangedError
from .versions import version_of

__all__ = ["Carried", "Carrier"]

#: Larger buffers (tables of positions) are looked at, not copied: what a layer edits in every call is small.
MOST_BYTES = 2**20


class Carrier:
    """The layers of a network that may edit their buffers: those in train mode that have any.

    Args:
        layers: all modules of the network.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = [layer for layer in layers if layer.training and layer._buffers]
        self._known: dict[tuple[int, str], _Copy] = {}

    def now(self) -> Carried | None:
        """The buffers as they are; None where there are none to look at. To be asked right before a call."""
        if not self._layers:
            return None
        return Carried(
            [self._copy(i, name) for i, layer in enumerate(self._layers) for name in layer._buffers]
        )

    def _copy(self, i: int, name: str) -> _Copy:
        layer, known = self._layers[i], self._known.get((i, name))
        # The norms' own kernels edit their statistics without a new version.
        silent = isinstance(layer, nn.modules.batchnorm._NormBase)
        if known is None or silent or not known.current():
            known = self._known[i, name] = _Copy(layer, name)
        return known


class _Copy:
    """One buffer at one moment."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name
        self.buffer = layer._buffers[name]
        self.version = 0
        self.content: Tensor | None = None
        if self.buffer is not None:
            self.version = version_of(self.buffer)
            if self.buffer.nbytes <= MOST_BYTES and not self.buffer.is_inference():
                self.content = self.buffer.detach().clone()

    def current(self) -> bool:
        """Whether the buffer is still the same, and was not edited."""
        now = self.layer._buffers.get(self.name)
        return now is self.buffer and (now is None or version_of(now) == self.version)

    def put(self) -> None:
        """Let the layer find the buffer's content as it was.

        By its data, not by another tensor: weights that wait elsewhere are taken to the device by theirs.

        Raises:
            StateChangedError: it is too large to have been copied, and was edited.
        """
        now = self.layer._buffers.get(self.name)
        if now is not None and self.content is not None:
            # A copy of the copy: the call may edit it, and there may be another backward pass.
            now.data = self.content.clone()
        elif not self.current():
            raise StateChangedError(
                f"the buffer {self.name!r} of a {type(self.layer).__name__} in train mode was changed between the "
                "forward and the backward pass, so the call cannot be redone: put the network in eval mode, or use "
                'memory="max"'
            )


class Carried:
    """Buffers at one moment, before a call."""

    def __init__(self, copies: Sequence[_Copy]) -> None:
        self._copies = copies

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block the layers find their buffers as they were; afterwards they hold what they held.

        Raises:
            StateChangedError: a large buffer has changed.
        """
        held = [(copy, copy.layer._buffers.get(copy.name)) for copy in self._copies]
        data = [None if buffer is None or copy.content is None else buffer.data for copy, buffer in held]
        try:
            for copy in self._copies:
                copy.put()
            yield
        finally:
            for (copy, buffer), before in zip(held, data, strict=True):
                copy.layer._buffers[copy.name] = buffer
                if buffer is not None and before is not None:
                    buffer.data = before
