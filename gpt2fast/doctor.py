"""`python -m gpt2fast.doctor`: the command `gpt2fast doctor`; called, it examines a model."""

import sys
from types import ModuleType
from typing import Any

from .cli.command import leave
from .cli.doctor import main


class _Doctor(ModuleType):
    def __call__(self, model: Any) -> Any:
        """See `gpt2fast.hf.doctor`."""
        from .hf import doctor

        return doctor(model)


sys.modules[__name__].__class__ = _Doctor

if __name__ == "__main__":
    leave(main())
