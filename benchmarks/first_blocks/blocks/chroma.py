import torch
from diffusers import ChromaPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(ChromaPipeline, torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload(device=device)

prompt = ["a close-up of a lighthouse made of paper"]
negative_prompt = ["low quality, ugly, unfinished, out of focus"]
image = pipe(
    prompt=prompt,
    negative_prompt=negative_prompt,
    height=16,
    width=16,
    generator=torch.Generator("cpu").manual_seed(433),
    num_inference_steps=40,
    guidance_scale=3.0,
    num_images_per_prompt=1,
).images[0]
