import torch
from diffusers import HunyuanDiTPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(HunyuanDiTPipeline, torch_dtype=torch.float16)
pipe.to(device)

prompt = "a lighthouse riding a horse"
image = pipe(prompt, use_resolution_binning=False).images[0]
