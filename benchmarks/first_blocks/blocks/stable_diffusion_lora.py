import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from benchmarks.first_blocks.inputs import lora_weights
from benchmarks.first_blocks.models import device, small

pipe = small(StableDiffusionPipeline, torch_dtype=torch.float16).to(device)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(lora_weights(pipe), adapter_name="drawn")

image = pipe(
    "a lighthouse, drawn",
    num_inference_steps=25,
    guidance_scale=7.5,
    cross_attention_kwargs={"scale": 0.9},
).images[0]
