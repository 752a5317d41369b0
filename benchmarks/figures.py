"""The README's table of measured figures, written from the results files and from nothing else.

    python -m benchmarks.figures            # print it; exit status 1 if the README says anything else
    python -m benchmarks.figures --write    # put it into the README

``results/exact_gradient.json`` becomes a table of methods; what was measured on a GPU (``results/gpu-<card>.json``)
leads with a table and a picture of its own. Any other results file may hold
``"figures": [["what was measured", "value"], …]``; those rows are listed below it, and then those beside other packages
(``results/peers-*.json``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from .exact_gradient import RESULTS
from .marked import marked, rewritten
from .peers.page import figures as beside_peers
from .record import Figures

README = Path(__file__).parent.parent / "README.md"
BESIDES = "Measured besides: ambigrams, inversion, stylisation, new words, audits, guidance, other packages"
_NAMES = {
    "plain": "plain autograd",
    "exact-max": '`Exact("max")`',
    "exact-3/4": "`Exact`, budget ¾ of the way",
    "exact-1/2": "`Exact`, budget half way",
    "exact-1/4": "`Exact`, budget ¼ of the way",
    "exact-min": '`Exact("min")`',
    "checkpoint": "`torch.utils.checkpoint` per call",
    "torchdiffeq": "torchdiffeq `odeint_adjoint`",
}


def gradient_table(figures: Figures) -> str:
    """The largest N: time over plain autograd, peak memory, network calls, and how exact the gradient is."""
    steps = max(steps for steps, _ in figures.cases)
    wanted = [wants for n, wants in figures.cases if n == steps]
    head = ["method", *(f"{w}: time | {w}: memory" for w in wanted), "network calls", "gradient"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (2 * len(wanted) + 3)]
    for name, shown in _NAMES.items():
        cells = [cell for wants in wanted for cell in _cost(figures, steps, wants, name)]
        runs = [run for wants in wanted for run in figures.repeats(steps, wants, name)]
        if runs:
            calls = "–".join(map(str, sorted({run["calls"] for run in runs})))
            lines.append("| " + " | ".join([shown, *cells, calls, _exactness(runs)]) + " |")
    return f"{_caption(figures, steps, wanted)}\n\n" + "\n".join(lines)


def _caption(figures: Figures, steps: int, wanted: list[str]) -> str:
    machine, settings = figures.data["machine"], figures.data["settings"]
    side = settings["latents"][-1]
    repeats = min(len(figures.repeats(steps, wants, "plain")) for wants in wanted)
    place = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} threads"
    return (
        f"{settings['parameters'] / 1e6:.1f} M-parameter UNet, {side}×{side}×4 latents, batch 1, guidance, "
        f"N = {steps} DDIM steps, on {place}, torch {machine['torch']}. Time is the median over {repeats} interleaved "
        "repeats of the ratio to plain autograd; memory is the peak of live tensors beside the weights; *all* asks for "
        "the gradients of noise, embedding and every weight, *x_T* for the noise's alone."
        + _direct(figures, steps, wanted)
    )


def _direct(figures: Figures, steps: int, wanted: list[str]) -> str:
    """Two rows' ratios to a third do not give the ratio of the two where repeats scatter, so it is said by itself."""
    ratios = [figures.ratio(steps, wants, "exact-min", "checkpoint") for wants in wanted]
    found = [f"{ratio:.2f} ({wants})" for ratio, wants in zip(ratios, wanted, strict=True) if ratio]
    return (
        f' Held directly against per-call checkpointing, `Exact("min")` took {" and ".join(found)} of its time.'
        if found
        else ""
    )


def _cost(figures: Figures, steps: int, wants: str, name: str) -> list[str]:
    ratio, peak = figures.ratio(steps, wants, name, "plain"), figures.peak(steps, wants, name)
    return [f"{ratio:.2f}" if ratio else "–", f"{peak / 1e6:.0f} MB" if peak else "–"]


def _exactness(runs: list[dict[str, object]]) -> str:
    if all(run["bits_equal"] for run in runs):
        return "the same bits"
    errors = [error for run in runs for error in run["relative_error"].values()]  # type: ignore[attr-defined]
    low, high = min(errors), max(errors)
    if high < 1e-3:
        return f"relative error up to {high:.0e}"
    return f"relative error {100 * low:.0f}–{100 * high:.0f} %"


def on_cards(results: Path) -> Iterator[str]:
    """Of each GPU, what whole jobs on real architectures took."""
    for path in sorted(results.glob("gpu-*.json")):
        data = json.loads(path.read_text())
        if not data.get("figures"):
            continue
        machine, picture = data["machine"], path.with_suffix(".png")
        words = (
            f"Real architectures with random weights and a CLIP-sized loss on one {machine['accelerator']}, torch "
            f"{machine['torch']}: time over sampling alone, and the peak of everything on the card."
        )
        lines = [f"| {what} | {value} |" for what, value in data["figures"]]
        rows = "\n".join(["| job | |", "|---|---|", *lines])
        drawn = f"\n\n![{machine['accelerator']}](benchmarks/results/{picture.name})"
        yield f"{words}\n\n{rows}{drawn if picture.exists() else ''}"


def block(results: Path = RESULTS) -> str:
    """All that stands between the README's markers; empty without results."""
    parts = list(on_cards(results))
    main = results / "exact_gradient.json"
    if main.exists():
        parts.append(gradient_table(Figures.read(main)))
    rows = []
    for path in sorted(results.glob("*.json")):
        if path != main and not path.name.startswith("gpu-"):
            rows += [
                f"| {what} | {value} |" for what, value in json.loads(path.read_text()).get("figures", [])
            ]
    rows += [f"| {what} | {value} |" for what, value in beside_peers(results)]
    if rows:
        table = "\n".join(["| measured | |", "|---|---|", *rows])
        parts.append(f"<details>\n<summary>{BESIDES}</summary>\n\n{table}\n\n</details>")
    return "".join(f"{part}\n\n" for part in parts)


def main(arguments: list[str]) -> int:
    """Print the block, or write it."""
    text, wanted = README.read_text(), block()
    if "--write" in arguments:
        README.write_text(rewritten(text, {"figures": wanted}))
        return 0
    print(wanted)
    return int(marked(text, "figures") != wanted)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
