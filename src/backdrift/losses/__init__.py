"""Losses: pictures in [0, 1] (and prompts) in, one value per sample out; one file per kind.

:func:`resolve` makes a loss of a spec string such as ``"0.5*clip:a blue two + class:two"``, of a callable,
or of a mapping from these to weights. :func:`kinds` lists what there is.
"""

from __future__ import annotations

from . import measurements
from .ambigram import Ambigram
from .base import FunctionLoss, Loss
from .class_target import ClassTarget
from .classifier import Classifier, load_classifier
from .clip import CLIPText
from .mse import MSE, load_picture
from .registry import kinds, register
from .resize import prepare, resize
from .spec import resolve
from .statistics import Brightness, Colour, Contrast, Saturation, Sharpness
from .weighted import WeightedSum

__all__ = [
    "MSE",
    "Ambigram",
    "Brightness",
    "CLIPText",
    "ClassTarget",
    "Classifier",
    "Colour",
    "Contrast",
    "FunctionLoss",
    "Loss",
    "Saturation",
    "Sharpness",
    "WeightedSum",
    "kinds",
    "load_classifier",
    "load_picture",
    "measurements",
    "prepare",
    "register",
    "resize",
    "resolve",
]
