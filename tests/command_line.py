"""Calls of the command line, and what a refusal looks like."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from backdrift.cli import app
from backdrift.cli.errors import BAD_INPUT

STEPS = ("--num-inference-steps", "2", "--steps", "2", "--no-progress")


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def refused(result: Result, *words: str, code: int = BAD_INPUT) -> None:
    """One message on stderr with these words, no traceback, the exit code."""
    assert result.exit_code == code, result.output
    assert result.stderr.count("Error") == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr, result.stderr
