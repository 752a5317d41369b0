"""``python -m backdrift``: the same as the command ``backdrift``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
