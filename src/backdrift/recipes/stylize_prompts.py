"""Prompts to learn a style with, and others to try it on."""

from __future__ import annotations

#: Ten classes of CIFAR-100 (AdjointDPM, appendix D), for a model of the size of Stable Diffusion.
PAPER = (
    "An airplane", "A cat", "A truck", "A forest", "A house", "sunflowers", "A bottle", "A bed", "Apples", "A clock",
)  # fmt: skip

#: For the built-in pipelines: every digit once, every colour and most grounds.
DIGITS = (
    "a red zero on white",
    "a blue one on grey",
    "a green two on pink",
    "a purple three on yellow",
    "a black four on grey",
    "a white five on blue",
    "a yellow six on black",
    "a orange seven on grey",
    "a red eight on gravel",
    "a blue nine on fur",
)

#: None of the pairs of colour and digit, or of digit and ground, above.
OTHER_DIGITS = (
    "a green seven on stars",
    "a purple two on bricks",
    "a red five on grass",
    "a yellow three on blue",
    "a blue zero on pink",
    "a white nine on red",
    "a black six on yellow",
    "a green four on white",
)
