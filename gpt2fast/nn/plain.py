"""Modules whose weights a fused op may read instead of calling them.

Hooks run only when a module is called; so do parametrizations, replaced modules and replaced
`forward` methods. A module with none of these is plain: nobody can tell that it was not called.
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
    """Class decorator: let fused ops read the weights of `kind` instead of calling it."""
    _FORWARDS[kind] = kind.forward
    return kind


readable(nn.Dropout)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """True if `module` is exactly one of `kinds`, and nothing watches or changes it."""
    return type(module) in kinds and _is_untouched(module)


def _is_untouched(module: nn.Module) -> bool:
    kind = type(module)
    return _FORWARDS.get(kind) is kind.forward and _has_no_hook(module)


def _has_no_hook(module: nn.Module, inert: str | None = None) -> bool:
    state = module.__dict__
    hooks = state["_forward_hooks"]
    return not (
        (hooks and any(getattr(hook, "__module__", None) != inert for hook in hooks.values()))
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or _torch_modules._global_forward_hooks
        or _torch_modules._global_forward_pre_hooks
        or _torch_modules._global_backward_hooks
        or _torch_modules._global_backward_pre_hooks
    )


def is_unwatched(module: nn.Module, base: type[nn.Module], inert: str | None = None) -> bool:
    """True if a call of `module`, an instance of `base`, runs `base.forward` and no more.

    Args:
        module: the module.
        base: a class.
        inert: name of a Python module whose forward hooks do nothing.
    """
    return type(module).forward is base.forward and _has_no_hook(module, inert)


def why_not_plain_within(model: nn.Module) -> str | None:
    """A reason to call some module of `model`, in words; None if all of them are plain."""
    for name, module in model.named_modules():
        kind = type(module)
        if module is model or kind is nn.ModuleList or _is_untouched(module):
            continue
        if hasattr(module, "parametrizations"):
            return f"{name} has a parametrization"
        if kind not in _FORWARDS:
            return f"{name} is of the class {kind.__name__}, which is not one of GPT-2's parts"
        if "forward" in module.__dict__ or _FORWARDS[kind] is not kind.forward:
            return f"{name} has another forward"
        return f"{name} has a hook"
    return None
