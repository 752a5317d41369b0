import torch
from diffusers import StableVideoDiffusionPipeline

from benchmarks.first_blocks.inputs import picture
from benchmarks.first_blocks.models import device, small

pipe = small(StableVideoDiffusionPipeline, torch_dtype=torch.float16)
pipe.enable_model_cpu_offload(device=device)

image = picture()
generator = torch.manual_seed(42)
frames = pipe(image, height=16, width=16, decode_chunk_size=8, generator=generator).frames[0]
