"""`python -m gpt2fast.benchmark`."""

import sys

from .cli.benchmark import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
