import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from benchmarks.first_blocks.inputs import picture
from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionXLImg2ImgPipeline, torch_dtype=torch.float16)
pipe = pipe.to(device)

init_image = picture()
prompt = "a lighthouse, in the style of an engraving"
image = pipe(prompt, image=init_image).images[0]
