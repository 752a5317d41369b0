"""Does a style learnt from one picture reach noises, prompts and samplers that were not trained on, and at what price?

    python -m benchmarks.stylize            # measure what is missing; goes on where it was stopped
    python -m benchmarks.stylize --write    # and write docs/stylize.md's table and its pictures

For each reference the built-in pipeline is fine-tuned by ``bd.stylize`` (cross-attention; a LoRA), and, for as many
seconds as the former took, by the ordinary diffusion loss on the reference itself (DreamBooth without prior
preservation, Ruiz et al. 2023): every weight of the UNet on one picture, told by a word that the model does not know,
which is then added to each prompt. The judges were in no loss of either: Gram matrices of the *classifier's* features,
and whether the classifier still reads the digit. The CLIP score is by the CLIP whose middle blocks were in the loss.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

import backdrift as bd
from backdrift.losses import load_classifier, load_picture, prepare
from backdrift.recipes.judges import Judge, clip_score, open_clip, read_as, style_of
from backdrift.recipes.stylize_prompts import DIGITS as PROMPTS
from backdrift.recipes.stylize_prompts import OTHER_DIGITS as UNSEEN

from .marked import rewritten
from .measure import machine
from .record import Record

RESULTS = Path(__file__).parent / "results" / "stylize.json"
PAGE = Path(__file__).parent.parent / "docs" / "stylize.md"
IMAGES = PAGE.parent / "images"
RUNS = Path("runs/stylize")

REFERENCES = ("skimage/ihc", "sklearn/china")
CALL: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 3.0}
NOISES, EPOCHS, SEED = 4, 6, 0
#: Settled on skimage/ihc with another seed, by the same judges; the other reference was not looked at.
HOW: dict[str, dict[str, Any]] = {
    "cross-attention": {"over": "cross-attention", "lr": 2e-3},
    "LoRA, rank 8": {"over": "lora", "rank": 8, "lr": 5e-3},
}
WORD = "zwx"
BASELINE_LR, BASELINE_BATCH = 5e-5, 8
#: Too low a rate would flatter us: ten times as fast as well.
BASELINES = {"one picture": BASELINE_LR, "one picture, ten times the rate": 10 * BASELINE_LR}
#: Parts of the time after which the baseline is judged: longer need not be better.
MOMENTS = {1 / 16: "a sixteenth of the time", 1 / 4: "a quarter of the time", 1.0: "the same time"}
PICTURES = 32
SAMPLERS: dict[str, dict[str, Any]] = {
    "DDPM, 25 steps": {"scheduler": "DDPMScheduler", "num_inference_steps": 25},
    "Euler ancestral, 25 steps": {"scheduler": "EulerAncestralDiscreteScheduler", "num_inference_steps": 25},
}
SCORES = ("style, classifier", "digit as named", "CLIP score")


@dataclass(frozen=True)
class Set:
    """Prompts and the seed of the noises that are judged on."""

    name: str
    prompts: tuple[str, ...]
    seed: int

    def all(self) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(PICTURES)]


SETS = (Set("unseen noises", PROMPTS, 50_001), Set("unseen prompts", UNSEEN, 50_002))


@cache
def classifier() -> Any:
    return load_classifier()


@cache
def style_judge(reference: str) -> Judge:
    return style_of(load_picture(reference), "built-in:classifier", 2, "style, classifier")


@cache
def clip_judge() -> Judge:
    return clip_score(open_clip(None))


def digit_right(image: Tensor, prompt: str) -> float:
    wanted = classifier().find(prompt)["digit"]
    return float(read_as(classifier(), {"digit": wanted}, "digit").score(image[None], [prompt]))


@torch.no_grad()
def scores(reference: str, images: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
    """Each picture's, by all judges."""
    seen = images.float().clamp(0, 1)
    return {
        SCORES[0]: style_judge(reference).score(seen, prompts).tolist(),
        SCORES[1]: [digit_right(image, prompt) for image, prompt in zip(seen, prompts, strict=True)],
        SCORES[2]: clip_judge().score(seen, prompts).tolist(),
    }


@torch.no_grad()
def made(pipe: Any, prompts: Sequence[str], seed: int, word: str = "", **call: Any) -> Tensor:
    """The pipeline's own pictures of prompts, (n, 3, 64, 64)."""
    noise = bd.noise(pipe, seed=seed, batch_size=len(prompts))
    told = [f"{prompt}, {word}" if word else prompt for prompt in prompts]
    parts = []
    for begin in range(0, len(told), 20):
        batch = slice(begin, begin + 20)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(told))[batch]]
        parts.append(
            pipe(
                told[batch], latents=noise[batch], generator=generators, output_type="pt", **{**CALL, **call}
            ).images
        )
    return torch.cat(parts)


