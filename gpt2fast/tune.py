"""`python -m gpt2fast.tune`."""

import sys

from .cli.tune import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
