"""Write ``docs/compatibility.md`` from the tests beside this file: ``python tests/compat/page.py --write``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "compatibility.md"
# The order of the rows.
MODULES = (
    "test_families",
    "test_half_precision",
    "test_outputs",
    "test_offload",
    "test_offloaded_weights",
    "test_offloaded_guidance",
    "test_offloaded_views",
    "test_schedulers",
    "test_targets",
    "test_precision_and_layout",
    "test_casting",
    "test_quantised",
    "test_processors",
    "test_caches",
    "test_modular",
    "test_own_noise",
    "test_parallel",
)

HEAD = """\
# What `differentiable` works with

Written from the tests in `tests/compat` by `make compatibility`; each line is what one of them shows, on small
pipelines with random weights. *Handled* means the gradient of plain autograd through the same call, bit for bit on
a CPU unless the line says otherwise. *Refused* means an error before anything is sampled, which says what to change.

## Families

Gradients reach the noise, the embeddings and the weights; `memory="min"` and `memory="max"` were both compared.
"""

RESULTS = """
## What comes back

| | where | shape | range |
|---|---|---|---|
| pictures | `.images` | (N, 3, H, W) | [0, 1], not clamped unless `clamp=True` |
| video | `.frames` | (N, frames, 3, H, W) | [0, 1], not clamped unless `clamp=True` |
| sound | `.audios` | (N, channels, samples) or (N, samples) | the waveform as it is |
| modular | the state's or the output's own name | as above | as above |
| `output_type="latent"` | as above | the latents | the pipeline's own |

`run.pil` has PIL copies of pictures and frames. Outputs are tensors whatever `output_type` says.

## Set-ups

"Alone" is what hand-written checkpointing of the network's calls does there.
"""


def render() -> str:
    """The page's text."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    for name in MODULES:
        importlib.import_module(name)
    from traps import FAMILIES, TRAPS

    lines = [
        HEAD,
        "| family | pipeline | noise | embeddings | weights | result |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f.name} | `{f.pipeline}` | {f.noise} | {f.embeddings} | {f.weights} | {f.result} |"
        for f in FAMILIES
    ]
    lines.append(RESULTS)
    for trap in sorted(TRAPS, key=lambda trap: MODULES.index(trap.claims[0].module)):
        lines += [f"### {trap.text}", "", f"Alone: {trap.alone}", ""]
        lines += [
            f"- **{claim.verdict}**: {claim.says} (`{claim.module}.{claim.test}`)" for claim in trap.claims
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    text = render()
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        raise SystemExit("docs/compatibility.md is not up to date: make compatibility")
