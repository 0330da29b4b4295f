"""`python -m gpt2fast.doctor`."""

import sys

from .cli.doctor import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
