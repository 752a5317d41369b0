"""Pipelines: load, make differentiable, view as a Denoiser; the built-in ones."""
