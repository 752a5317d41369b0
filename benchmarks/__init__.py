"""Benchmarks: against peers installed from the registry, results as JSON beside the machine's description."""
