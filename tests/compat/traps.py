"""The rows of the compatibility matrix: each test says which trap it is about and what becomes of it.

``python tests/compat/page.py --write`` imports the tests and writes ``docs/compatibility.md`` from what they say, so
that the page promises nothing that has no test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

_Test = TypeVar("_Test", bound=Callable[..., object])
Verdict = Literal["handled", "refused"]


@dataclass(frozen=True)
class Claim:
    """What one test shows."""

    verdict: Verdict
    says: str
    module: str
    test: str


@dataclass
class Trap:
    """One row.

    Args:
        text: what a user may have set up.
        alone: what checkpointing the network's calls by hand does then.
    """

    text: str
    alone: str
    claims: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        TRAPS.append(self)

    def handled(self, says: str) -> Callable[[_Test], _Test]:
        """Mark a test that shows the right gradient."""
        return self._claim("handled", says)

    def refused(self, says: str) -> Callable[[_Test], _Test]:
        """Mark a test that shows a refusal by name before anything is sampled."""
        return self._claim("refused", says)

    def _claim(self, verdict: Verdict, says: str) -> Callable[[_Test], _Test]:
        def mark(test: _Test) -> _Test:
            self.claims.append(Claim(verdict, says, test.__module__, test.__name__))
            return test

        return mark


@dataclass(frozen=True)
class Family:
    """A family of pipelines and what its test differentiates by.

    Attributes:
        name: as people call it.
        pipeline: the class.
        noise, embeddings, weights: how the tensor is handed in, or "" where there is none.
        result: name and shape of what comes back.
    """

    name: str
    pipeline: str
    noise: str
    embeddings: str
    weights: str
    result: str


TRAPS: list[Trap] = []
FAMILIES: list[Family] = []
