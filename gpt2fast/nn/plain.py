"""Whether a fused op may read a module's weights instead of calling the module.

Hooks, by which activations are captured, changed and models are wrapped, run in a call alone. So
does whatever stands in a module's place, a parametrization, or a `forward` of its own. A module is
plain where none of this is there, and only then nobody can tell that it was not called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as _torch_modules

_Kind = TypeVar("_Kind", bound=type[nn.Module])

_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}
"""The `forward` that each class had when it was defined."""


def readable(kind: _Kind) -> _Kind:
    """Class decorator: fused ops know what `kind.forward` computes."""
    _FORWARDS[kind] = kind.forward
    return kind


for _kind in (nn.Embedding, nn.Linear, nn.Dropout):
    readable(_kind)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether `module` is exactly one of `kinds`, and nothing watches or changes it."""
    kind = type(module)
    return kind in kinds and _FORWARDS[kind] is kind.forward and _has_no_hook(module)


def _has_no_hook(module: nn.Module) -> bool:
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or _torch_modules._global_forward_hooks
        or _torch_modules._global_forward_pre_hooks
        or _torch_modules._global_backward_hooks
        or _torch_modules._global_backward_pre_hooks
    )


def is_unwatched(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a call of `module`, of class `base` or one derived of it, is `base.forward` alone."""
    return type(module).forward is base.forward and _has_no_hook(module)


def why_not_plain(module: nn.Module, *kinds: type[nn.Module]) -> str:
    """What keeps a module that is not plain from being read, in words."""
    kind = type(module)
    if hasattr(module, "parametrizations"):
        return "has a parametrization"
    if kind not in kinds:
        return f"is of the class {kind.__name__}, which is not one of GPT-2's parts"
    if "forward" in module.__dict__ or _FORWARDS[kind] is not kind.forward:
        return "has another forward"
    return "has a hook"
