"""`python -m gpt2fast.serve`: the command `gpt2fast serve`."""

from .cli.command import leave
from .cli.serve import main

if __name__ == "__main__":
    leave(main())
