import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

from benchmarks.first_blocks.models import device, small

adapter = small(MotionAdapter, torch_dtype=torch.float16)
pipe = small(AnimateDiffPipeline, motion_adapter=adapter, torch_dtype=torch.float16)
pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config,
    clip_sample=False,
    timestep_spacing="linspace",
    beta_schedule="linear",
    steps_offset=1,
)
pipe.vae.enable_slicing()
pipe.enable_model_cpu_offload(device=device)

output = pipe(
    prompt="waves below a lighthouse, golden hour",
    negative_prompt="bad quality, worse quality",
    num_frames=4,
    guidance_scale=7.5,
    num_inference_steps=25,
    generator=torch.Generator("cpu").manual_seed(42),
)
