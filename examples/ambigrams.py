"""A picture that reads "two" upright and "seven" upside-down, from several seeds, beside one-step guidance.

python examples/ambigrams.py
"""

from __future__ import annotations

import backdrift as bd
from backdrift.recipes import successes


def main(
    out: str = "runs/ambigrams", seeds: int = 20, steps: int = 50, num_inference_steps: int = 12
) -> bd.Run:
    run = successes(
        bd.load(), "two", "seven", seeds=seeds, steps=steps, num_inference_steps=num_inference_steps, out=out
    )
    print(f"see {run.report}")
    return run


if __name__ == "__main__":
    main()
