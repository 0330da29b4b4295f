"""Derivatives of a whole model that training does not ask for, against plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from transformers import GPT2LMHeadModel

from gpt2fast import GPT2, GPT2Config, KVCache
from gpt2fast.errors import GenerationError
from gpt2fast.nn import Block
from tolerance import assert_close

TOKENS = torch.tensor([[5, 7, 60, 2, 2], [0, 1, 2, 3, 4], [9, 9, 9, 1, 0]])
CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=61, n_positions=8)


@pytest.fixture
def model() -> GPT2:
    return GPT2(CONFIG).eval()


def loss(model: GPT2, parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
    return functional_call(model, parameters, (row[None],), {"labels": row[None]}).loss


def detached(model: GPT2) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_gradients_of_every_sample_at_once_equal_a_loop(model):
    each = vmap(grad(lambda p, row: loss(model, p, row)), in_dims=(None, 0))(
        detached(model), TOKENS
    )
    exact = model.to(torch.float64)
    for index, row in enumerate(TOKENS):
        expected = torch.autograd.grad(
            exact(row[None], labels=row[None]).loss, list(exact.parameters())
        )
        for (name, _), theirs in zip(model.named_parameters(), expected, strict=True):
            assert (each[name][index] - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_a_derivative_along_a_direction_equals_the_gradient_times_it(model):
    model = model.to(torch.float64)
    values = detached(model)
    along = {name: torch.randn_like(value) for name, value in values.items()}
    _, found = jvp(lambda p: loss(model, p, TOKENS[0]), (values,), (along,))
    gradient = grad(lambda p: loss(model, p, TOKENS[0]))(values)
    expected = sum((gradient[name] * along[name]).sum() for name in values)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9) and found.abs() > 1e-3


def test_a_token_outside_the_vocabulary_is_found_among_batched_samples(model):
    rows = TOKENS.clone()
    rows[1, 3] = 61
    with pytest.raises(GenerationError, match="token id 61"):
        vmap(lambda row: model(row[None]).logits)(rows)


def hessian_vector_product(model: torch.nn.Module) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    gradients = torch.autograd.grad(
        model(TOKENS, labels=TOKENS).loss, parameters, create_graph=True
    )
    total = torch.stack([(g * v).sum() for g, v in zip(gradients, along, strict=True)]).sum()
    return list(torch.autograd.grad(total, parameters))


def test_hessian_vector_products_equal_those_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    other = hessian_vector_product(theirs)
    exact = hessian_vector_product(theirs.to(torch.float64))
    assert_close(hessian_vector_product(model), other, exact, times=3.0)


# Caches. What they hold has no gradient; who would need it is told.


def steered(model: GPT2, steering: torch.Tensor, cache) -> None:
    """Read a first part, to whose embeddings `steering` is added, into the cache."""
    hook = model.wte.register_forward_hook(lambda module, args, out: out + steering)
    model(TOKENS[:, :3], cache=cache)
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_first_tokens_of_a_cache_have_their_gradients(model, dtype):
    cache = model.new_cache(3, dtype=dtype)
    output = model(TOKENS, cache=cache)
    found = torch.autograd.grad(output.logits.sin().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(TOKENS).logits.sin().sum(), list(model.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not cache.k.requires_grad and cache.constants.lost


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_gradient_that_would_flow_through_a_cache_is_an_error(frozen, dropout, dtype):
    model = GPT2(dataclasses.replace(CONFIG, attn_pdrop=dropout, dropout=None))
    model.train(dropout > 0)
    model.requires_grad_(not frozen)
    steering = torch.zeros(16, requires_grad=True)
    cache = model.new_cache(3, dtype=dtype)
    steered(model, steering, cache)
    # Nothing here requires a gradient where the model is frozen, but what the cache was made of.
    logits = model(TOKENS[:, 3:], cache=cache).logits
    for beside in (0, steering.sum()):
        with pytest.raises(NotImplementedError, match="keys and values without their gradients"):
            torch.autograd.backward(logits.sum() + beside, retain_graph=True)


def test_a_cache_that_was_filled_without_gradients_asks_nothing(model):
    model.requires_grad_(False)
    steering = torch.ones(16, requires_grad=True)
    cache = model.new_cache(3)
    with torch.no_grad():
        steered(model, steering, cache)
    assert not model(TOKENS[:, 3:], cache=cache).logits.requires_grad
    assert not cache.constants.lost


def test_generation_goes_on_with_a_cache_that_lost_gradients(model):
    cache, plain = model.new_cache(3), model.new_cache(3)
    model(TOKENS[:, :3], cache=cache)
    with torch.no_grad():
        model(TOKENS[:, :3], cache=plain)
        expected = model(TOKENS[:, 3:4], cache=plain).logits
        assert torch.equal(model(TOKENS[:, 3:4], cache=cache).logits, expected)
        found = model.decode_step(TOKENS[:, 4], cache)
        torch.testing.assert_close(found, model(TOKENS[:, 4:], cache=plain).logits[:, -1])
    assert not found.requires_grad


def test_a_block_of_ones_own_is_told_as_well():
    block = Block(16, 2).requires_grad_(False)
    cache = KVCache(1, 1, 8, 2, 8)
    x = torch.randn(1, 3, 16, requires_grad=True)
    block(x, cache=cache.layer(0))
    cache.advance(3, None, cache.positions + 3)
    out = block(torch.randn(1, 2, 16), cache=cache.layer(0))
    with pytest.raises(NotImplementedError, match="give all tokens to one call without a cache"):
        out.sum().backward()
