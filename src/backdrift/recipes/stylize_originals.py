"""What the untouched weights make of every prompt and noise: sampled once, kept in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..descent import Example, Options, Variable
from ..descent.measure import Measure
from ..files import write_atomically
from ..progress import progress_bar
from ..record import nothing_done
from ..run import Run
from .stylize_loss import StyleAndContent

FILE = "tensors/originals.safetensors"


class Originals:
    """The originals of a run.

    The file ``tensors/originals.safetensors`` has ``images`` (n, 3, H, W) in [0, 1], not clamped, and ``flagged`` (n,).
    It grows chunk by chunk and is never made anew for the same settings.

    Attributes:
        flagged: (n,) booleans: what the pipeline's safety checker says of each.
    """

    def __init__(self, run: Run, pipe: Any, options: Options, loss: StyleAndContent) -> None:
        self.run, self.pipe, self.options, self.loss = run, pipe, options, loss
        self.flagged = torch.zeros(0, dtype=torch.bool)

    def of(self, examples: Sequence[Example], progress: bool) -> list[Example]:
        """The same examples with their originals, on the CPU, as targets."""
        images = self._read()
        if len(images) < len(examples):
            images = self._make(list(examples), images, progress)
        return [replace(e, target=image) for e, image in zip(examples, images, strict=True)]

    def _make(self, examples: list[Example], images: Tensor, progress: bool) -> Tensor:
        size, stats = self.options.chunk or len(examples), nothing_done()["stats"]
        measure = Measure(self.pipe, Variable(), self.options, None, stats)
        with self.run.writing(), progress_bar(len(examples), progress, "originals") as bar:
            self.run.save_record()  # a folder without a record would be taken for somebody else's
            while (begin := len(images)) < len(examples):
                batch = list(range(begin, min(begin + size, len(examples))))
                found = measure(examples, batch, self._style, gradient=False)
                images = (
                    torch.cat([images, found.images.float().cpu()]) if begin else found.images.float().cpu()
                )
                self.flagged = torch.cat([self.flagged, found.flagged.cpu()])
                self._write(images)
                bar(len(images), {"loss": found.losses.mean().item()})
        return images

    def _style(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return self.loss.of(images, images)

    def _write(self, images: Tensor) -> None:
        from safetensors.torch import save

        data = save(
            {"images": images.contiguous(), "flagged": self.flagged},
            metadata={"fingerprint": self.run.record["fingerprint"]},
        )
        write_atomically(self.run.folder / FILE, lambda file: file.write(data))

    def _read(self) -> Tensor:
        """Those there are of these very settings; none from another run, or from a file that cannot be read."""
        from safetensors import SafetensorError, safe_open

        path = self.run.folder / FILE
        if path.is_file():
            try:
                with safe_open(str(path), framework="pt") as file:
                    if (file.metadata() or {}).get("fingerprint") == self.run.record["fingerprint"]:
                        self.flagged = file.get_tensor("flagged")
                        return file.get_tensor("images")
            except (OSError, SafetensorError):
                pass  # made anew
        return torch.empty(0)
