"""`python -m gpt2fast.train`: the command `gpt2fast train`."""

from .cli.command import leave
from .cli.train import main

if __name__ == "__main__":
    leave(main())
