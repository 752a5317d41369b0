import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

from benchmarks.first_blocks.inputs import picture
from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionInstructPix2PixPipeline, torch_dtype=torch.float16)
pipe.to(device)
pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)

image = picture()
images = pipe("make it night", image=image, num_inference_steps=10, image_guidance_scale=1).images
