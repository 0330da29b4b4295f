"""The gradient of a tied token embedding: look-ups and projection add up in one matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gpt2fast import GPT2, GPT2Config, backend
from gpt2fast.nn import LinearCrossEntropy
from gpt2fast.ops.backend import record_calls
from gpt2fast.ops.native import unavailable
from tolerance import assert_close

VOCAB, WIDTH = 1021, 48
IDS = torch.randint(40, (3, 18), generator=torch.Generator().manual_seed(3))


def made(dtype: torch.dtype = torch.float32, **changes: Any) -> GPT2:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_positions": 32,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 3,
    }
    model = GPT2(GPT2Config(**shape, dropout=0.0, bos_token_id=None, eos_token_id=None, **changes))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape) * 0.1)
    return model.to(dtype).train()


def loss_of(model: GPT2, **arguments: Any) -> Tensor:
    loss = model(IDS[:, :-1], targets=IDS[:, 1:], **arguments).loss
    assert loss is not None
    return loss


def watched(model: GPT2) -> GPT2:
    """The same with a hook that changes nothing: embedding and projection are two nodes."""
    model.wte.register_forward_hook(lambda module, inputs, output: None)
    return model


def gradients(model: GPT2, **arguments: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(model, **arguments), list(model.parameters())))


NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
)


@pytest.mark.parametrize("name", ["auto", NATIVE, "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [None, "row", "each"])
def test_it_is_the_sum_of_both(name, dtype, positions):
    chosen = {
        None: None,
        "row": torch.arange(5, 22)[None],
        "each": torch.arange(17) + torch.arange(3)[:, None],
    }[positions]
    exact = gradients(watched(made(torch.float64)), position_ids=chosen)
    with backend("reference"):
        peer = gradients(watched(made(dtype)), position_ids=chosen)
    with backend(name):
        found = gradients(made(dtype), position_ids=chosen)
    assert_close(found[:2], peer[:2], exact[:2], times=3)  # wte and wpe


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_nothing_of_the_table_s_size_is_allocated_in_the_backward_pass():
    def largest(model: GPT2) -> int:
        loss = loss_of(model)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            loss.backward()
        events = measured.profiler.kineto_results.events()  # type: ignore[union-attr]
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    size = 4 * VOCAB * WIDTH
    assert largest(made()) < size <= largest(watched(made()))


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_the_calls_are_recorded_as_without_it():
    def calls(model: GPT2) -> set[tuple[str, str]]:
        with record_calls() as recorded:
            loss_of(model).backward()
        return {(call.op, call.backend) for call in recorded}

    assert ("embedding_backward", "native") in calls(made())


def test_equal_runs_give_equal_bits():
    first, second = gradients(made()), gradients(made())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_kept_graph_gives_the_same_gradient_again():
    model = made()
    loss, weight = loss_of(model), model.wte.weight
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    before = first.clone()
    (second,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (third,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, before)
    assert torch.equal(first, second) and torch.equal(first, third)


def test_gradients_accumulate():
    model = made()
    (once,) = torch.autograd.grad(loss_of(model), model.wte.weight)
    for _ in range(3):
        loss_of(model).backward()
    assert model.wte.weight.grad is not None
    torch.testing.assert_close(model.wte.weight.grad, 3 * once, rtol=1e-5, atol=1e-6)


def test_a_gradient_s_gradient_is_that_of_the_parts():
    def norm_s_gradient(model: GPT2) -> Tensor:
        weight = model.wte.weight
        (grad,) = torch.autograd.grad(loss_of(model), weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    found, wanted = (
        norm_s_gradient(m) for m in (made(torch.float64), watched(made(torch.float64)))
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("frozen", ["wte", "wpe"])
def test_a_frozen_table_gets_none(frozen):
    model, other = made(), watched(made())
    for each in (model, other):
        getattr(each, frozen).weight.requires_grad_(False)
        loss_of(each).backward()
    assert getattr(model, frozen).weight.grad is None
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_and_logits_in_the_same_graph(reduction):
    def grad(model: GPT2) -> Tensor:
        model.loss = LinearCrossEntropy(reduction=reduction)
        out = model(IDS[:, :-1], targets=IDS[:, 1:])
        (out.loss.sum() + out.logits.square().mean()).backward()
        assert model.wte.weight.grad is not None
        return model.wte.weight.grad

    wanted = grad(watched(made()))
    torch.testing.assert_close(grad(made()), wanted, rtol=1e-4, atol=1e-5)


def test_an_untied_model_has_two():
    model = made(tie_word_embeddings=False)
    loss_of(model).backward()
    grad = model.wte.weight.grad
    assert grad is not None and not grad[IDS.max() + 1 :].any()
