import torch
from diffusers import StableDiffusionImg2ImgPipeline

from benchmarks.first_blocks.inputs import picture
from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionImg2ImgPipeline, torch_dtype=torch.float16)
pipe = pipe.to(device)

init_image = picture()
prompt = "a lighthouse on a cliff, oil on canvas"
images = pipe(prompt=prompt, image=init_image, strength=0.75, guidance_scale=7.5).images
