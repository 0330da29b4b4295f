"""`python -m gpt2fast.generate`: the command `gpt2fast generate`."""

from .cli.command import leave
from .cli.generate import main

if __name__ == "__main__":
    leave(main())
