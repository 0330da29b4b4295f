"""`python -m gpt2fast.report`."""

import sys

from .cli.report import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
