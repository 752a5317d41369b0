"""How the built-in weights were made: ``python -m training all`` rebuilds every asset from a seed."""
