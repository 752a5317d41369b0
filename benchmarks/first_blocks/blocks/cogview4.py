import torch
from diffusers import CogView4Pipeline

from benchmarks.first_blocks.models import device, small

pipe = small(CogView4Pipeline, torch_dtype=torch.bfloat16)
pipe.to(device)

prompt = "a photo of a lighthouse riding a horse"
image = pipe(prompt, height=16, width=16).images[0]
