"""Derivatives of a whole model that training does not ask for, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from transformers import GPT2LMHeadModel

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import GenerationError
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
    total = sum((g * v).sum() for g, v in zip(gradients, along, strict=True))
    return list(torch.autograd.grad(total, parameters))


def test_hessian_vector_products_equal_those_of_transformers(model, tmp_path):
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    other = hessian_vector_product(theirs)
    exact = hessian_vector_product(theirs.to(torch.float64))
    assert_close(hessian_vector_product(model), other, exact, times=3.0)
