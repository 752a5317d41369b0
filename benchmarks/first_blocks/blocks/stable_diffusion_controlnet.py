import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UniPCMultistepScheduler

from benchmarks.first_blocks.inputs import picture
from benchmarks.first_blocks.models import device, small

controlnet = small(ControlNetModel, torch_dtype=torch.float16)
pipe = small(StableDiffusionControlNetPipeline, controlnet=controlnet, torch_dtype=torch.float16)
pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
pipe.enable_model_cpu_offload(device=device)

canny_image = picture()
generator = torch.manual_seed(0)
image = pipe("a lighthouse", num_inference_steps=20, generator=generator, image=canny_image).images[0]
