"""``python -m backdrift``: the same as the command ``backdrift``."""

from .cli import main

if __name__ == "__main__":
    main()
