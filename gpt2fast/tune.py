"""`python -m gpt2fast.tune`: the command `gpt2fast tune`."""

from .cli.command import leave
from .cli.tune import main

if __name__ == "__main__":
    leave(main())
