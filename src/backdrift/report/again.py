"""How to do a run again: the command with its settings file, or the same as Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The settings file that the command line leaves in a run's folder.
CONFIG = "run.yaml"

#: Settings of a record that are arguments of ``bd.optimize``, in its order.
_ARGUMENTS = (
    "over",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "steps",
    "batch_size",
    "rank",
    "optimizer",
    "optimizer_kwargs",
    "lr",
    "lr_schedule",
    "clip_grad",
    "noise_prior",
    "heldout",
    "heldout_prompts",
    "patience",
    "enough",
    "minibatch",
    "chunk",
    "memory",
    "clamp",
)


def again(folder: Path, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Blocks of text to copy, ``[{"title": …, "text": …}]``; empty when nothing is known for certain."""
    config = folder / CONFIG
    if config.is_file():
        kind = str(record.get("kind", "optimize")).replace("guide-", "guide ", 1)
        return [
            {"title": "On the command line", "text": f"backdrift {kind} --config {CONFIG} --out again"},
            {"title": CONFIG, "text": config.read_text(encoding="utf-8").strip()},
        ]
    settings = record.get("settings") or {}
    if record.get("kind") == "optimize" and isinstance(settings.get("loss"), str):
        return [{"title": "In Python", "text": _python(record, settings)}]
    return []


def _python(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The call of ``bd.optimize``; what its defaults leave out (``None``) is left out."""
    pipeline = settings.get("pipeline") or {}
    prompts = list(record.get("prompt") or [""])[:: int(settings.get("batch_size") or 1)]
    prompt = prompts[0] if len(prompts) == 1 else prompts
    given = {name: settings[name] for name in _ARGUMENTS if settings.get(name) is not None}
    given["seed"] = record.get("seed", 0)
    lines = [f"    {name}={value!r}," for name, value in given.items()]
    return "\n".join(
        [
            "import backdrift as bd",
            "",
            f"pipe = bd.load()  # or the {pipeline.get('class', 'pipeline')} that was used",
            "run = bd.optimize(",
            "    pipe,",
            f"    {prompt!r},",
            f"    {settings['loss']!r},",
            *lines,
            ")",
        ]
    )
