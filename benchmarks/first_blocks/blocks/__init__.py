"""The blocks, one file each, as a reader would type them; run by :mod:`benchmarks.first_blocks.ways`, not imported."""
