"""Empty inputs: every op gives what plain torch gives, forward and backward, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from comparison import backend
from gpt2fast import ops
from gpt2fast.ops.packed import MatrixFormat, ModelShape, PackedWeights
from op_arguments import CPU_BACKENDS


def attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


CASES = {
    "residual_layer_norm": (
        lambda x, r, w, b: ops.residual_layer_norm(x, r, w, b),
        lambda x, r, w, b: (F.layer_norm(x + r, w.shape, w, b), x + r),
        [[(0, 8), (0, 8), (8,), (8,)], [(2, 0, 8), (2, 0, 8), (8,), (8,)]],
    ),
    "bias_gelu": (
        ops.bias_gelu,
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        [[(0, 8), (8,)], [(3, 0), (0,)], [(2, 0, 4), (4,)]],
    ),
    "gelu_mlp": (
        ops.gelu_mlp,
        lambda x, a, b, c, d: F.gelu(x @ a + b, approximate="tanh") @ c + d,
        [
            [(0, 8), (8, 16), (16,), (16, 8), (8,)],
            [(2, 0, 8), (8, 16), (16,), (16, 8), (8,)],
            [(3, 8), (8, 0), (0,), (0, 8), (8,)],
            [(3, 0), (0, 4), (4,), (4, 2), (2,)],
        ],
    ),
    "projection": (
        ops.projection,
        lambda x, w, b: x @ w + b,
        [
            [(0, 8), (8, 5), (5,)], [(2, 0, 8), (8, 5), (5,)], [(3, 0), (0, 5), (5,)],
            [(3, 8), (8, 0), (0,)],
        ],
    ),
    "causal_attention": (
        ops.causal_attention,
        attention,
        [[(0, 3, 2, 8)] * 3, [(2, 0, 2, 8)] * 3, [(2, 3, 0, 8)] * 3],
    ),
    "attention": (
        ops.attention,
        attention,
        [[(0, 3, 4, 8), *[(0, 3, 2, 8)] * 2], [(2, 0, 4, 8), *[(2, 0, 2, 8)] * 2]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_torch(name, op, dtype):
    ours, theirs, cases = CASES[op]
    for shapes in cases:
        results = []
        for run, chosen in ((ours, name), (theirs, "reference")):
            leaves = [torch.ones(shape, dtype=dtype).requires_grad_() for shape in shapes]
            with backend(chosen):
                outputs = run(*leaves)
                outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
                total = sum(out.sum() for out in outputs)
                gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
            results.append([*(out.detach() for out in outputs), *gradients])
        for mine, other in zip(*results, strict=True):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize(("batch", "time"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("per_row", [True, False])
def test_no_tokens_give_no_embeddings_and_zero_gradients(name, batch, time, per_row):
    wte, wpe = torch.ones(5, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    tokens = torch.zeros(batch, time, dtype=torch.int64)
    positions = tokens if per_row else torch.arange(time)
    with backend(name):
        out = ops.embedding(tokens, positions, wte, wpe)
        gradients = torch.autograd.grad(out.sum(), (wte, wpe))
    assert out.shape == (batch, time, 8)
    for gradient, table in zip(gradients, (wte, wpe), strict=True):
        assert gradient.shape == table.shape and not gradient.any()


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_the_loss_of_no_rows_is_no_number_and_its_gradients_are_zero(name):
    """F.cross_entropy gives the same for a mean of nothing."""
    hidden, weight = torch.ones(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    with backend(name):
        loss = ops.linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), targets), (hidden, weight))
    assert math.isnan(loss) and loss.dtype == torch.float32
    for mine, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_caches_take_and_give_nothing(name):
    none = torch.zeros(0, dtype=torch.int64)
    with backend(name):
        for batch, time in ((0, 3), (2, 0)):
            q, cache = torch.ones(batch, time, 2, 8), torch.zeros(batch, 5, 2, 8)
            lengths = torch.zeros(batch, dtype=torch.int64)
            caches = cache, cache.clone()
            ops.append_to_cache(q, q.clone(), *caches, lengths)
            assert not caches[0].any() and not caches[1].any()
            assert ops.attention_with_cache(q, *caches, lengths).shape == q.shape
            ops.reorder_cache(*caches, none)
            ops.release_rows(lengths, none)
        assert ops.sample(torch.ones(0, 5), torch.zeros(0, 3).long()).shape == (0,)
        ops.fused_adamw(
            *([torch.zeros(0, 3)] for _ in range(4)),
            step=1, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0,
        )  # fmt: skip


@pytest.mark.parametrize("name", [None, "torch", "reference"])
def test_packed_steps_of_no_tokens_give_no_logits(name):
    shape = ModelShape(2, 32, 64, 40, 16, "gelu_new", 1e-5, (0.25,), True)
    weights = PackedWeights(shape, dict.fromkeys(shape.matrices(), MatrixFormat("float32")))
    none = torch.zeros(0, dtype=torch.int64)
    k_cache, v_cache = torch.zeros(2, 1, 2, 6, 2, 16)
    with backend(name or "auto"):
        logits = ops.packed_step(
            weights, k_cache, v_cache, none, none, torch.tensor([0]), none, none, none
        )
        assert logits.shape == (0, 40)
        caches = k_cache[:, :0], v_cache[:, :0]
        logits, tokens = ops.packed_next(
            weights, *caches, none, none, none, torch.zeros(0, 0).long()
        )
    assert logits.shape == (0, 40) and tokens.shape == (0,)
