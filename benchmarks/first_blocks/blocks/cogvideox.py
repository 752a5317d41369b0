import torch
from diffusers import CogVideoXPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(CogVideoXPipeline, torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload(device=device)
pipe.vae.enable_tiling()

prompt = "a wooden toy ship glides over a blue carpet"
video = pipe(prompt=prompt, guidance_scale=6, num_inference_steps=50).frames[0]
