"""``backdrift stylize``: fine-tune a pipeline to the style of one picture."""

from __future__ import annotations

from typing import ClassVar

import typer
from pydantic import Field

from ..errors import InputError
from .command import command
from .fields import BUILT_IN, Descending, Strings
from .finish import finish
from .pipeline import open_pipeline

BUILT_IN_LR, BUILT_IN_LORA_LR = 2e-3, 5e-3


class StylizeSettings(Descending):
    """Settings of ``stylize``."""

    panel: ClassVar[str] = "Options"

    reference: str = Field(
        description="The picture whose style is to be taken: a file, or a photograph of scikit-image: skimage/ihc.",
        json_schema_extra={"argument": True, "metavar": "REFERENCE"},
    )
    prompt: Strings | None = Field(
        None,
        description="Prompts to train on (default: ten of digits for the built-in pipelines, else the paper's ten).",
        json_schema_extra={"argument": True, "metavar": "[PROMPT]..."},
    )
    noises: int = Field(10, ge=1, description="Pictures of each prompt that are trained on.")
    style_weight: float = Field(1.0, gt=0, description="Weight of the style.")
    content_weight: float = Field(0.3, ge=0, description="Weight of the content: more keeps more.")
    network: str = Field(
        "built-in:clip",
        description="Whose features tell style and content: built-in:clip, built-in:classifier, vgg19 or vgg19:FILE, "
        "or a CLIP's folder or hub id.",
        json_schema_extra={"complete": ["built-in:clip", "built-in:classifier", "vgg19"]},
    )
    style_layers: Strings | None = Field(
        None,
        description="Layers for the style: numbers of blocks, or VGG-19's names.",
        json_schema_extra={"default": "blocks 1 to 3; relu1_1 to relu5_1"},
    )
    content_layers: Strings | None = Field(
        None,
        description="Layers for the content.",
        json_schema_extra={"default": "a late block; relu4_2"},
    )
    over: Strings = Field(
        ["cross-attention"],
        description="What to train: cross-attention, lora, a component (unet), or patterns of weights.",
        json_schema_extra={"complete": ["cross-attention", "lora", "unet", "transformer"]},
    )
    rank: int | None = Field(None, ge=1, description="Rank of a new LoRA, with --over lora.")
    unseen_prompts: Strings | None = Field(
        None,
        description="Prompts to show at the end that are not trained on.",
        json_schema_extra={"default": "for the built-in pipelines eight of digits"},
    )
    shown: int = Field(8, ge=1, description="Pictures in each row of the page.")
    num_inference_steps: int = Field(12, ge=1, description="Steps of the sampler.")
    epochs: int = Field(8, ge=1, description="How often each picture is trained on.")
    steps: int | None = Field(  # type: ignore[assignment]
        None,
        ge=0,
        description="Updates, in place of the epochs.",
        json_schema_extra={"default": "by --epochs"},
    )
    minibatch: int = Field(10, ge=1, description="Pictures per update.")
    lr: float | None = Field(
        None,
        gt=0,
        description="Learning rate.",
        json_schema_extra={
            "default": f"weights 1e-4, lora 1e-3; for the built-in pipelines {BUILT_IN_LR:g}, {BUILT_IN_LORA_LR:g}"
        },
    )
    checkpoint_every: int = Field(10, ge=1, description="Updates between checkpoints.")


def stylize(settings: StylizeSettings) -> None:
    """Fine-tune a pipeline until what it makes is in the style of one picture, and still shows what it showed.

    Leaves the weights as a file that diffusers loads, and a page with pictures before and after.
    """
    from ..recipes.references import open_reference
    from ..recipes.stylize import stylize as run_it
    from ..recipes.stylize_prompts import DIGITS, OTHER_DIGITS, PAPER
    from ..recipes.stylize_weights import variable_for
    from ..through import Through

    built_in = settings.model in BUILT_IN
    over = settings.over[0] if len(settings.over) == 1 else settings.over
    # Before the pipeline is loaded: a bad name costs no time.
    Through.parse(settings.through)
    variable_for(over, settings.rank)
    open_reference(settings.reference)
    style_layers, content_layers = _layers(settings.style_layers), _layers(settings.content_layers)
    prompts = settings.prompt or list(DIGITS if built_in else PAPER)
    unseen = settings.unseen_prompts
    if unseen is None:
        unseen = list(OTHER_DIGITS) if built_in and not settings.prompt else []
    lr = settings.lr
    if lr is None and built_in:
        lr = BUILT_IN_LORA_LR if over == "lora" else BUILT_IN_LR
    pipe = open_pipeline(settings)
    names = ("noises", "style_weight", "content_weight", "network", "rank", "shown", "epochs")
    run = run_it(
        pipe,
        settings.reference,
        prompts,
        over=over,
        style_layers=style_layers,
        content_layers=content_layers,
        unseen_prompts=unseen,
        guidance_scale=settings.guidance,
        **settings.descent() | {"lr": lr} | {name: getattr(settings, name) for name in names},
    )
    for name, value in run.record["figures"].items():
        if name.startswith("style, "):
            typer.echo(f"{name} {value:.3g}")
    finish(run, settings, "stylize")


def _layers(given: list[str] | None) -> list[str] | None:
    """``["1,2"]`` and ``["1", "2"]`` alike.

    Raises:
        InputError: a name is empty.
    """
    if given is None:
        return None
    layers = [name.strip() for text in given for name in text.split(",")]
    if not all(layers):
        raise InputError(f"Layers are names or numbers with commas between them, got {given!r}.")
    return layers


def add_to(app: typer.Typer) -> None:
    command(
        app, StylizeSettings,
        "backdrift stylize skimage/ihc",
        'backdrift stylize starry-night.jpg "a cat" "a house" --model path/to/sd --network vgg19 --over lora --rank 8',
    )(stylize)  # fmt: skip
