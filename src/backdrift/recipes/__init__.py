"""Applications: each a configuration of the one optimisation loop."""
