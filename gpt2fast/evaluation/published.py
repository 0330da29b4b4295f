"""OpenAI's four models, by which the figures of their paper are found."""

from __future__ import annotations

import os

from ..config import PRESETS, GPT2Config

SIZES = {"gpt2": "117M", "gpt2-medium": "345M", "gpt2-large": "762M", "gpt2-xl": "1542M"}
"""The paper's name for each; it counted the smallest as 117M, which is 124M."""

_SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")


def published_size(name_or_path: str, config: GPT2Config) -> int | None:
    """The index among `SIZES` of a model called as OpenAI's and of the same shape, or None.

    Weights are not looked at: a model of that name that was trained further is taken for it.
    """
    name = os.path.basename(os.path.normpath(name_or_path))
    if name not in SIZES:
        return None
    original = PRESETS[name]
    same = all(getattr(config, field) == getattr(original, field) for field in _SHAPE)
    return list(SIZES).index(name) if same else None
