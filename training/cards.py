"""The cards of the built-in assets, every figure measured here and now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

import backdrift as bd
from backdrift.losses import Preference
from backdrift.losses.digit_kinds import load_kinds
from backdrift.pipelines.assets import ASSETS, load_classifier, load_clip, load_digits_denoiser

from .classifier import measure as measure_classifier
from .clip import retrieval
from .digits import measure as measure_digits
from .kinds import figures as measure_kinds
from .loop import TIMES, trained_minutes
from .preference import figures as measure_preference
from .quality import SETTINGS
from .quality import measure as measure_pipeline
from .vae import psnr

DATA = """\
Pictures of 64×64 pixels, drawn by `training/scenes.py`: one or two real handwritten digits from scikit-learn's
`load_digits` (the UCI "Optical Recognition of Handwritten Digits" test set, CC BY 4.0) in a named colour on a named
background, with an effect on three in ten. Backgrounds are flat colours or crops of photographs: `grass`, `brick`,
`gravel` (CC0, tinted here) and `chelsea` (CC0) and `hubble_deep_field` (NASA, public domain) from scikit-image,
`flower` (dany13, CC BY 2.0) from scikit-learn. A fifth of the digits and of each photograph is held out."""
PIXELS = """\
scikit-learn's `load_digits` as it is (the UCI "Optical Recognition of Handwritten Digits" test set, CC BY 4.0): 8×8
pixels of one channel, 17 shades, of which every fifth picture is held out. States are -1 on paper and 1 in full ink."""
PAIRS = """\


At every step four pictures of each of 48 new captions, in different handwriting, each lit, coloured, contrasted,
blurred and made grainy at random; any two pictures of a caption are a pair. The choice in a pair is drawn by a stated
rule, in `training/preference.py`: a picture is liked for being well lit, colourful, rich in contrast and crisp, each
worth up to one point, and a tenth of a point more is preferred in 73 % of pairs (Bradley and Terry's model, which is
also the loss). No person was asked. The network sees pixels only: no caption, nothing of CLIP or the classifier."""
KINDS = """\


One digit in a picture, without an effect; here the digits are split otherwise: in turn within each kind, into one half
to learn from and one held out (a writer may be in both). Captions name none of these kinds. They were found by looking
at the digits, and a real digit is labelled by a stated rule on its 8×8 pixels, in `training/kinds.py`: a foot is ink at
the left and right of the two lowest rows, a seven is plain where no middle row has the ink of a bar. The pipelines make
both: of 60 times "a red one on white" 8 have a foot, of 60 times "a blue seven on white" 2 are plain, by the judge
below."""
EARLIER = (
    " CLIP and the first round of the autoencoder and of the denoisers saw dimmer night skies and a darker `dark` "
    "(0.35 of the light, now 0.45); later rounds and the figures below are on the scenes as they are drawn now."
)
PARTS = {
    "sd": ("Stable-Diffusion-type pipeline", ("vae", "text", "unet"), "vae text unet export cards"),
    "flow": ("Stable-Diffusion-3-type pipeline", ("vae", "text", "flow"), "vae text flow export cards"),
    "clip": ("CLIP", ("text", "vision"), "text vision export cards"),
    "classifier": ("Classifier of digit, colour and background", ("classifier",), "classifier export cards"),
    "digits": ("Pixel model of 8×8 digits, VP, continuous time", ("digits",), "digits export cards"),
    "preference": (
        "Preference model of rendered pictures",
        ("preference",),
        "preference export cards",
    ),
    "kinds": ("Classifier of kinds of digits that captions do not name", ("kinds",), "kinds export cards"),
}
MORE = {"preference": PAIRS, "kinds": KINDS}


def parameters(folder: Path) -> dict[str, int]:
    """Number of parameters in each safetensors file of a folder."""
    out = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as f:
            name = path.parent.name if path.parent != folder else path.stem
            count = 0
            for key in f.keys():  # noqa: SIM118
                size = 1
                for n in f.get_slice(key).get_shape():
                    size *= n
                count += size
            out[name] = count
    return out


def figures(name: str) -> dict[str, Any]:
    """The measured quality of an asset."""
    if name == "classifier":
        found = measure_classifier(load_classifier())
        return {f"accuracy on held-out digits: {k}": f"{v:.1%}" for k, v in found.items()}
    if name == "digits":
        return measure_digits(load_digits_denoiser())
    if name == "preference":
        return measure_preference(Preference())
    if name == "kinds":
        return measure_kinds(load_kinds().network)
    if name == "clip":
        clip, tokenizer = load_clip()
        return {"right caption found among 100, held-out pictures": f"{retrieval(clip, tokenizer):.1%}"}
    found = measure_pipeline(name, folder=Path(__file__).parent / "measured")
    vae = bd.load(name).vae
    settings = SETTINGS[name]
    head = f"500 random captions, {settings['num_inference_steps']} steps, guidance {settings['guidance_scale']}: "
    return {
        **{f"{head}{k}, as named": f"{v:.1%}" for k, v in found.items()},
        "autoencoder, held-out pictures on flat backgrounds": f"{psnr(vae, flat=True):.1f} dB PSNR",
        "autoencoder, held-out pictures on photographs": f"{psnr(vae, flat=False):.1f} dB PSNR",
    }


def write_card(name: str) -> None:
    """Measure an asset and write its card."""
    title, parts, command = PARTS[name]
    folder = ASSETS / name
    # "unet" and its further rounds "unet1", … are one part.
    minutes = {p: sum(m for n, m in trained_minutes().items() if n.rstrip("0123456789") == p) for p in parts}
    trained = ", ".join(f"{p} {m:.0f} min" for p, m in minutes.items())
    lines = [
        f"# {title} (built in)",
        "",
        "A self-test model: small, trained from scratch by this repository, meant for trying and testing backdrift.",
        "",
        "## Data",
        PIXELS if name == "digits" else DATA + MORE.get(name, ""),
        "",
        "## Parameters",
        *(f"- {k}: {v:,}" for k, v in parameters(folder).items()),
        "",
        "## Training",
        f"`python -m training {command}` from the repository's root. Time on a CPU, one core each, beside other "
        f"work: {trained}.{EARLIER if name in ('sd', 'flow', 'clip') else ''}",
        "",
        "## Measured quality (`python -m training cards`)",
        *(f"- {k}: {v}" for k, v in figures(name).items()),
        "",
        "## Licence",
        "Weights: Apache-2.0, like the package. Data: as above.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def write_cards() -> None:
    """Write the card of every exported asset."""
    TIMES.write_text(json.dumps(trained_minutes(), indent=2, sort_keys=True) + "\n")
    for name in PARTS:
        if (ASSETS / name).is_dir():
            write_card(name)
            print(f"card of {name} written")
