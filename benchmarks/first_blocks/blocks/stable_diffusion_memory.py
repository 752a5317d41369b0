import torch
from diffusers import StableDiffusionPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionPipeline, torch_dtype=torch.float16)
pipe = pipe.to(device)
pipe.enable_attention_slicing()
pipe.vae.enable_slicing()
pipe.vae.enable_tiling()

images = pipe(
    "a lighthouse on a cliff at dusk",
    negative_prompt="blurry, low quality",
    num_images_per_prompt=2,
    generator=torch.Generator("cpu").manual_seed(33),
).images
