"""Samples of text during a run, which do not change its numbers."""

from __future__ import annotations

import torch

from ...errors import ConfigError, TokenizerError
from ...inference.generator import Generator
from ...inference.packing import keeping_no_copy
from ...model import GPT2
from ...tokenizer import Tokenizer


def prompt_for(tokenizer: Tokenizer | None, asked: str | None) -> str:
    """The prompt of samples: the setting sample_prompt, or the beginning of a text.

    Raises:
        ConfigError: there is no tokenizer, or it cannot read the prompt.
    """
    if tokenizer is None:
        raise ConfigError(
            "sample_interval is set, but the data have no tokenizer that could write text; "
            "set sample_interval to null, or prepare the data with python -m gpt2fast.prepare"
        )
    if asked is not None:
        try:
            tokenizer.encode(asked)
        except TokenizerError as error:
            raise ConfigError(f"sample_prompt is {asked!r:.80}: {error}") from error
        return asked
    if tokenizer.eos_token_id is not None:
        return ""  # the generator begins with that token
    try:
        tokenizer.encode("\n")
    except TokenizerError:
        return tokenizer.decode([0])
    return "\n"


def sample_text(model: GPT2, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int) -> str:
    """The model's continuation of `prompt`, drawn as `gpt2fast.generate` does by default.

    Random states, modes of modules and weights are restored afterward, and no packed copy of the
    weights stays. A text that is longer than the model's context goes on with its newest half.

    Args:
        tokens: most tokens to write.
        seed: seed of the draws.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with keeping_no_copy(model), torch.random.fork_rng(devices):
        generator = Generator(model, tokenizer, window="slide", notify=lambda _: None)
        drawn = generator(prompt, max_new_tokens=tokens, seed=seed)
    assert not isinstance(drawn, list)
    return drawn.text
