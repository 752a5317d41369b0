import torch
from diffusers import FluxPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(FluxPipeline, torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload(device=device)

prompt = "a lighthouse that holds a sign"
out = pipe(
    prompt=prompt,
    guidance_scale=0.0,
    height=16,
    width=16,
    num_inference_steps=4,
    max_sequence_length=256,
).images[0]
