"""From a model of settings to a typer command: the flags, their help, their completion, and ``--config``."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .config import Bare, _extra, build, flag
from .errors import reported
from .folders import check_writable

C = TypeVar("C", bound=Bare)


def command(
    app: typer.Typer, kind: type[C], *examples: str
) -> Callable[[Callable[[C], None]], Callable[[C], None]]:
    """Decorator: make ``f(settings)`` a command of ``app``, with a flag for each field of ``kind``.

    Args:
        examples: whole commands, shown at the end of the help.
    """
    # a paragraph is a line of the help; square brackets would be read as markup
    shown = "\n\n".join(["Examples:" if len(examples) > 1 else "Example:", *examples]) if examples else None

    def add(function: Callable[[C], None]) -> Callable[[C], None]:
        def invoked(**values: Any) -> None:
            file = values.pop("config", None)
            with reported():
                settings = build(kind, {k: v for k, v in values.items() if v != []}, file)
                if "out" in kind.model_fields:  # what cannot be written costs no time
                    check_writable(getattr(settings, "out", None) or Path("runs"))
                function(settings)

        # a command's own settings first, then those it shares
        fields = sorted(kind.model_fields.items(), key=lambda item: -len(_owner(kind, item[0]).__mro__))
        parameters = [_parameter(name, field, _owner(kind, name).panel) for name, field in fields]
        parameters.append(
            _keyword("config", Path, typer.Option(help="Settings file (YAML); flags win over it."))
        )
        invoked.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        invoked.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name=function.__name__.rstrip("_"), help=inspect.getdoc(function), epilog=shown)(invoked)
        return function

    return add


def _parameter(name: str, field: Any, panel: str) -> inspect.Parameter:
    extra = _extra(field)
    annotation = _without_none(field.annotation)
    help_text = field.description or ""
    if extra.get("argument"):
        info: Any = typer.Argument(
            help=help_text, show_default=False, metavar=extra.get("metavar", name.upper())
        )
        return _keyword(name, annotation, info)
    shown = extra.get("default", _shown(field))
    declarations = [extra.get("flag", flag(name)), *extra.get("short", [])]
    if annotation is bool and "flag" not in extra:
        declarations = [f"{flag(name)}/--no-{name.replace('_', '-')}"]
    info = typer.Option(
        *declarations,
        help=help_text + (f" (default: {shown})" if shown else ""),
        show_default=False,
        metavar=extra.get("metavar"),
        rich_help_panel=panel,
        autocompletion=_completion(extra["complete"]) if "complete" in extra else None,
    )
    return _keyword(name, annotation, info)


def _keyword(name: str, annotation: Any, info: Any) -> inspect.Parameter:
    # the default is None so that a flag that was not given can be told from one that was
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, info]
    )


def _owner(kind: type[Bare], name: str) -> type[Bare]:
    """The most derived class that declares the field."""
    return next(c for c in kind.__mro__ if name in inspect.get_annotations(c))


def _completion(choices: Any) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        names = _loss_names() if choices == "losses" else choices
        return [name for name in names if name.startswith(incomplete)]

    return complete


def _loss_names() -> list[str]:
    from ..losses import kinds

    return list(kinds())


def _shown(field: Any) -> str:
    if field.is_required() or field.default is None:
        return ""
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return ", ".join(map(str, field.default)) if isinstance(field.default, list) else str(field.default)


def _without_none(annotation: Any) -> Any:
    """``list[str]`` of ``Annotated[list[str], ...] | None``: what typer is to parse."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation
