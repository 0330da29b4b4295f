"""Derivatives beyond one backward pass: of gradients, in forward mode, batched."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from comparison import BACKENDS, backend, random
from gpt2fast import ops
from gpt2fast.errors import ArgumentError
from op_arguments import CPU_BACKENDS, LACKS, arguments
from philox import cpu_factors, gpu_factors
from tolerance import assert_allclose, assert_close

TARGETS = torch.tensor([1, 4, -100, 0, 3])
TOKENS = torch.tensor([[1, 4, 2], [0, 4, 4]])
SEED = 123456789 << 31


def attend(q, k, v, mask=None, factors=1.0):
    time = q.shape[1]
    visible = torch.ones(time, time, dtype=torch.bool).tril()
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1) * factors
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def mlp(x, w_fc, b_fc, w_proj, b_proj):
    return F.gelu(x @ w_fc + b_fc, approximate="tanh") @ w_proj + b_proj


MASK = torch.tensor([[True, False, True, True], [True, True, True, False]])
# Name: the op, the same in plain torch, and what both are differentiated by.
OPS = {
    "residual_layer_norm": (
        ops.residual_layer_norm,
        lambda x, r, w, b: (F.layer_norm(x + r, w.shape, w, b), x + r),
        lambda: [random(2, 3, 8), random(2, 3, 8), random(8), random(8)],
    ),
    "a first residual_layer_norm": (
        lambda x, w, b: ops.residual_layer_norm(x, None, w, b),
        lambda x, w, b: (F.layer_norm(x, w.shape, w, b), x),
        lambda: [random(2, 3, 8), random(8), random(8)],
    ),
    "causal_attention": (
        ops.causal_attention,
        attend,
        lambda: [random(2, 4, 2, 8) for _ in "qkv"],
    ),
    "causal_attention with a mask": (
        lambda q, k, v: ops.causal_attention(q, k, v, mask=MASK),
        lambda q, k, v: attend(q, k, v, MASK),
        lambda: [random(2, 4, 2, 8) for _ in "qkv"],
    ),
    "bias_gelu": (
        ops.bias_gelu,
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        lambda: [random(2, 3, 8), random(8)],
    ),
    "gelu_mlp": (
        ops.gelu_mlp,
        mlp,
        lambda: [random(2, 3, 8), random(8, 16), random(16), random(16, 8), random(8)],
    ),
    "projection": (
        ops.projection,
        lambda x, w, b: x @ w + b,
        lambda: [random(2, 3, 8), random(8, 4), random(4)],
    ),
    "linear_cross_entropy": (
        lambda h, w: ops.linear_cross_entropy(h, w, TARGETS.to(h.device)),
        lambda h, w: F.cross_entropy(h @ w.t(), TARGETS.to(h.device)),
        lambda: [random(5, 8), random(6, 8)],
    ),
    "embedding": (
        lambda a, b: ops.embedding(TOKENS, torch.arange(3), a, b),
        lambda a, b: F.embedding(TOKENS, a) + F.embedding(torch.arange(3), b),
        lambda: [random(5, 8), random(4, 8)],
    ),
}
# Plain torch's backend refuses masks.
MASKED = [name for name in OPS if "mask" in name]


def scalar(outputs):
    """A function of an op's results whose second derivatives are not zero."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return sum((out.sin() + out**3).mean() for out in outputs)


