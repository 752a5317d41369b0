"""Settings of the commands: one pydantic model each, filled from ``--config run.yaml`` and from flags.

A field of a model is at once a flag (``num_inference_steps`` is ``--num-inference-steps``), a key of the
YAML file, its default, its help text and its check. Flags win over the file, the file over the defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InputError
from ..suggest import closest


class Bare(BaseModel):
    """Settings of a command: unknown names are errors."""

    #: Heading of these fields in the help.
    panel: ClassVar[str] = "Options"

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Settings(Bare):
    """What every command that runs a pipeline takes."""

    panel: ClassVar[str] = "Model and machine"

    model: str = Field(
        "sd",
        description="Built-in pipeline (sd, flow), a folder, a hub id, or a .safetensors file.",
        json_schema_extra={"complete": ["sd", "flow"]},
    )
    device: str = Field(
        "auto",
        description="Where to compute: auto, cpu, cuda, cuda:1, mps.",
        json_schema_extra={"complete": ["auto", "cpu", "cuda", "mps"]},
    )
    dtype: str = Field(
        "float32",
        pattern="^(float32|float16|bfloat16)$",
        description="Precision of the pipeline: float32, float16 or bfloat16.",
        json_schema_extra={"complete": ["float32", "float16", "bfloat16"]},
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the noise and of everything random: 0 or more.")


C = TypeVar("C", bound=Bare)


def build(kind: type[C], flags: Mapping[str, Any], file: Path | None) -> C:
    """The settings from the flags that were given and the YAML file.

    Raises:
        InputError: When the file is missing or is no mapping, or a field is unknown, wrong or missing; the
            message names the field, where it stands, and the closest valid name.
    """
    from_file = _read(kind, file) if file is not None else {}
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return kind(**{**from_file, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise InputError(_message(kind, first, name, None if name in given else file)) from None


def dump(settings: Bare, path: Path, command: str) -> None:
    """Write the settings as a file that ``--config`` takes; ``out`` is left out, what is unset too."""
    import yaml

    values = settings.model_dump(mode="json", exclude_none=True, exclude={"out"})
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path.write_text(f"# backdrift {command} --config {path.name}\n{text}", encoding="utf-8")


def flag(name: str) -> str:
    """``num_inference_steps`` -> ``--num-inference-steps``."""
    return "--" + name.replace("_", "-")


def _read(kind: type[Bare], file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"The settings file {str(file)!r} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"The settings file {str(file)!r} cannot be read: {why}.") from None
    except yaml.YAMLError as error:
        where = f" at line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""  # type: ignore[attr-defined]
        raise InputError(
            f"The settings file {str(file)!r} is not YAML{where}: {getattr(error, 'problem', error)}."
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(
            f"The settings file {str(file)!r} must hold `name: value` lines, not a {type(content).__name__}."
        )
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name in values:
        if name not in kind.model_fields:
            fields = ", ".join(kind.model_fields)
            raise InputError(
                f"The settings file {str(file)!r} has an unknown field {name!r}."
                f"{closest(name, kind.model_fields)} The fields are: {fields}."
            )
    return values


def _message(kind: type[Bare], error: Any, name: str, file: Path | None) -> str:
    field = kind.model_fields.get(name)
    about = f" ({field.description.rstrip('.')})" if field is not None and field.description else ""
    if error["type"] == "missing":
        shown = name.upper() if (field and _extra(field).get("argument")) else flag(name)
        return f"{shown} is missing{about}. Give it on the command line or as `{name}:` in the settings file."
    where = f"The field {name!r} of the settings file {str(file)!r}" if file is not None else flag(name)
    return f"{where} is {error['input']!r}: {_reason(error)}{about}."


def _reason(error: Any) -> str:
    """pydantic's message in the words of a person at a command line."""
    kind, context = error["type"], error.get("ctx") or {}
    limits = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
    if kind in limits:
        words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
        return f"it must be {words[limits[kind]]} {context[limits[kind]]}"
    if kind == "finite_number":
        return "it must be a finite number"
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return "it must be a whole number"
    if kind in ("float_parsing", "float_type"):
        return "it must be a number"
    choices = re.fullmatch(r"\^\(([\w|-]+)\)\$", context.get("pattern", ""))
    if kind == "string_pattern_mismatch" and choices:
        names = choices[1].split("|")
        return f"it must be one of {', '.join(names)}.{closest(error['input'], names)}"
    return str(error["msg"]).removeprefix("Value error, ")


def _extra(field: Any) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}
