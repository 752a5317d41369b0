"""Pictures that read "four" upright and "seven" upside-down, from several seeds, beside one-step guidance.

python examples/ambigrams.py
"""

from __future__ import annotations

import backdrift as bd
from backdrift.recipes import ambigram


def main(
    out: str = "runs/ambigrams", seeds: int = 8, steps: int = 40, num_inference_steps: int = 12
) -> bd.Run:
    run = ambigram(
        bd.load(),
        "four",
        "seven",
        seeds=range(seeds),
        steps=steps,
        num_inference_steps=num_inference_steps,
        out=out,
    )
    for name, value in run.record["figures"].items():
        print(f"{name}: {value}")
    print(f"see {run.report}")
    return run


if __name__ == "__main__":
    main()
