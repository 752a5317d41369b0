"""Optimise the noise until the finished picture shows what no prompt was told: here, a seven.

python examples/optimize_noise.py
"""

from __future__ import annotations

import backdrift as bd


def main(out: str = "runs/seven", steps: int = 20, num_inference_steps: int = 20) -> bd.Run:
    run = bd.optimize(
        bd.load(),
        "a red digit on white",  # the prompt does not say which
        "class:seven",  # or any function of pictures (N, 3, H, W) in [0, 1] that returns N values
        over="noise",
        num_inference_steps=num_inference_steps,
        steps=steps,
        noise_prior=0.01,  # keeps the noise looking like noise
        out=out,
    )
    print(f"loss {run.record['iterations'][0]['loss']:.3f} -> {run.best.loss:.3f}; see {run.report}")
    return run


if __name__ == "__main__":
    main()
