import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionXLPipeline, torch_dtype=torch.float16).to(device)

prompt = "a lighthouse in a jungle, cold colours, muted, detailed"
image = pipe(prompt=prompt).images[0]