def judged(reference: str, pipe: Any, word: str = "", sampler: str = "") -> dict[str, Any]:
    """What the judges say of both sets of pictures."""
    own, how = pipe.scheduler, dict(SAMPLERS.get(sampler, {}))
    if how:
        import diffusers

        pipe.scheduler = getattr(diffusers, how.pop("scheduler")).from_config(own.config)
    try:
        return {s.name: scores(reference, made(pipe, s.all(), s.seed, word, **how), s.all()) for s in SETS}
    finally:
        pipe.scheduler = own


def stylized(reference: str, way: str) -> tuple[Any, bd.Run, float]:
    """A pipeline with the weights that ``bd.stylize`` found, loaded by diffusers' own means; the run; its seconds.

    Seconds are the processor's, of one thread, so that other work beside does not count.
    """
    began = time.process_time()
    out = RUNS / f"{Path(reference).name}-{HOW[way]['over']}"
    run = bd.stylize(
        bd.load(), reference, PROMPTS, noises=NOISES, epochs=EPOCHS, unseen_prompts=UNSEEN, seed=SEED, out=out,
        **HOW[way], **CALL,
    )  # fmt: skip
    spent = run.folder / "seconds.txt"
    if not spent.exists():
        spent.write_text(str(time.process_time() - began))
    pipe = bd.load()
    if HOW[way]["over"] == "lora":
        pipe.load_lora_weights(str(run.folder / "lora"))
    else:
        pipe.unet.load_state_dict(load_file(run.folder / "weights" / "unet.safetensors"), strict=False)
    return pipe, run, float(spent.read_text())


