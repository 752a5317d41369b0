import torch
from diffusers import WanPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(WanPipeline, torch_dtype=torch.bfloat16)
pipe.vae.to(torch.float32)
pipe.to(device)

prompt = "a cat walks on the grass below a lighthouse"
negative_prompt = "bright tones, overexposed, static, blurred details"
output = pipe(
    prompt=prompt,
    negative_prompt=negative_prompt,
    height=16,
    width=16,
    num_frames=2,
    guidance_scale=5.0,
).frames[0]
