"""Paths of the Triton kernels that the small shapes of the other tests do not take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from comparison import compare, needs_triton, random
from gpt2fast import backend, ops
from tolerance import assert_close

pytestmark = needs_triton


@pytest.fixture
def kernels(monkeypatch):
    """Set a limit of a module of gpt2fast.ops.triton: kernels(module, name, value).

    No settings: what lies beyond the real ones takes its interpreter minutes.
    """

    def limit(module, name, value):
        monkeypatch.setattr(f"gpt2fast.ops.triton.{module}.{name}", value)

    return limit


def torch_layer_norm(x, residual, weight, bias):
    summed = x + residual
    return F.layer_norm(summed, weight.shape, weight, bias), summed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_of_rows_wider_than_a_block(kernels, dtype):
    kernels("layer_norm", "_WIDEST", 16)
    inputs = [random(2, 3, 4100), random(2, 3, 4100), random(4100), random(4100)]
    compare(ops.residual_layer_norm, torch_layer_norm, inputs, dtype, "triton")
    x, _, weight, bias = inputs
    compare(
        lambda x, w, b: ops.residual_layer_norm(x, None, w, b)[0],
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        [x, weight, bias],
        dtype,
        "triton",
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_mixed_dtypes(half):
    x, residual, weight, bias = random(3, 5, 24), random(3, 5, 24), random(24), random(24)
    grad = [random(3, 5, 24).to(half), random(3, 5, 24).float()]

    def gradients(name, dtypes):
        inputs = [t.to(d) for t, d in zip((x, residual, weight, bias), dtypes, strict=True)]
        inputs = [t.requires_grad_() for t in inputs]
        with backend(name):
            out = ops.residual_layer_norm(*inputs)
            first = torch.autograd.grad(
                out, inputs, [g.to(o) for g, o in zip(grad, out, strict=True)]
            )
            out = ops.bias_gelu(inputs[0], inputs[3])
            return *first, *torch.autograd.grad(out, (inputs[0], inputs[3]), grad[0].to(out))

    mixed = (half, torch.float32, torch.float32, torch.float32)
    ours, theirs = gradients("triton", mixed), gradients("reference", mixed)
    assert [g.dtype for g in ours] == [g.dtype for g in theirs]
    assert_close(ours, theirs, gradients("reference", [torch.float64] * 4), times=3.0)


def test_large_offsets_do_not_cancel_the_variance_of_wide_rows(kernels):
    kernels("layer_norm", "_WIDEST", 16)
    x = (1e4 + torch.randn(2, 9000)).double()
    with backend("triton"):
        normed, _ = ops.residual_layer_norm(x.float(), None, torch.ones(9000), torch.zeros(9000))
    assert_close([normed], [F.layer_norm(x.float(), (9000,))], [F.layer_norm(x, (9000,))], 2.0)


def test_sums_over_rows_in_several_groups(kernels):
    kernels("reduction", "_MOST_GROUPS", 3)
    inputs = [random(300, 40), random(300, 40), random(40), random(40)]
    compare(ops.residual_layer_norm, torch_layer_norm, inputs, torch.float32, "triton")
    compare(
        ops.bias_gelu,
        lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        inputs[::2][:1] + inputs[2:3],
        torch.float32,
        "triton",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_mlp_of_several_tiles_and_parts(kernels, dtype):
    kernels("mlp", "_SHORTEST_PART", 32)
    inputs = [
        random(2, 35, 33),
        random(33, 130) / 8,
        random(130),
        random(130, 70) / 8,
        random(70),
    ]
    compare(
        ops.gelu_mlp,
        lambda x, a, b, c, d: F.gelu(x @ a + b, approximate="tanh") @ c + d,
        inputs,
        dtype,
        "triton",
    )


def test_gelu_far_from_zero():
    x = torch.tensor([[-1e4, -30.0, -9.0, 0.0, 9.0, 30.0, 1e4]], requires_grad=True)
    with backend("triton"):
        out = ops.bias_gelu(x, torch.zeros(7))
        (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(grad[0, ::6], torch.tensor([0.0, 1.0]))


def test_cross_entropy_of_a_vocabulary_of_several_blocks():
    targets = torch.randint(16500, (5,))
    targets[1] = -100
    inputs = [random(5, 8), random(16500, 8)]
    compare(
        lambda h, w: ops.linear_cross_entropy(h, w, targets),
        lambda h, w: F.cross_entropy(h @ w.t(), targets),
        inputs,
        torch.float32,
        "triton",
    )


def test_cross_entropy_of_logits_that_are_minus_infinity():
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [-float("inf")], [1.0]])
    targets = torch.tensor([0, 2])
    with backend("triton"):
        loss = ops.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), targets))


def test_cross_entropy_of_no_rows():
    hidden = torch.ones(0, 4, requires_grad=True)
    weight = torch.ones(5, 4, requires_grad=True)
    with backend("triton"):
        loss = ops.linear_cross_entropy(hidden, weight, torch.ones(0).long())
        gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isnan() and gradients[0].shape == (0, 4) and gradients[1].shape == (5, 4)


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        ([7] * 900, torch.float32),
        ([0, 3] * 450, torch.float32),
        ([7] * 500 + list(range(100)) * 4, torch.bfloat16),
    ],
)
def test_embedding_gradient_of_tokens_that_fill_a_batch(tokens, dtype):
    tokens = torch.tensor(tokens)[torch.randperm(len(tokens))].view(3, -1)
    positions = torch.zeros(tokens.shape[1], dtype=torch.long)
    compare(
        lambda wte, wpe: ops.embedding(tokens, positions, wte, wpe),
        lambda wte, wpe: F.embedding(tokens, wte) + F.embedding(positions, wpe),
        [random(100, 40), random(2, 40)],
        dtype,
        "triton",
    )


def test_embedding_keeps_what_is_not_finite_to_its_token():
    tokens = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 4]])
    grad = torch.ones(1, 8, 2)
    grad[0, 1, 0] = float("inf")
    grad[0, 3, 0] = float("nan")
    grad[0, 5:7, 0] = torch.tensor([float("inf"), -float("inf")])
    grad[0, 7, 1] = -float("inf")
    wte = torch.zeros(6, 2, requires_grad=True)
    with backend("triton"):
        out = ops.embedding(tokens, torch.arange(8), wte, torch.zeros(8, 2))
    (ours,) = torch.autograd.grad(out, wte, grad)
    (exact,) = torch.autograd.grad(F.embedding(tokens, wte), wte, grad)
    torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True)


def test_adamw_of_many_tensors_of_all_kinds():
    settings = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.97, "eps": 1e-8, "weight_decay": 0.1}
    shapes = [(16,)] * 33 + [(4, 5), (0,), (1,), (7,), (80, 240)]
    results = []
    for name in ("triton", "reference"):
        torch.manual_seed(0)
        params = [torch.randn(shape) for shape in shapes]
        params += [torch.randn(48).bfloat16(), torch.randn(33)[1:], torch.randn(5).half()]
        grads = [torch.randn_like(p) for p in params]
        grads[37] = torch.randn(80, 480)[:, ::2]
        exp_avgs, exp_avg_sqs = ([torch.rand_like(p) for p in params] for _ in range(2))
        with backend(name):
            ops.fused_adamw(params, grads, exp_avgs, exp_avg_sqs, step=3, **settings)
        results.append([*params, *exp_avgs, *exp_avg_sqs])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
