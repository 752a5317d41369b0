"""The tables of Symplectic Adjoint Guidance (Pan et al. 2023) on the built-in pipeline, its baselines beside it."""
