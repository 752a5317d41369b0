import torch
from diffusers import LatentConsistencyModelPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(LatentConsistencyModelPipeline)
pipe.to(torch_device=device, torch_dtype=torch.float32)

prompt = "a lighthouse, its light on the water"
images = pipe(prompt=prompt, num_inference_steps=4, guidance_scale=8.0).images
