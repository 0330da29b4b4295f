"""`python -m gpt2fast.evaluate`: the command `gpt2fast evaluate`."""

from .cli.command import leave
from .cli.evaluate import main

if __name__ == "__main__":
    leave(main())
