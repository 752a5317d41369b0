import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionXLPipeline, torch_dtype=torch.float16)
pipe.to(device)

prompt = "a small lighthouse in the snow"
image = pipe(prompt=prompt, num_inference_steps=1, guidance_scale=0.0).images[0]
