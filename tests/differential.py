"""Random GPT-2 shapes, and a transformers model with the same weights beside ours."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from gpt2fast import GPT2, GPT2Config
from gpt2fast.config import ACTIVATIONS


def random_config(seed: int, **changes: Any) -> GPT2Config:
    """A small configuration in which every field varies with the seed."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 5, 7])
    vocab_size = draw.randint(11, 130)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_positions": draw.randint(24, 70),
        "n_embd": heads * draw.choice([4, 8, 17]),
        "n_layer": draw.randint(1, 4),
        "n_head": heads,
        "n_inner": draw.choice([None, None, 13, 96]),
        "activation_function": draw.choice(ACTIVATIONS),
        "dropout": 0.0,
        "layer_norm_epsilon": draw.choice([1e-5, 1e-6, 1e-3]),
        "initializer_range": draw.choice([0.02, 0.1, 0.2]),
        "scale_attn_weights": draw.random() < 0.7,
        "scale_attn_by_inverse_layer_idx": draw.random() < 0.3,
        "reorder_and_upcast_attn": draw.random() < 0.3,
        "tie_word_embeddings": draw.random() < 0.7,
        "bos_token_id": vocab_size - 1,
        "eos_token_id": vocab_size - 1,
    }
    return GPT2Config(**{**values, **changes})


def random_mask(seed: int, batch: int, time: int) -> Tensor:
    """Padding on the left, on the right, or holes; every row keeps at least one token."""
    draw = random.Random(seed)
    mask = torch.ones(batch, time, dtype=torch.int64)
    kind = draw.choice(["left", "right", "holes"])
    for row in range(batch):
        cut = draw.randrange(time)
        if kind == "left":
            mask[row, :cut] = 0
        elif kind == "right":
            mask[row, time - cut :] = 0
        else:
            mask[row, torch.rand(time, generator=torch.Generator().manual_seed(row)) < 0.4] = 0
            mask[row, draw.randrange(time)] = 1
    return mask


def with_random_weights(config: GPT2Config, seed: int) -> GPT2:
    """Our model; biases and layer-norm parameters, too, are random, so that each one counts."""
    torch.manual_seed(seed)
    model = GPT2(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "wpe" in name:
                parameter.mul_(3.0)
    return model


def transformers_twin(model: GPT2) -> Any:
    """`transformers.GPT2LMHeadModel` that shares the weights of `model` (eval mode)."""
    import transformers

    values = model.config.to_dict()
    del values["architectures"], values["model_type"]
    with torch.device("meta"):
        twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values))
    state = {
        name if name.startswith("lm_head") else f"transformer.{name}": parameter.detach()
        for name, parameter in model.named_parameters()
    }
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    twin.load_state_dict(state, assign=True)
    twin.tie_weights()
    return twin.requires_grad_(True).eval()


KINK = 1e-5
"""Distance from a kink that rounding in float32 does not cross in models of these sizes."""


def tokens_away_from_kinks(exact: Any, batch: int, time: int, mask: Tensor | None = None) -> Tensor:
    """Random tokens at which `exact`, a twin in float64, has no unit of a relu near zero.

    There a unit that rounding puts on for one model and off for another gives both a gradient that
    is right, and the two differ by far more than they are rounded.
    """
    for _ in range(1000):
        ids = torch.randint(exact.config.vocab_size, (batch, time))
        if exact.config.activation_function != "relu":
            return ids
        if _nearest_to_a_kink(exact, ids, mask) > KINK:
            return ids
    raise AssertionError(f"1000 draws of {batch} x {time} tokens all came within {KINK} of a kink")


def _nearest_to_a_kink(model: Any, ids: Tensor, mask: Tensor | None) -> float:
    """The smallest size of what goes into an activation of transformers' `model`."""
    sizes: list[float] = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        sizes.append(float(inputs[0].abs().min()))

    hooks = [block.mlp.act.register_forward_pre_hook(note) for block in model.transformer.h]
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return min(sizes)