def hessian_vector_products(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    generator = torch.Generator().manual_seed(5)
    vectors = [torch.randn(x.shape, generator=generator).to(x) for x in leaves]
    gradients = torch.autograd.grad(scalar(function(*leaves)), leaves, create_graph=True)
    total = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    return torch.autograd.grad(total, leaves)


def held_to_torch(results, inputs, dtype, name):
    """`results(function, inputs)` of ours in `dtype`, by the tolerance rule."""
    ours, theirs, make = OPS[name]
    inputs = make() if inputs is None else inputs
    exact = results(theirs, inputs)
    other = results(theirs, [x.to(dtype) for x in inputs])
    return exact, other, lambda: results(ours, [x.to(dtype) for x in inputs])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients_equal_torchs(name, op):
    if name == "torch" and op in MASKED:
        pytest.skip("torch's flash attention takes no mask here")
    exact, other, ours = held_to_torch(hessian_vector_products, None, torch.float32, op)
    with backend(name):
        assert_close(ours(), other, exact, times=3.0)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients_pass_gradgradcheck(name, op):
    if name == "torch" and op in MASKED:
        pytest.skip("torch's flash attention takes no mask here")
    ours, _, make = OPS[op]
    with backend(name):
        assert torch.autograd.gradgradcheck(ours, [x.requires_grad_() for x in make()])


@pytest.mark.parametrize("op", OPS)
def test_third_derivatives_and_batched_and_forward_ones_pass_gradcheck(op):
    ours, _, make = OPS[op]
    inputs = [x.requires_grad_() for x in make()]
    assert torch.autograd.gradcheck(
        ours,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )

    def hvp(*leaves):
        gradients = torch.autograd.grad(scalar(ours(*leaves)), leaves, create_graph=True)
        return sum(g.sin().sum() for g in gradients)

    scales = [x.new_ones(()).requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(
        lambda *scales: hvp(*(s * x.detach() for s, x in zip(scales, inputs, strict=True))), scales
    )


def jvp(function, inputs):
    tangents = [x.cos() for x in inputs]
    out = torch.func.jvp(function, tuple(inputs), tuple(tangents))[1]
    return [out] if isinstance(out, torch.Tensor) else list(out)


def dual_numbers(function, inputs):
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(x, x.cos()) for x in inputs))
        outs = [out] if isinstance(out, torch.Tensor) else out
        return [forward_ad.unpack_dual(o).tangent for o in outs]


def functional_gradient(function, inputs):
    return torch.func.grad(lambda *x: scalar(function(*x)), tuple(range(len(inputs))))(*inputs)


def forward_over_reverse(function, inputs):
    return torch.func.jvp(
        lambda *x: functional_gradient(function, x), tuple(inputs), tuple(x.cos() for x in inputs)
    )[1]


def reverse_over_reverse(function, inputs):
    def total(*x):
        return sum(g.sin().sum() for g in functional_gradient(function, x))

    return torch.func.grad(total, tuple(range(len(inputs))))(*inputs)


def jacobians(function, inputs):
    return [
        transform(lambda first: scalar(function(first, *inputs[1:])))(inputs[0])
        for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian)
    ]


def samples(function, inputs):
    """Over a batch of all inputs, and of the first alone."""
    batch = [torch.stack([x, 2 * x, -x]) for x in inputs]
    gradient = torch.func.grad(lambda *x: scalar(function(*x)), tuple(range(len(inputs))))
    alone = (0, *[None] * (len(inputs) - 1))
    return [
        *torch.vmap(gradient)(*batch),
        *torch.vmap(gradient, alone)(batch[0], *inputs[1:]),
        torch.vmap(lambda *x: scalar(function(*x)), in_dims=alone)(batch[0], *inputs[1:]),
        torch.vmap(lambda *x: jvp(function, x)[0])(*batch),
    ]


def linearized(function, inputs):
    out = torch.func.linearize(lambda *x: scalar(function(*x)), *inputs)[1](
        *(x.cos() for x in inputs)
    )
    return [out]


TRANSFORMS = [
    jvp, dual_numbers, functional_gradient, forward_over_reverse, reverse_over_reverse, jacobians,
    samples, linearized,
]  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func_equal_those_of_plain_torch(op, transform):
    exact, other, ours = held_to_torch(transform, None, torch.float32, op)
    assert_close(ours(), other, exact, times=3.0)


@pytest.mark.parametrize("name", [each for each in BACKENDS if each != "torch"])
def test_second_derivatives_drop_the_weights_that_the_forward_pass_dropped(name):
    inputs = [random(2, 40, 2, 8) for _ in "qkv"]
    factors_of = cpu_factors if name in ("native", "reference") else gpu_factors
    factors = factors_of(0.3, SEED, 2, 2, 40).to(torch.get_default_device())
    seed = torch.tensor([SEED])

    def ours(q, k, v):
        return ops.causal_attention(q, k, v, dropout_p=0.3, seed=seed)

    def theirs(q, k, v):
        return attend(q, k, v, factors=factors)

    exact = hessian_vector_products(theirs, inputs)
    other = hessian_vector_products(theirs, [x.float() for x in inputs])
    with backend(name):
        mine = hessian_vector_products(ours, [x.float() for x in inputs])
    assert_close(mine, other, exact, times=3.0)


