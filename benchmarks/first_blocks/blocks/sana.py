import torch
from diffusers import SanaPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(SanaPipeline, torch_dtype=torch.bfloat16)
pipe.to(device)
pipe.vae.to(torch.bfloat16)
pipe.text_encoder.to(torch.bfloat16)

image = pipe(
    prompt="a lighthouse with a neon sign",
    height=32,
    width=32,
    guidance_scale=4.5,
    num_inference_steps=20,
    use_resolution_binning=False,
    generator=torch.Generator(device="cpu").manual_seed(42),
)[0]
