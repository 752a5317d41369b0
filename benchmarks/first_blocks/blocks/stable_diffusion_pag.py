import torch
from diffusers import StableDiffusionPAGPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionPAGPipeline, torch_dtype=torch.float16)
pipe.enable_model_cpu_offload(device=device)

generator = torch.Generator(device="cpu").manual_seed(0)
images = pipe(
    prompt="an insect robot preparing a meal",
    num_inference_steps=25,
    guidance_scale=7.0,
    generator=generator,
    pag_scale=3.0,
).images
