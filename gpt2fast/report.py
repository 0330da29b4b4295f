"""`python -m gpt2fast.report`: the command `gpt2fast report`."""

from .cli.command import leave
from .cli.report import main

if __name__ == "__main__":
    leave(main())
