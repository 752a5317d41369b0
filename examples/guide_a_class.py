"""Pictures of "a red digit on white" that a classifier is to see as a two: by a stock call, and three ways on one page.

python examples/guide_a_class.py
"""

from __future__ import annotations

import torch

import backdrift as bd
from backdrift.recipes import Sampling, guide_class
from backdrift.recipes.guided_class import built_in

PROMPT = "a red digit on white"


def main(out: str = "runs/two", samples: int = 4, num_inference_steps: int = 30) -> bd.Run:
    pipe = bd.load()

    # The pipeline's own call, with a callback.
    guidance = bd.SymplecticAdjointGuidance("class:two", n=4, start=0.1, stop=0.7, strength=0.3)
    generator = torch.Generator().manual_seed(0)
    pipe(
        PROMPT,
        num_inference_steps=num_inference_steps,
        guidance_scale=3.0,
        generator=generator,
        callback_on_step_end=guidance,
    )
    for entry in guidance.trace.last_attempts:
        print(f"step {entry.index}: cross-entropy of the estimate {entry.loss[0]:.3f}, in {entry.n} steps")

    # Unguided, one-step and n-step guidance from the same noise, with a report.
    how = built_in("sd", num_inference_steps=num_inference_steps, stop=0.6)
    run = guide_class(pipe, PROMPT, "two", how, Sampling(samples=samples, out=out))
    print(f"see {run.report}")
    return run


if __name__ == "__main__":
    main()
