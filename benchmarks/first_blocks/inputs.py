"""What pages download beside their models, made here: pictures, masks, files of adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .tiny import PICTURE, WIDTH


def picture(side: int = PICTURE, seed: int = 0) -> Any:
    """A PIL picture in place of a downloaded one: smooth colours."""
    import PIL.Image

    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=side, mode="bilinear")[0]
    return PIL.Image.fromarray((255 * fine).byte().permute(1, 2, 0).numpy())


def mask(side: int = PICTURE) -> Any:
    """A PIL mask: the lower half is to be painted."""
    import PIL.Image

    half = torch.zeros(side, side, dtype=torch.uint8)
    half[side // 2 :] = 255
    return PIL.Image.fromarray(half.numpy())


def lora_weights(pipe: Any) -> dict[str, Tensor]:
    """What a LoRA file for this pipeline's UNet holds."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet = type(pipe.unet).from_config(pipe.unet.config)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(5)
    weights = get_peft_model_state_dict(unet)
    return {
        f"unet.{k}": (0.3 * torch.randn(v.shape, generator=generator)).bfloat16().float()
        for k, v in weights.items()
    }


def ip_adapter_weights(pipe: Any, tokens: int = 4) -> dict[str, Any]:
    """What an IP-Adapter's file for this pipeline's UNet holds."""
    generator, layers, key = torch.Generator().manual_seed(9), {}, 1

    def draw(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).bfloat16().float()

    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{key}.{part}.weight"] = draw(hidden, WIDTH)
            key += 2
    projection = {
        "proj.weight": draw(tokens * WIDTH, 8),
        "proj.bias": torch.zeros(tokens * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": layers}
