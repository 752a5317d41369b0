import torch
from diffusers import StableDiffusion3Pipeline

from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusion3Pipeline, torch_dtype=torch.float16)
pipe.to(device)

image = pipe(
    prompt="a photo of a lighthouse holding a sign that says hello",
    negative_prompt="",
    num_inference_steps=28,
    height=16,
    width=16,
    guidance_scale=7.0,
).images[0]
