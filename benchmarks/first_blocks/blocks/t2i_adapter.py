import torch
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

from benchmarks.first_blocks.inputs import picture
from benchmarks.first_blocks.models import device, small

adapter = small(T2IAdapter, torch_dtype=torch.float16)
pipe = small(StableDiffusionAdapterPipeline, adapter=adapter, torch_dtype=torch.float16)
pipe.to(device)

colours = picture()
image = pipe("at night, glowing", image=colours, generator=torch.manual_seed(7)).images[0]
