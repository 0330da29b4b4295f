"""`python -m gpt2fast.generate`: the command `gpt2fast generate`; called, a `custom_generate`."""

import sys
from types import ModuleType
from typing import Any

from .cli.command import leave
from .cli.generate import main


class _Generate(ModuleType):
    def __call__(
        self,
        model: Any,
        input_ids: Any,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **options: Any,
    ) -> Any:
        """See `gpt2fast.hf.generate`."""
        from .hf import generate

        return generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, **options
        )


sys.modules[__name__].__class__ = _Generate

if __name__ == "__main__":
    leave(main())
