"""`python -m gpt2fast.benchmark`: the command `gpt2fast benchmark`."""

from .cli.benchmark import main
from .cli.command import leave

if __name__ == "__main__":
    leave(main())
