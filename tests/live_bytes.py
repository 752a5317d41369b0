"""Counts the bytes that PyTorch's CPU allocator has handed out, to the byte: its own record of every allocation.

(Resident memory depends on malloc; a dispatch mode would keep autograd from adding gradients in place.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


class LiveBytes:
    """After ``with LiveBytes() as live: ...``: ``live.peak`` and ``live.left``, the most bytes that were alive beyond
    those at the start, and those still alive at the end (negative if older tensors were freed)."""

    peak = 0
    left = 0

    def __enter__(self) -> LiveBytes:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        torch.empty(1)  # the first allocation inside is sometimes not recorded
        return self

    def __exit__(self, *problem: Any) -> None:
        self._profile.__exit__(*problem)
        results = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        events = [e for e in results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            self.left += event.nbytes()
            self.peak = max(self.peak, self.left)
