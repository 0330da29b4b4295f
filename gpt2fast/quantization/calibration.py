"""Calibration text, whose activations show which rounding errors matter.

A model that comes without its training text can write some: what it samples from itself at
temperature 1 has activations like those in use. LLM-QAT (Liu et al., 2023) trains quantized models
on such text; "Self-calibration for language model quantization and pruning" (Williams et al., 2025)
calibrates on it and finds it competitive with real text. Each sequence begins with a random token
of its own: rows of `generate` that share a prompt share their draws, and would all be the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..model import GPT2

SEQUENCES = 16
LENGTH = 256
"""Size of the text that a model writes for itself: sequences, and tokens in each."""

MOST_TOKENS = 1 << 16
"""Limit, since a layer's activations for all tokens are held at once."""


def calibration_tokens(
    model: GPT2, given: Tensor | Sequence[int] | None, seed: int
) -> tuple[Tensor, str]:
    """(B, T) int64 token ids on the CPU, and a description of them.

    Args:
        model: in evaluation mode.
        given: one text's token ids, (T,), cut into windows as long as the model reads, or (B, T);
            None lets the model write.
        seed: of what the model writes.
    """
    if given is None:
        return _own_text(model, seed)
    tokens = _checked(given, model.config.vocab_size)
    longest = model.config.n_positions
    if tokens.dim() == 1:
        length = min(len(tokens), longest)
        tokens = tokens[: len(tokens) // length * length].view(-1, length)
    if tokens.shape[1] > longest:
        raise ArgumentError(
            f"calibration has rows of {tokens.shape[1]} tokens, beyond this model's n_positions="
            f"{longest}; give one long sequence, which is cut into windows, or shorter rows"
        )
    return tokens, f"{tokens.numel()} given tokens in windows of {tokens.shape[1]}"


def _own_text(model: GPT2, seed: int) -> tuple[Tensor, str]:
    config = model.config
    length = min(LENGTH, config.n_positions)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(config.vocab_size, (SEQUENCES, 1), generator=generator)
    tokens = model.generate(
        first.to(model.device),
        max_new_tokens=length - 1,
        do_sample=True,
        eos_token_id=None,
        seed=seed,
        # Rows of equal length, of all tokens, whatever generation_config.json says.
        max_time=None,
        bad_words_ids=None,
        epsilon_cutoff=None,
        eta_cutoff=None,
    )
    note = f"{SEQUENCES} x {length} tokens that the model wrote at temperature 1, seed {seed}"
    return tokens.cpu(), note


def _checked(given: Tensor | Sequence[int], vocab_size: int) -> Tensor:
    try:
        tokens = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"calibration must be token ids, (T,) or (B, T), not {type(given).__name__}: {error}"
        ) from None
    if not 0 < tokens.numel() <= MOST_TOKENS:
        raise ArgumentError(
            f"calibration has {tokens.numel()} tokens; give 1 to {MOST_TOKENS}, "
            f"of which a few thousand are enough"
        )
    if tokens.dim() not in (1, 2) or tokens.is_floating_point() or tokens.is_complex():
        raise ArgumentError(
            f"calibration must be whole numbers, (T,) or (B, T), not {tokens.dtype} "
            f"{tuple(tokens.shape)}"
        )
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ArgumentError(
            f"calibration has token id {low if low < 0 else high}, outside the vocabulary "
            f"0 .. {vocab_size - 1}; was the text encoded with this model's tokenizer?"
        )
    return tokens.long()
