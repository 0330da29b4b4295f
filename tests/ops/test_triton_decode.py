"""A whole step in Triton kernels, beside the reference."""

from __future__ import annotations

import pytest
import torch

from comparison import TRITON_BACKENDS, backend
from gpt2fast import ops
from gpt2fast.ops.activations import ACTIVATIONS
from tolerance import assert_close, assert_equal


def model(batch, dtype, cache_dtype, heads=3, head_dim=12, inner=80, vocab=61, positions=40):
    """Weights of two layers, caches, tokens, positions and lengths."""
    width, entries = heads * head_dim, 20

    def some(*shape):
        return (torch.randn(shape) * 0.3).to(dtype)

    weights = [some(vocab, width), some(positions, width)]
    for _ in range(2):
        weights += [1 + some(width), some(width), some(width, 3 * width), some(3 * width)]
        weights += [some(width, width), some(width), 1 + some(width), some(width)]
        weights += [some(width, inner), some(inner), some(inner, width), some(width)]
    weights += [1 + some(width), some(width), some(vocab, width)]
    caches = [some(2, batch, entries, heads, head_dim).to(cache_dtype) for _ in "kv"]
    lengths = torch.randint(entries, (batch,))
    return weights, caches, torch.randint(vocab, (batch,)), lengths + 3, lengths


def check(name, batch, dtype, cache_dtype, activation="gelu_new", **sizes):
    weights, caches, *indices = model(batch, dtype, cache_dtype, **sizes)
    options = dict(
        n_head=sizes.get("heads", 3), attention_scales=[0.3, 0.2], activation=activation, eps=1e-5
    )

    def run(name, weights, caches):
        caches = [cache.clone() for cache in caches]
        with backend(name):
            logits = ops.decode_step(weights, *caches, *indices, **options)
        return [logits, *caches]

    exact = run(
        "reference", [weight.double() for weight in weights], [cache.double() for cache in caches]
    )
    assert_close(run(name, weights, caches), run("reference", weights, caches), exact, times=3.0)


@pytest.mark.parametrize("name", TRITON_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_a_step_matches_the_reference(name, dtype, batch):
    check(name, batch, dtype, dtype)


@pytest.mark.parametrize("name", TRITON_BACKENDS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(name, batch, activation):
    check(name, batch, torch.float32, torch.float32, activation)


@pytest.mark.parametrize("name", TRITON_BACKENDS)
def test_caches_may_be_narrower_than_the_weights(name):
    check(name, 2, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", TRITON_BACKENDS)
def test_wider_than_a_block_of_inputs(name):
    check(name, 2, torch.bfloat16, torch.bfloat16, heads=5, head_dim=32, inner=300, vocab=130)


@pytest.mark.parametrize("name", TRITON_BACKENDS)
def test_vectors_may_be_strided(name):
    weights, caches, *indices = model(2, torch.float32, torch.float32)
    strided = [x.repeat_interleave(2)[::2] if x.dim() == 1 else x for x in weights]
    options = dict(n_head=3, attention_scales=[0.3, 0.2], activation="gelu_new", eps=1e-5)

    def run(weights):
        copies = [cache.clone() for cache in caches]
        with backend(name):
            return ops.decode_step(weights, *copies, *indices, **options)

    assert_equal(run(strided), run(weights))
