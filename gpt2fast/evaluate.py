"""`python -m gpt2fast.evaluate`."""

import sys

from .cli.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
