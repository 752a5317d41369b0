"""A Brownian path that can be read at any time, in any order, on any grid: nothing of it is stored.

The path W runs over the clock c = sigma² / (alpha² + sigma²), which is 0 at the data and 1 at pure noise on every
schedule, the infinite ends of rho and omega included. It is Lévy's construction,

    W(c) = c Z_0 + Σ_l s_l hat_l(c) Z_l,     s_l² = (m - a)(b - m) / (b - a),

one term per level of a binary tree: on level l the time lies in one interval [a, b], split at m, and hat_l rises
linearly from 0 at a to 1 at m and falls to 0 at b. The normals Z are functions of the seed, the row and the tree's
node (:mod:`.normals`). The tree halves the *angle* arctan(sigma/alpha), in which both ends are resolved alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..accelerators import has_float64
from ..errors import InputError
from ..schedules import Schedule
from .base import Draw, Noise
from .normals import normals, row_keys, stream

# Times are told apart down to 2^-LEVELS of the right angle: 1e-7 of rho at rho = 1, 1e-7 itself near the data.
LEVELS = 24
# Levels are drawn together as long as that many numbers are in flight: few operations for a small state, and what
# fits a cache is twice as fast.
_TOGETHER = 1 << 16


class Brownian(Noise):
    """Brownian motion from a seed: the same path however finely a run steps along it.

    The noises of two steps that follow each other add up to the noise of the step over both, so runs on finer and finer
    grids converge to one solution of the SDE, not only in distribution. A row's path depends on the
    seed, the row's number and the row's shape: not on the batch size, the dtype or (but for the last digit) the
    device. Steps on schedules of different names with the same sigma/alpha get the same noise.

    Args:
        seed: any integer; row i of a batch has path number i of that seed. Or one integer per row: each row
            then has path number 0 of its own seed, wherever it stands in a batch.

    Raises:
        InputError: ``seed`` is neither; when a run begins, the seeds are not as many as its rows.

    Example:
        >>> noise = Brownian(0)
        >>> coarse = sample(model, x_T, solver=Ancestral(), grid=TimeGrid("logsnr", 20), noise=noise)
        >>> fine = sample(model, x_T, solver=Ancestral(), grid=TimeGrid("logsnr", 80), noise=noise)
    """

    def __init__(self, seed: int | Sequence[int]) -> None:
        self.seed = seed
        self._seeds: list[int] | None = None if _whole(seed) else _checked(seed)

    def __repr__(self) -> str:
        return f"Brownian({self.seed!r})"

    def path(self, schedule: Schedule, times: Sequence[float], x: Tensor) -> Draw:
        path = self.rows(x)
        angles = {t: angle(schedule, t) for t in times}
        for a, b in itertools.pairwise(times):
            if snapped(angles[a]) == snapped(angles[b]):
                raise InputError(
                    f"the times {a:.9g} and {b:.9g} are too close for a Brownian path (sigma/alpha differs by less "
                    "than it resolves): take fewer steps there, or give the noises as tensors"
                )

        def draw(mean: Tensor, std: float, start: float, end: float) -> Tensor:
            found = (angles[t] if t in angles else angle(schedule, t) for t in (start, end))
            return path.normal(*found).to(mean)

        return draw

    def rows(self, x: Tensor) -> BrownianPath:
        """The paths of the rows of ``x``."""
        if self._seeds is None:
            return BrownianPath(row_keys([self.seed] * len(x), range(len(x))), x)  # type: ignore[list-item]
        if len(self._seeds) != len(x):
            raise InputError(f"Brownian was given {len(self._seeds)} seeds for a batch of {len(x)} rows")
        return BrownianPath(row_keys(self._seeds, [0] * len(x)), x)


class BrownianPath:
    """The paths W of a batch's rows, by angle.

    Args:
        keys: one per row (B,).
        like: a tensor (B, …) of the batch's shape, on its device.
    """

    def __init__(self, keys: Tensor, like: Tensor) -> None:
        device = like.device if has_float64(like.device) else torch.device("cpu")
        self.shape = like.shape
        numbers = torch.arange(like[0].numel(), device=device)
        self.keys, self.places = keys.to(device), stream(torch.zeros_like(numbers), numbers)
        # The end of one step is the start of the next.
        self._last: tuple[int, Tensor] | None = None

    def value(self, u: float) -> Tensor:
        """W at ``u`` in [0, 1], rounded to the tree's resolution: float64 (B, …), of variance sin²(pi u / 2)."""
        k = snapped(u)
        if self._last is None or self._last[0] != k:
            self._last = (k, self._value(k))
        return self._last[1]

    def normal(self, start: float, end: float) -> Tensor:
        """(W(end) - W(start)) / its standard deviation, (B, …), for two different angles in [0, 1]."""
        before, after = self.value(start), self.value(end)
        return (after - before) / math.sqrt(abs(_gap(snapped(start), snapped(end))))

    def _value(self, k: int) -> Tensor:
        terms = _terms(k)
        total = torch.zeros(len(self.keys), len(self.places), dtype=torch.float64, device=self.keys.device)
        together = max(1, _TOGETHER // max(1, total.numel()))
        for first in range(0, len(terms), together):
            part = terms[first : first + together]
            drawn = normals(self.keys, [node for node, _ in part], self.places)
            total += torch.tensordot(drawn.new_tensor([weight for _, weight in part]), drawn, 1)
        return total.reshape(self.shape)


def angle(schedule: Schedule, t: float) -> float:
    """arctan(sigma/alpha) at ``t`` in right angles: 0 where sigma = 0, 1 where alpha = 0."""
    return 2 / math.pi * math.atan2(float(schedule.sigma(t)), float(schedule.alpha(t)))


def snapped(u: float) -> int:
    """The leaf of the tree nearest to ``u``."""
    return round(u * (1 << LEVELS))


def _gap(j: int, k: int) -> float:
    """c_k - c_j, where c = sin²: the difference of two squares as a product, so that near ones keep their digits."""
    unit = math.pi / 2 / (1 << LEVELS)
    return math.sin((k + j) * unit) * math.sin((k - j) * unit)


def _terms(k: int) -> list[tuple[int, float]]:
    """The nodes of the tree (numbered as in a heap, 0 for the end point) and their weights in W at leaf ``k``."""
    low, high = 0, 1 << LEVELS
    found = [(0, _gap(low, k))]
    node = 1
    while low < k < high:
        middle = (low + high) // 2
        rise, fall = _gap(low, middle), _gap(middle, high)
        hat = _gap(low, k) / rise if k <= middle else _gap(k, high) / fall
        found.append((node, hat * math.sqrt(rise * fall / (rise + fall))))
        low, high, node = (low, middle, 2 * node) if k < middle else (middle, high, 2 * node + 1)
    return found


def _whole(seed: object) -> bool:
    return isinstance(seed, int) and not isinstance(seed, bool)


def _checked(seed: object) -> list[int]:
    if not isinstance(seed, Sequence) or isinstance(seed, str) or not seed or not all(map(_whole, seed)):
        raise InputError(f"the seed of a Brownian path is an integer, or one integer per row; got {seed!r}")
    return list(seed)
