"""nanoGPT's ckpt.pt: the shape of its model, and its models without biases.

https://github.com/karpathy/nanoGPT/blob/master/model.py (GPTConfig)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..config import PRESETS, GPT2Config
from ..errors import ConfigError, WeightsError


def read_model_args(arguments: Mapping[str, Any], file: Path) -> GPT2Config:
    """The configuration that nanoGPT's `model_args` describe."""
    source = f"{file}: model_args"
    fields = {
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "block_size": "n_positions",
        "vocab_size": "vocab_size",
        "dropout": "dropout",
    }
    for name, value in arguments.items():
        if not isinstance(value, (int, float, NoneType)):
            raise ConfigError(f"{source}: {name!r:.80} is no number: {type(value).__name__}")
        if name not in fields and name != "bias" and value:
            raise WeightsError(
                f"{source}: {name!r:.80}={value!r:.80} is not nanoGPT's; "
                "a variant of the architecture cannot be loaded"
            )
    for name in fields:
        if name not in arguments and name != "dropout":
            raise WeightsError(f"{source} does not say {name}; give preset= if it is a GPT-2")
    values = {ours: arguments[name] for name, ours in fields.items() if name in arguments}
    values["activation_function"] = "gelu"
    vocabulary = values["vocab_size"]
    # 50304 is GPT-2's vocabulary, padded; a smaller one has ids of its own.
    if not isinstance(vocabulary, int) or vocabulary <= PRESETS["gpt2"].vocab_size - 1:
        values["bos_token_id"] = values["eos_token_id"] = None
    dropout = values.pop("dropout", 0.0)
    values.update(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    return GPT2Config.from_dict(values, source=source)


def has_no_biases(extra: Mapping[str, Any]) -> bool:
    arguments = extra.get("model_args")
    return isinstance(arguments, dict) and arguments.get("bias") is False


def add_zero_biases(named: dict[str, Tensor], config: GPT2Config) -> None:
    for name, shape in config.parameter_shapes().items():
        weight = named.get(name.removesuffix("bias") + "weight")
        if name.endswith(".bias") and name not in named and weight is not None:
            named[name] = torch.zeros(shape, dtype=weight.dtype)
