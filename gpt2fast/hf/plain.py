"""Which modules of transformers' GPT-2 may be read instead of called."""

from __future__ import annotations

from torch import nn

from ..nn.plain import is_unwatched

# Its hooks stay when hidden states or attentions were asked for once, and do nothing unless a call
# asks again.
_CAPTURING = "transformers.utils.output_capturing"


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if `module` is exactly a `kind`, and nothing watches or changes its calls."""
    return type(module) is kind and is_unwatched(module, kind, inert=_CAPTURING)


def why_called(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why `module` is called rather than read, in words that follow its name; None if it is not."""
    if type(module) is not kind:
        return f"is of the class {type(module).__name__}"
    if "forward" in module.__dict__:
        return "has another forward"
    return None if is_plain(module, kind) else "has a hook"
