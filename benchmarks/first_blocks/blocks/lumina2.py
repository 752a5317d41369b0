import torch
from diffusers import Lumina2Pipeline

from benchmarks.first_blocks.models import device, small

pipe = small(Lumina2Pipeline, torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload(device=device)

image = pipe(
    "upper body of a lighthouse keeper, in a garden",
    height=64,
    width=64,
    guidance_scale=4.0,
    num_inference_steps=50,
    cfg_trunc_ratio=0.25,
    cfg_normalization=True,
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