def dreambooth(
    reference: str, seconds: float, lr: float, seed: int = SEED
) -> Iterator[tuple[float, int, Any]]:
    """Fine-tune every weight of the UNet on the picture; yields (part of the time, updates, pipeline) now and then."""
    from diffusers import DDPMScheduler

    pipe = bd.load()
    noising, draw = DDPMScheduler.from_config(pipe.scheduler.config), torch.Generator().manual_seed(seed)
    half = torch.full((3,), 0.5)
    with torch.no_grad():
        picture = prepare(load_picture(reference)[None], 64, half, half)
        spread = pipe.vae.encode(picture).latent_dist
        told = pipe.encode_prompt([WORD], "cpu", 1, False)[0].expand(BASELINE_BATCH, -1, -1)
    pipe.unet.requires_grad_(True)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=lr)
    spent, updates, moments = 0.0, 0, list(MOMENTS)
    while moments:
        began = time.process_time()
        with torch.no_grad():
            clean = (
                torch.cat([spread.sample(draw) for _ in range(BASELINE_BATCH)])
                * pipe.vae.config.scaling_factor
            )
            noise = torch.randn(clean.shape, generator=draw)
            times = torch.randint(noising.config.num_train_timesteps, (BASELINE_BATCH,), generator=draw)
            noisy = noising.add_noise(clean, noise, times)
        loss = (pipe.unet(noisy, times, told).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent, updates = spent + time.process_time() - began, updates + 1
        while moments and spent >= moments[0] * seconds:
            yield moments.pop(0), updates, pipe


def measure(record: Record) -> None:
    """Every cell that the record does not have."""
    for reference in REFERENCES:
        plain = bd.load()
        for sampler in ("", *SAMPLERS):
            record.ensure(
                "cells", {"reference": reference, "way": "original", "sampler": sampler},
                lambda r=reference, p=plain, s=sampler: {"scores": judged(r, p, sampler=s)},
            )  # fmt: skip
        seconds = 0.0
        for way in HOW:
            pipe, run, took = stylized(reference, way)
            seconds = seconds or took
            for sampler in ("", *SAMPLERS) if way == "cross-attention" else ("",):
                keys = {"reference": reference, "way": way, "sampler": sampler}
                record.ensure(
                    "cells", keys,
                    lambda r=reference, p=pipe, s=sampler, run=run, took=took: {
                        "seconds": took, "figures": run.record["figures"],
                        "scores": judged(r, p, sampler=s),
                    },
                )  # fmt: skip
        for way, lr in BASELINES.items():
            record_baseline(record, reference, way, lr, seconds)


def record_baseline(record: Record, reference: str, way: str, lr: float, seconds: float) -> None:
    """The baseline's cells, all of them or none: it does not go on where it was stopped."""
    keys = {"reference": reference, "way": way, "sampler": ""}
    if record.find("cells", **keys):
        return
    cells = [
        {"part": part, "seconds": part * seconds, "updates": n, "scores": judged(reference, pipe, WORD)}
        for part, n, pipe in dreambooth(reference, seconds, lr)
    ]
    for cell in cells:
        record.add("cells", **keys, **cell)


# -- what is said of it -------------------------------------------------------------------------------------


def cell(
    record: Record, way: str, score: str, group: str, sampler: str = "", part: float | None = None
) -> list[float]:
    """Every picture's score, over all references."""
    keys = {"way": way, "sampler": sampler} | ({} if part is None else {"part": part})
    return [v for found in record.find("cells", **keys) for v in found["scores"][group][score]]


def spread(values: Sequence[float]) -> str:
    """Mean and standard error over the pictures."""
    error = stdev(values) / len(values) ** 0.5
    return f"{mean(values):.2f} ± {error:.2f}" if mean(values) < 10 else f"{mean(values):.1f} ± {error:.1f}"


def share(values: Sequence[float]) -> str:
    """The same of what is 0 or 1."""
    return f"{mean(values):.0%} ± {stdev(values) / len(values) ** 0.5:.0%}"


def rows(record: Record) -> list[tuple[str, str, str, float | None]]:
    """(what it is called, way, sampler, part) of every line of the table."""
    found: list[tuple[str, str, str, float | None]] = [("original weights", "original", "", None)]
    found += [(f"`bd.stylize`, {way}", way, "", None) for way in HOW]
    for name, lr in BASELINES.items():
        found += [
            (f"diffusion loss on the reference, rate {lr:g}, {time}", name, "", part)
            for part, time in MOMENTS.items()
        ]
    for sampler in SAMPLERS:
        found += [(f"original weights, {sampler}", "original", sampler, None)]
        found += [(f"`bd.stylize`, cross-attention, {sampler}", "cross-attention", sampler, None)]
    return found


def table(record: Record) -> str:
    """The page's table."""
    lines = [
        "| | unseen noises: style ↓ | digit right | CLIP score "
        "| unseen prompts: style ↓ | digit right | CLIP score |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, way, sampler, part in rows(record):
        cells = []
        for s in SETS:
            of = [cell(record, way, score, s.name, sampler, part) for score in SCORES]
            cells += [spread(of[0]), share(of[1]), spread(of[2])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures(record: Record) -> list[list[str]]:
    """The README's rows."""

    def said(way: str, part: float | None = None) -> str:
        parts = [
            f"{share(cell(record, way, SCORES[1], s.name, part=part))} of digits right, style "
            f"{mean(cell(record, way, SCORES[0], s.name, part=part)):.2f} on {s.name}"
            for s in SETS
        ]
        return "; ".join(parts)

    what = f"stylisation from one picture ({len(REFERENCES)} references; style ↓ by a network in no loss)"
    return [
        [f"{what}: original weights", said("original")],
        *([f"{what}: `stylize`, {way}", said(way)] for way in HOW),
        *(
            [f"{what}: the diffusion loss on the picture, rate {lr:g}, as many seconds", said(way, 1.0)]
            for way, lr in BASELINES.items()
        ),
    ]


def drawn(record: Record) -> None:
    """Originals and stylised pictures of unseen noises and prompts for each reference, from the runs' folders."""
    from backdrift.pictures import to_pil
    from backdrift.recipes.references import centre

    for reference in REFERENCES:
        name = Path(reference).name
        groups = [bd.Run.load(RUNS / f"{name}-{how['over']}").tensors("pictures") for how in HOW.values()]
        strips = []
        for group in ("unseen noises", "unseen prompts"):
            strips.append([groups[0][f"{group}: before"], *(found[f"{group}: after"] for found in groups)])
        grid = torch.cat([torch.cat([_row(images) for images in strip], 1) for strip in strips], 1)
        side = grid.shape[1]
        shown = centre(load_picture(reference), side)
        shown = torch.nn.functional.pad(shown, (0, 8, 0, side - shown.shape[1]), value=1.0)
        to_pil(torch.cat([shown, grid], 2)).save(IMAGES / f"stylize-{name}.png")


def _row(images: Tensor, gap: int = 2) -> Tensor:
    wide = torch.nn.functional.pad(images.clamp(0, 1), (0, gap, 0, gap), value=1.0)
    return torch.cat(list(wide), 2)


def main(
    out: Annotated[Path, typer.Option(help="The results file.")] = RESULTS,
    write: Annotated[bool, typer.Option("--write", help="Write the page's table and pictures.")] = False,
) -> None:
    """Measure, print, and write if asked."""
    torch.set_num_threads(1)
    settings = {
        "references": list(REFERENCES),
        "prompts": list(PROMPTS),
        "unseen": list(UNSEEN),
        "noises": NOISES,
        "epochs": EPOCHS,
        "how": HOW,
        "baseline": [WORD, BASELINE_LR, BASELINE_BATCH],
        "pictures": PICTURES,
        "samplers": SAMPLERS,
        **CALL,
    }
    about = machine(torch.device("cpu"))
    keep = {key: about[key] for key in ("processor", "threads", "python", "torch")}
    record = Record(out, keep, settings, "cells")
    measure(record)
    record.note("figures", figures(record))
    print(table(record))
    if write:
        PAGE.write_text(rewritten(PAGE.read_text(), {"measured": table(record)}))
        drawn(record)


if __name__ == "__main__":
    typer.run(main)
