"""``backdrift info``: what is installed, or what a model consists of."""

from __future__ import annotations

from typing import Any, ClassVar

import typer
from pydantic import Field

from .command import command
from .config import Settings
from .pipeline import devices, open_pipeline


class InfoSettings(Settings):
    """Settings of ``info``."""

    panel: ClassVar[str] = "Options"

    model: str = Field(
        "", description="Describe this model instead of the installation.",
        json_schema_extra={"complete": ["sd", "flow"]},
    )  # fmt: skip


def info(settings: InfoSettings) -> None:
    """Show versions, devices, built-in assets and losses; or, with --model, the parts of a model."""
    if settings.model:
        _model(open_pipeline(settings), settings.model)
    else:
        _installation()


def _installation() -> None:
    from ..losses import kinds
    from ..pipelines import assets
    from ..report.figures import size
    from ..run import versions

    _table("Versions", ["package", "version"], [[k, v] for k, v in versions().items()])
    _table("Devices", ["device", "memory"], [[name, _memory(name)] for name in devices()])
    rows = []
    for folder in sorted(p for p in assets.ASSETS.iterdir() if p.is_dir()) if assets.ASSETS.is_dir() else []:
        total = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        rows.append([folder.name, size(total), *_card(folder.name)])
    _table("Built-in assets", ["name", "size", "what", "measured quality"], rows)
    losses = [
        [name, kind.argument, (kind.__doc__ or "").strip().splitlines()[0].replace("``", "")]
        for name, kind in kinds().items()
    ]
    _table("Losses", ["name", "argument after the colon", "value"], losses)


def _card(name: str) -> tuple[str, str]:
    """Title and measured quality from an asset's card."""
    from ..errors import InputError
    from ..pipelines import assets

    try:
        lines = assets.card(name).splitlines()
    except (OSError, InputError):
        return "", ""
    title = next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")
    quality = [
        line.strip("-*| ").replace("|", ":") for line in _section(lines, "quality") if line.strip("-| ")
    ]
    return title, "\n".join(quality)


def _section(lines: list[str], word: str) -> list[str]:
    """The list items and table rows below the heading that contains ``word``."""
    inside, found = False, []
    for line in lines:
        if line.startswith("#"):
            inside = word in line.lower()
        elif inside and line.startswith(("-", "*", "|")):
            found.append(line)
    return found


def _model(pipe: Any, name: str) -> None:
    import torch

    from ..descent.subject import denoiser, picture_size
    from ..pipelines.load import latent_shape
    from ..report.figures import number

    rows = []
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            count = sum(p.numel() for p in module.parameters())
            rows.append(
                [part, type(module).__name__, number(count), str(module.dtype).removeprefix("torch.")]
            )
        elif module is not None:
            rows.append([part, type(module).__name__, "", ""])
    _table(f"{name}: {type(pipe).__name__}", ["component", "class", "parameters", "dtype"], rows)
    height, width = picture_size(pipe, None, None)
    config = pipe.scheduler.config
    flow = "flow_prediction" if "Flow" in type(pipe.scheduler).__name__ else "epsilon"
    facts = [
        ["denoising network", denoiser(pipe)[0]],
        ["scheduler", type(pipe.scheduler).__name__],
        ["prediction type", str(config.get("prediction_type") or flow)],
        ["picture", f"{width}x{height} pixels (width x height)"],
        ["latent shape", "x".join(map(str, latent_shape(pipe, height=height, width=width)))],
        ["prompt tokens", str(getattr(getattr(pipe, "tokenizer", None), "model_max_length", "unknown"))],
    ]
    _table("Sampling", ["", ""], facts)


def _memory(name: str) -> str:
    import os

    import torch

    from ..report.figures import size

    if name.startswith("cuda"):
        properties = torch.cuda.get_device_properties(name)
        return f"{size(properties.total_memory)}, {properties.name}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"{size(total)}, threads: {torch.get_num_threads()}"
    return ""


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)


def add_to(app: typer.Typer) -> None:
    command(app, InfoSettings, "backdrift info", "backdrift info --model sd")(info)
