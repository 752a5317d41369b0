"""Which blocks there are, and what shape the noise has that each of them begins with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent / "blocks"
_PICTURE = (1, 4, 8, 8)


@dataclass(frozen=True)
class Block:
    """One first code block.

    Attributes:
        name: of its file.
        page: which model page it is like.
        noise: shape of the pipeline's first draw, the tensor whose gradient is asked for.
        latents: the shape in which ``latents=`` takes it; None: the pipeline has no such argument.
        network: the attribute that holds the denoising network.
    """

    name: str
    page: str
    noise: tuple[int, ...] = _PICTURE
    latents: tuple[int, ...] | None = _PICTURE
    network: str = "unet"

    @property
    def source(self) -> str:
        """Its code."""
        return (_HERE / f"{self.name}.py").read_text()


def _transformer(
    name: str, page: str, noise: tuple[int, ...] = _PICTURE, latents: tuple[int, ...] | None = ()
) -> Block:
    return Block(name, page, noise, noise if latents == () else latents, "transformer")


BLOCKS = (
    Block("stable_diffusion", "Stable Diffusion: text to image, with its safety checker"),
    Block("stable_diffusion_memory", "Stable Diffusion: slicing and tiling", (2, 4, 8, 8), (2, 4, 8, 8)),
    Block("stable_diffusion_lora", "Stable Diffusion: a LoRA, and another scheduler"),
    Block("stable_diffusion_img2img", "Stable Diffusion: image to image", latents=None),
    Block("stable_diffusion_inpaint", "Stable Diffusion: inpainting"),
    Block("stable_diffusion_controlnet", "Stable Diffusion: ControlNet, offloaded"),
    Block("stable_diffusion_ip_adapter", "Stable Diffusion: IP-Adapter"),
    Block("instruct_pix2pix", "InstructPix2Pix"),
    Block("latent_consistency", "Latent Consistency Models"),
    Block("stable_diffusion_pag", "Perturbed-attention guidance"),
    Block("stable_diffusion_xl", "Stable Diffusion XL"),
    Block("sdxl_turbo", "SDXL Turbo: one step"),
    Block("sdxl_refiner", "Stable Diffusion XL: refiner", latents=None),
    Block("t2i_adapter", "T2I-Adapter"),
    Block("ddpm", "DDPM: pixels, no prompt", (1, 3, 8, 8), None),
    _transformer("stable_diffusion_3", "Stable Diffusion 3"),
    _transformer("flux_dev", "Flux.1-dev, offloaded", latents=(1, 16, 16)),
    _transformer("flux_schnell", "Flux.1-schnell: four steps", latents=(1, 16, 16)),
    _transformer("pixart_sigma", "PixArt-Σ"),
    _transformer("sana", "Sana", (1, 4, 16, 16)),
    _transformer("dit", "DiT: class labels", (2, 4, 8, 8), None),
    _transformer("hunyuan_dit", "Hunyuan-DiT"),
    _transformer("lumina2", "Lumina 2"),
    _transformer("cogview4", "CogView 4"),
    _transformer("chroma", "Chroma", latents=(1, 16, 16)),
    Block("animatediff", "AnimateDiff: video", (1, 4, 4, 8, 8), (1, 4, 4, 8, 8)),
    _transformer("wan", "Wan: video", (1, 4, 3, 8, 8)),
    _transformer("cogvideox", "CogVideoX: video", (1, 3, 4, 8, 8)),
    Block(
        "stable_video_diffusion", "Stable Video Diffusion: image to video", (1, 2, 4, 8, 8), (1, 2, 4, 8, 8)
    ),
    _transformer("stable_audio", "Stable Audio: sound", (3, 3, 16)),
)
