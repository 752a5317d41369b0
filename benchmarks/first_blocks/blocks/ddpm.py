from diffusers import DDPMPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(DDPMPipeline).to(device)
image = pipe(num_inference_steps=25).images[0]