def test_a_first_backward_pass_runs_the_kernels_of_the_chosen_backend():
    from gpt2fast.ops.backend import record_calls

    x, bias = random(2, 8).float().requires_grad_(), random(8).float()
    with record_calls() as calls, backend("torch"):
        ops.bias_gelu(x, bias).sum().backward()
    assert [call.backend for call in calls] == ["torch", "torch"]
    with record_calls() as calls, backend("torch"):
        torch.autograd.grad(ops.bias_gelu(x, bias).sum(), x, create_graph=True)
    assert [call.backend for call in calls] == ["torch", "reference"]


def test_a_learned_number_is_refused_and_the_way_out_has_its_gradient():
    q, k, v = (random(2, 4, 2, 8) for _ in "qkv")
    number = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(8, dtype=torch.float64)
    for call in (
        lambda: ops.causal_attention(q, k, v, scale=number),
        lambda: ops.causal_attention(q, k, v, dropout_p=number, seed=torch.tensor([1])),
        lambda: ops.attention_with_cache(q, k, v, torch.tensor([0, 0]), number),
        lambda: ops.residual_layer_norm(q, None, ones, ones, eps=number),
    ):
        with pytest.raises(ArgumentError, match="requires a gradient"):
            call()
    assert torch.equal(
        ops.causal_attention(q, k, v, scale=number.detach()),
        ops.causal_attention(q, k, v, scale=number.item()),
    )
    ours = torch.autograd.grad(ops.causal_attention(q * number, k, v, 1.0).sum(), number)[0]
    theirs = attend(q * (number * math.sqrt(8)), k, v).sum()
    assert_allclose(ours, torch.autograd.grad(theirs, number)[0])


def _float_arguments(given: dict[str, Any]) -> list[str]:
    """Those that may require a gradient, by name."""
    return [
        name
        for name, value in given.items()
        if isinstance(value[0] if isinstance(value, list) else value, torch.Tensor)
        and (value[0] if isinstance(value, list) else value).is_floating_point()
    ]


def _requiring(value: object) -> object:
    if isinstance(value, list):
        return [value[0].detach().requires_grad_(), *value[1:]]
    assert isinstance(value, torch.Tensor)
    return value.detach().requires_grad_()


WRITING = [
    (op, name)
    for op in ("append_to_cache", "reorder_cache", "decode_step", "packed_next", "fused_adamw")
    for name in _float_arguments(arguments()[op])
]


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize(("op", "argument"), WRITING)
def test_what_is_written_in_place_never_loses_a_gradient_in_silence(name, op, argument):
    """torch refuses `out=` in the same way where an argument requires a gradient."""
    if op in LACKS.get(name, ()):
        pytest.skip(f"{name} does not run {op} here")
    given = arguments()[op]
    plain = given[argument]
    given[argument] = _requiring(copy.deepcopy(plain))
    writes = [x for x in ("k_cache", "v_cache", "params", "exp_avgs") if x in given]
    copies = {x: copy.deepcopy(given[x]) for x in writes}
    with backend(name):
        with pytest.raises(NotImplementedError, match=f"writes in place, and {argument} requires"):
            getattr(ops, op)(**given)
        for x, kept in copies.items():
            pairs = zip(given[x], kept, strict=True)
            assert all(torch.equal(now, then) for now, then in pairs)
        with torch.no_grad():
            getattr(ops, op)(**given)
        given[argument] = plain
        getattr(ops, op)(**given)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_entries_that_are_detached_are_stored(name):
    k = random(2, 3, 2, 8).float().requires_grad_()
    with backend(name):
        caches = torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8)
        ops.append_to_cache(k.detach(), -k.detach(), *caches, torch.tensor([0, 3]))
        assert torch.equal(caches[0][1, 3:], k[1]) and not caches[0].requires_grad
