import torch
from diffusers import StableDiffusionInpaintPipeline

from benchmarks.first_blocks.inputs import mask, picture
from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionInpaintPipeline, torch_dtype=torch.float16)
pipe = pipe.to(device)

init_image = picture()
mask_image = mask()
prompt = "a boat below the lighthouse"
image = pipe(prompt=prompt, image=init_image, mask_image=mask_image).images[0]
