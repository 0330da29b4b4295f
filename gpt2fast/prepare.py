"""`python -m gpt2fast.prepare`."""

import sys

from .cli.prepare import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
