"""Random numbers for each sample of a batch, from a stream of its own.

The seeds are salted. A run begins with noise that users draw from a generator of the same small seeds, and time travel
with the very noise that the state still carries would add to it and not replace it: the state would come out a third
too large, where it is to keep its marginal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError

SALT = 0x6A09E667F3BCC908  # the fraction of sqrt(2)


def stream(seed: int) -> torch.Generator:
    """The generator of a sample whose seed it is; no small seed's own."""
    return torch.Generator().manual_seed((seed ^ SALT) % 2**63)


class Streams:
    """One generator per sample, so that no member of a batch changes what another one draws.

    Args:
        seed: a whole number, from which sample i's stream is derived with i; or one for each sample, whose streams are
            then those they would have alone, as sample 0.
    """

    def __init__(self, seed: int | Sequence[int]) -> None:
        numbers = [seed] if isinstance(seed, int) else list(seed) if isinstance(seed, Sequence) else []
        if not numbers or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in numbers):
            raise InputError(f"seed is a whole number >= 0, or one for each sample; got {seed!r}")
        self.seed = seed
        self._generators: list[torch.Generator] = []

    def check(self, batch: int) -> None:
        """Raise unless the seeds are for that many samples.

        Raises:
            InputError: they are for another number.
        """
        self._seeds(batch)

    def like(self, x: Tensor) -> Tensor:
        """The next standard normal numbers of x's shape (B, …), dtype and device.

        Raises:
            InputError: there are not as many seeds as samples.
        """
        if not self._generators:
            self._generators = [stream(s) for s in self._seeds(len(x))]
        if len(self._generators) != len(x):
            raise InputError(
                f"the streams were begun for {len(self._generators)} samples; got a batch of {len(x)}"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        drawn = [torch.randn(x.shape[1:], generator=g, dtype=dtype) for g in self._generators]
        return torch.stack(drawn).to(x)

    def _seeds(self, batch: int) -> list[int]:
        if isinstance(self.seed, int):
            # Far enough apart that no two (seed, sample) meet, and sample 0's is that of the seed itself.
            return [(self.seed + 0x9E3779B97F4A7C15 * i) % 2**63 for i in range(batch)]
        if len(self.seed) != batch:
            raise InputError(f"got {len(self.seed)} seeds for {batch} samples; give one, or one for each")
        return list(self.seed)
