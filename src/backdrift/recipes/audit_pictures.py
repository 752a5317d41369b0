"""Finished pictures, as a user of the pipeline gets them: its own call, diffusers' own clamp and 8 bits."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..descent.randomness import generator
from ..descent.subject import make_examples, picture_size

Change = Callable[[Any], Any]
"""What makes another PIL picture of a PIL picture."""


class Rendering:
    """The pipeline's own call, on noise, without what its safety checker would do to the pictures.

    Args:
        pipe: a diffusers pipeline; it is not changed.
        call: keywords of its call.
        seed: of the sampler's own noise.
        chunk: pictures per call; default all.
    """

    def __init__(
        self, pipe: Any, call: Mapping[str, Any], *, seed: int = 0, chunk: int | None = None
    ) -> None:
        self.pipe, self.call, self.seed, self.chunk = pipe, dict(call), seed, chunk
        # A copy of the pipeline, not of its networks, that shows what the checker would blacken.
        self._shown = copy.copy(pipe)
        own = self._shown.__dict__
        own["_progress_bar_config"] = {**own.get("_progress_bar_config", {}), "disable": True}
        if getattr(pipe, "safety_checker", None) is not None and hasattr(pipe, "run_safety_checker"):
            own["run_safety_checker"] = lambda image, *args, **kwargs: (image, None)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], noise: Tensor, draws: Sequence[int]) -> Tensor:
        """8-bit pictures (n, 3, H, W) on the CPU.

        Args:
            noise: (n, …), as ``latents=`` takes it.
            draws: which draw of the sampler's own noise each picture has.
        """
        size = self.chunk or len(prompts)
        made = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            call = dict(self.call)
            if isinstance(call.get("negative_prompt"), str):
                call["negative_prompt"] = [call["negative_prompt"]] * len(prompts[part])
            call["generator"] = [generator(self.seed, "sampler", j) for j in draws[part]]
            latents = noise[part].to(self.pipe._execution_device, self.pipe.dtype)
            made += self._shown(prompt=list(prompts[part]), latents=latents, output_type="pil", **call).images
        return torch.stack([from_pil(picture) for picture in made])

    def seeded(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The pictures of seeded noise, one for each prompt."""
        height, width = picture_size(self.pipe, self.call.get("height"), self.call.get("width"))
        noise = torch.cat(
            [
                make_examples(self.pipe, [p], height, width, s)[0].noise
                for p, s in zip(prompts, seeds, strict=True)
            ]
        )
        return self(prompts, noise, list(range(len(prompts))))


def eight_bit(images: Tensor) -> Tensor:
    """What diffusers makes of pictures meant for [0, 1] on the way to PIL: clamped, rounded to 8 bits."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def from_pil(picture: Any) -> Tensor:
    """A PIL picture as 8-bit (3, H, W)."""
    import numpy

    return torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def as_pil(picture: Tensor) -> Any:
    """An 8-bit picture (3, H, W) as PIL, the same numbers."""
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())


# ---- small changes, under which an evasion may not survive --------------------------------------------------


def jpeg(picture: Any, quality: int = 75) -> Any:
    """Compressed and read again."""
    from PIL import Image

    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def blur(picture: Any, radius: float = 1.0) -> Any:
    """Blurred by a Gaussian of so many pixels."""
    from PIL import ImageFilter

    return picture.filter(ImageFilter.GaussianBlur(radius))


def shrink(picture: Any, part: float = 0.75) -> Any:
    """Shrunk to that part of its sides and enlarged again."""
    from PIL import Image

    small = picture.resize([max(1, round(side * part)) for side in picture.size], Image.Resampling.BICUBIC)
    return small.resize(picture.size, Image.Resampling.BICUBIC)


CHANGES: dict[str, Change] = {
    "JPEG, quality 75": jpeg,
    "blur, radius 1 pixel": blur,
    "shrunk to 3/4 and back": shrink,
}


def changed(pictures: Tensor, change: Change) -> Tensor:
    """8-bit pictures (n, 3, H, W), each after ``change``."""
    return torch.stack([from_pil(change(as_pil(picture))) for picture in pictures])


# ---- how far apart two pictures are -------------------------------------------------------------------------


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of 8-bit pictures, (n,); infinite for equal ones."""
    error = (first.double() - second.double()).square().flatten(1).mean(1)
    return 10 * (255**2 / error).log10()


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of 8-bit pictures, (n,), at most 1.

    Per channel, with their Gaussian window (11 pixels, 1.5 in deviation; a smaller picture's own side) and constants,
    averaged over where the whole window fits.
    """
    x, y = first.double(), second.double()
    side = min(11, *x.shape[-2:])
    side -= 1 - side % 2
    line = torch.exp(-((torch.arange(side, dtype=torch.float64) - side // 2) ** 2) / (2 * 1.5**2))
    line = (line / line.sum()).to(x.device)

    def mean(z: Tensor) -> Tensor:
        flat = z.reshape(-1, 1, *z.shape[-2:])
        flat = F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return flat.view(*z.shape[:2], *flat.shape[-2:])

    a, b = mean(x), mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    spread = mean(x * x) - a * a + mean(y * y) - b * b
    likeness = (2 * a * b + c1) * (2 * (mean(x * y) - a * b) + c2) / ((a * a + b * b + c1) * (spread + c2))
    return likeness.flatten(1).mean(1)
