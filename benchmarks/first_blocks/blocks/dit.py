import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler

from benchmarks.first_blocks.models import device, small

pipe = small(DiTPipeline, torch_dtype=torch.float16)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe = pipe.to(device)

class_ids = [437, 980]
generator = torch.manual_seed(33)
output = pipe(class_labels=class_ids, num_inference_steps=25, generator=generator)
