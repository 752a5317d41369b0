import torch
from diffusers import FluxPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(FluxPipeline, torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload(device=device)

prompt = "a tiny lighthouse on a teacup"
out = pipe(
    prompt=prompt,
    guidance_scale=3.5,
    height=16,
    width=16,
    num_inference_steps=50,
).images[0]
