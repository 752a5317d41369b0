import torch
from diffusers import PixArtSigmaPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(PixArtSigmaPipeline, torch_dtype=torch.float16)
pipe.enable_model_cpu_offload(device=device)

prompt = "a small cactus with a happy face in the desert"
image = pipe(prompt, use_resolution_binning=False).images[0]
