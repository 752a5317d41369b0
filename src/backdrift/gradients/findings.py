"""Where NaN or infinity first appeared in a backward pass: noted on the device, read once at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import NonFiniteError


class Findings:
    """Notes whether quantities are finite, step by step.

    Args:
        times: the run's nodes.
        raises: raise what is found; otherwise warn, so that a gradient scaler for float16 can do its work.
    """

    shared_quantity = "the gradient of the weights or the conditioning"

    def __init__(self, times: Sequence[float], raises: bool) -> None:
        self.times, self.raises = times, raises
        self.step = len(times) - 2
        self._flags: dict[tuple[int, str], Tensor] = {}

    def forget(self) -> None:
        """Drop what was noted."""
        self._flags.clear()

    def see(self, quantity: str, value: Tensor) -> None:
        """Note ``value`` under the current :attr:`step`."""
        key, fine = (self.step, quantity), value.isfinite().all()
        flag = self._flags.get(key)
        self._flags[key] = fine if flag is None else flag & fine.to(flag.device)

    def report(self, spoiled: Callable[[], Sequence[str]]) -> None:
        """Raise or warn about the first thing that was not finite. Waits for the device once.

        Args:
            spoiled: the names of the shared tensors whose sums are not finite; asked for only if something is found.

        Raises:
            NonFiniteError: naming the quantity and the step.
        """
        flags, self._flags = self._flags, {}
        for (step, quantity), fine in flags.items():
            if bool(fine):
                continue
            names = spoiled() if quantity == self.shared_quantity else []
            if names:
                quantity = f"the gradient of {names[0]}" + (
                    f" and {len(names) - 1} more" if names[1:] else ""
                )
            message = (
                f"{quantity} became NaN or infinite in the backward pass, in step {step + 1} of {len(self.times) - 1} "
                f"(from t = {self.times[step]:g} to {self.times[step + 1]:g}): the loss's gradient is not finite, the "
                "network's derivative is not, or the adjoint grows beyond the dtype's range"
            )
            if self.raises:
                raise NonFiniteError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return
