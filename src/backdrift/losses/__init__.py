"""Losses: pictures in [0, 1] (and prompts) in, one value per sample out; one file per kind.

:func:`resolve` makes a loss of a spec string such as ``"0.5*clip:a blue two + class:two"``, of a callable,
of a mapping from these to weights, or of pairs ``(weight, loss)``. :func:`kinds` lists what there is.
"""

from __future__ import annotations

from . import measurements
from .aesthetic import Aesthetic
from .ambigram import Ambigram
from .base import FunctionLoss, Loss
from .class_target import ClassTarget
from .classifier import Classifier, load_classifier
from .clip import CLIPText
from .clip_image import CLIPImage
from .clip_images import ImageEncoder
from .content import Content
from .cutouts import Cutouts
from .feature_maps import FeatureMaps
from .hpsv2 import HPSv2
from .identity import Identity
from .image_reward import ImageReward
from .in_parts import InParts
from .mse import MSE
from .perceptual import Perceptual, VGGContent, VGGStyle
from .photographs import photograph, photographs
from .pickscore import PickScore
from .preference import Preference
from .reading import load_picture
from .registry import kinds, register
from .resize import prepare, resize
from .spec import resolve
from .statistics import Brightness, Colour, Contrast, Saturation, Sharpness
from .style import GramStyle
from .weighted import WeightedSum

__all__ = [
    "MSE",
    "Aesthetic",
    "Ambigram",
    "Brightness",
    "CLIPImage",
    "CLIPText",
    "ClassTarget",
    "Classifier",
    "Colour",
    "Content",
    "Contrast",
    "Cutouts",
    "FeatureMaps",
    "FunctionLoss",
    "GramStyle",
    "HPSv2",
    "Identity",
    "ImageEncoder",
    "ImageReward",
    "InParts",
    "Loss",
    "Perceptual",
    "PickScore",
    "Preference",
    "Saturation",
    "Sharpness",
    "VGGContent",
    "VGGStyle",
    "WeightedSum",
    "kinds",
    "load_classifier",
    "load_picture",
    "measurements",
    "photograph",
    "photographs",
    "prepare",
    "register",
    "resize",
    "resolve",
]
