"""`python -m gpt2fast.doctor`: the command `gpt2fast doctor`."""

from .cli.command import leave
from .cli.doctor import main

if __name__ == "__main__":
    leave(main())
