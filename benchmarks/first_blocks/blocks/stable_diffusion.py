import torch
from diffusers import StableDiffusionPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionPipeline, torch_dtype=torch.float16)
pipe = pipe.to(device)

prompt = "a lighthouse on a cliff at dusk"
image = pipe(prompt).images[0]
