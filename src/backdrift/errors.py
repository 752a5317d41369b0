"""The errors that backdrift raises on purpose: each names what was given, what is allowed and what to do."""

from __future__ import annotations


class BackdriftError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback."""


class InputError(BackdriftError, ValueError):
    """An argument has a value, shape or type that cannot be used."""


class BudgetError(BackdriftError, ValueError):
    """A memory budget is malformed or too small for the job."""


class NonFiniteError(BackdriftError, ArithmeticError):
    """A NaN or an infinity appeared; the message names the step and the quantity it first appeared in."""


class StateChangedError(BackdriftError, RuntimeError):
    """Weights, adapters or flags changed between the forward pass and the backward pass, or a redone network call gave
    something else than the first one."""


class MissingGradientError(BackdriftError, RuntimeError):
    """A tensor that requires grad is used, but no gradient would reach it."""


class UnsupportedError(BackdriftError, RuntimeError):
    """The pipeline, scheduler or setting cannot be differentiated exactly; the message says what to change."""
