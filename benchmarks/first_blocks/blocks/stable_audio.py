import torch
from diffusers import StableAudioPipeline

from benchmarks.first_blocks.models import device, small

pipe = small(StableAudioPipeline, torch_dtype=torch.float16)
pipe = pipe.to(device)

audio = pipe(
    "waves against a cliff",
    negative_prompt="low quality",
    num_inference_steps=200,
    audio_end_in_s=8.0,
    num_waveforms_per_prompt=3,
    generator=torch.Generator("cpu").manual_seed(0),
).audios
