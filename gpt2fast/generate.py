"""`python -m gpt2fast.generate`."""

import sys

from .cli.generate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
