"""Fine-tuning: adapters beside the model's projections, or frozen parts.

A checkpoint of a run with adapters holds the merged model, which every program can load, the
adapters by themselves (adapter/, in PEFT's format), and in its state the tensors that merging
changed: `adapter_state`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import ConfigError
from ...lora import add_adapters, is_adapted
from ...lora.adapters import adapted
from ...model import GPT2
from ..config import TrainConfig
from ..freezing import freeze


def prepare_model(config: TrainConfig, model: GPT2) -> GPT2:
    """`model`, ready to be trained as `config` says: with adapters, or partly frozen.

    Call it before the optimizer is made and before the model is wrapped, compiled or sharded.
    Adapters are drawn from torch's global generator.

    Raises:
        ArgumentError: a target or pattern that matches nothing, or a rank that is too large.
    """
    if config.lora_rank is not None:
        add_adapters(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
        )
    elif config.freeze is not None:
        freeze(model, config.freeze)
    return model


def describe_training(model: GPT2) -> str | None:
    """One line on what is trained, or None where that is everything."""
    named = dict(model.named_parameters())
    trained = sum(p.numel() for p in named.values() if p.requires_grad)
    total = sum(p.numel() for p in named.values())
    if trained == total:
        return None
    line = f"training {trained:,} of {total:,} parameters ({trained / total:.2%})"
    if is_adapted(model):
        projections = adapted(model)
        first = next(iter(projections.values()))
        return f"{line}: adapters of rank {first.rank} beside {len(projections)} projections"
    if model.config.tie_word_embeddings and not named["wte.weight"].requires_grad:
        line += "; the frozen token embedding is the output projection, too"
    return line


def adapter_state(model: GPT2) -> dict[str, Tensor]:
    """The tensors that a resumed run needs beside the merged model, by name.

    Adapted weights before merging, and the adapters, on the CPU; empty without adapters. All other
    weights are in the merged model bit for bit.
    """
    return {
        f"{name}.{part}": getattr(projection, part).detach().cpu()
        for name, projection in adapted(model).items()
        for part in ("weight", "lora_A", "lora_B")
    }


@torch.no_grad()
def restore_adapters(model: GPT2, state: Mapping[str, Tensor]) -> None:
    """Put `adapter_state` back into a model that was loaded merged, and prepared anew.

    Raises:
        ConfigError: the state is of other adapters than the model has.
    """
    own = {
        f"{name}.{part}": getattr(projection, part)
        for name, projection in adapted(model).items()
        for part in ("weight", "lora_A", "lora_B")
    }
    for name in sorted({*own, *state}):
        shapes = [tuple(s[name].shape) if name in s else "missing" for s in (own, state)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"cannot resume: {name} is {shapes[0]} as lora_rank and lora_targets say, and "
                f"{shapes[1]} in the checkpoint; resume with the values that the run began with"
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])
