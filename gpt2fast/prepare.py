"""`python -m gpt2fast.prepare`: the command `gpt2fast prepare`."""

from .cli.command import leave
from .cli.prepare import main

if __name__ == "__main__":
    leave(main())
