"""Random numbers that depend on names and numbers only, never on what was drawn before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from .. import accelerators


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed from a list of names and numbers."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A CPU generator seeded by ``parts``."""
    return torch.Generator().manual_seed(seed_of(*parts))


@contextmanager
def seeded(*parts: str | int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's global generators inside; outside they are as if nothing had happened."""
    states = random.getstate(), numpy.random.get_state()
    with accelerators.seeded(seed_of(*parts)):
        try:
            numpy.random.seed(seed_of(*parts) % 2**32)
            random.seed(seed_of(*parts))
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
