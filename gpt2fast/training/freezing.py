"""Parameters that training leaves as they are, chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn

from ..errors import ArgumentError


def freeze(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Switch gradients off for the parameters that match a pattern, and on for all others.

    Args:
        model: a GPT2, or any module.
        patterns: a sequence, or separated by commas. A pattern matches a parameter by its name
            ("h.0.ln_1.bias") or by that of a module that holds it ("wte", "h.0"); * ? [0-5] match
            as in names of files ("h.[0-5]", "*.ln_?", "*.bias").

    Returns:
        The names of the frozen parameters. Where the embeddings are tied, `wte.weight` is the
        output projection as well, and both are frozen with it.

    Raises:
        ArgumentError: a pattern that matches nothing, or nothing left to train.
    """
    names = frozen_names(model, patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return names


def frozen_names(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """The parameters that `freeze` would freeze, which stay as they are; errors as there."""
    split = patterns.split(",") if isinstance(patterns, str) else patterns
    named = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in (pattern.strip() for pattern in split):
        meant = {n for n in named if any(fnmatchcase(s, pattern) for s in _beginnings(n))}
        if not meant:
            raise ArgumentError(_nothing(pattern, named))
        frozen |= meant
    if frozen == set(named):
        raise ArgumentError(
            f"the patterns {', '.join(split)!r:.200} freeze all {len(named)} parameters: nothing "
            "is left to train; leave one out"
        )
    return [name for name in named if name in frozen]


def _beginnings(name: str) -> list[str]:
    return list(accumulate(name.split("."), "{}.{}".format))


def _nothing(pattern: str, names: dict[str, nn.Parameter]) -> str:
    tied = "wte.weight" in names and "lm_head.weight" not in names
    if tied and pattern.startswith("lm_head"):
        return (
            f"the pattern {pattern!r:.80} matches nothing: the output projection is the token "
            "embedding (they are tied), which 'wte' freezes"
        )
    known = sorted({beginning for name in names for beginning in _beginnings(name)})
    near = get_close_matches(pattern, known, 3) or ["wte", "h.0", "ln_f.weight"]
    return (
        f"the pattern {pattern!r:.80} matches no parameter of the model; there is "
        f"{', '.join(n for n in near if n in known) or ', '.join(known[:8])}"
    )
