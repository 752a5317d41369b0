import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPVisionModelWithProjection

from benchmarks.first_blocks.inputs import ip_adapter_weights, picture
from benchmarks.first_blocks.models import device, small

image_encoder = small(CLIPVisionModelWithProjection, torch_dtype=torch.float16)
pipe = small(StableDiffusionPipeline, image_encoder=image_encoder, torch_dtype=torch.float16).to(device)
pipe.load_ip_adapter(ip_adapter_weights(pipe), subfolder=None, weight_name=None)
pipe.set_ip_adapter_scale(0.8)

image = picture()
images = pipe(
    prompt="a lighthouse like this one",
    ip_adapter_image=image,
    negative_prompt="deformed, ugly",
    num_inference_steps=50,
).images
