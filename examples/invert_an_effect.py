"""Find the embedding of "in black and white" from one pair of pictures, and put it to another prompt.

python examples/invert_an_effect.py
"""

from __future__ import annotations

from pathlib import Path

import backdrift as bd
from backdrift.recipes import effect_pairs, load_embedding


def main(out: str = "runs/black-and-white", steps: int = 50, num_inference_steps: int = 20) -> bd.Run:
    pipe = bd.load()
    # Your own pictures go in as (picture, the same with the effect, prompt).
    pairs = effect_pairs(
        pipe,
        ["a yellow six on blue"],
        "in black and white",
        seeds=[0],
        num_inference_steps=num_inference_steps,
    )
    run = bd.invert(pipe, pairs, steps=steps, num_inference_steps=num_inference_steps, out=out)

    embedding = load_embedding(run.folder / "embedding.safetensors")
    noise = bd.noise(pipe, seed=1)
    prompt_embeds = embedding.apply(pipe, "a blue seven on bricks", strict=False)
    picture = pipe(
        prompt_embeds=prompt_embeds, latents=noise, num_inference_steps=num_inference_steps
    ).images[0]
    picture.save(Path(out) / "another.png")
    print(f"loss {run.record['iterations'][0]['loss']:.4f} -> {run.best.loss:.4f}; see {run.report}")
    return run


if __name__ == "__main__":
    main()
