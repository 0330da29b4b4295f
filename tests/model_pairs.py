"""Our model beside transformers' `GPT2LMHeadModel` with the same weights, and that in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from differential import random_config, transformers_twin, with_random_weights
from gpt2fast import GPT2
from tolerance import assert_close

DTYPES = [torch.float32, torch.float64]
ACTIVATIONS = ["gelu_new", "silu", "tanh", "gelu"]  # no kinks, at which gradients may jump


def models(seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> list[Any]:
    """Ours and theirs in `dtype`, theirs in float64; with its unfused attention."""
    values = {
        "activation_function": ACTIVATIONS[seed % len(ACTIVATIONS)],
        "reorder_and_upcast_attn": False,  # it rounds to float32
        **changes,
    }
    ours = with_random_weights(random_config(seed, **values), seed)
    found = [transformers_twin(ours), transformers_twin(ours).double()]
    for model in found:
        model.set_attn_implementation("eager")
    return [ours.to(dtype), found[0].to(dtype), found[1]]


def parameter_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of all parameters that have one, by our names."""
    return {
        name.removeprefix("transformer."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_gradients(models: Sequence[Any], leaves: Sequence[Sequence[Tensor]] = ()) -> None:
    """Hold the gradients of all parameters, and of each model's `leaves`, against the rule."""
    found = [parameter_gradients(model) for model in models]
    assert isinstance(models[0], GPT2)
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert len(found[0]) >= 12
    tensors = [[each[name] for name in found[0]] for each in found]
    for each, own in zip(tensors, leaves, strict=False):
        assert all(leaf.grad is not None for leaf in own)
        each.extend(leaf.grad for leaf in own if leaf.grad is not None)
    mine, others, exact = tensors
    assert_close(mine, others, exact, times=3.0)


def leaf_of(x: Tensor, model: Any) -> Tensor:
    """A copy of x in the dtype of a model, which gets a gradient."""
    return x.to(model.dtype, copy=True).requires_grad_()


def directions(shapes: Sequence[Tensor], seed: int = 3) -> list[Tensor]:
    """Random tensors of the shapes of others, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in shapes]
