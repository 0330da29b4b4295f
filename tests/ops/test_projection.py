from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from comparison import DTYPES, LAYOUTS, backend, compare, needs_native, random
from gpt2fast import GPT2, GPT2Config, ops
from gpt2fast.nn import Projection
from gpt2fast.ops import matmul as matmuls
from gpt2fast.ops.matmul import matmul, product, weight_gradient
from gpt2fast.ops.projection import _projection
from tolerance import assert_close

BACKENDS = [pytest.param("native", marks=needs_native), "torch", "reference"]


@pytest.fixture
def ours(monkeypatch):
    """Products of any size and shape run on our kernels, where there are any.

    No setting: which shapes those are was measured, and differs between machines.
    """
    monkeypatch.setattr(matmuls, "_is_faster", lambda *shape: True)


def theirs(x, weight, bias):
    return F.linear(x, weight.t(), bias)


def inputs(*shape, out=40):
    return [random(*shape), random(shape[-1], out) / 8, random(out)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 16), (3, 17, 33), (1, 1023, 7)], ids=str)
def test_matches_torch_at_odd_shapes(name, dtype, shape, ours):
    compare(ops.projection, theirs, inputs(*shape, out=65), dtype, name)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_that_are_summed_in_several_goes(dtype, ours):
    compare(ops.projection, theirs, inputs(19, 4100), dtype, "native")


@needs_native
def test_more_rows_than_are_packed_at_once(ours):
    compare(ops.projection, theirs, inputs(3000, 1025, out=33), torch.float32, "native")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_strided_and_unaligned_views(name, layout, ours):
    compare(ops.projection, theirs, inputs(3, 17, 16), torch.float32, name, layout)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_transposed_linear_weights(name, dtype, ours):
    x, weight, bias = inputs(2, 37, 16)
    compare(
        lambda x, w, b: ops.projection(x, w.t(), b),
        F.linear,
        [x, weight.t().contiguous(), bias],
        dtype,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_that_nobody_wants_are_left_out(name, frozen, ours):
    arguments = [t.float().requires_grad_(i != frozen) for i, t in enumerate(inputs(5, 16))]
    wanted = [t for t in arguments if t.requires_grad]
    expected = torch.autograd.grad(theirs(*arguments).sum(), wanted)
    with backend(name):
        got = torch.autograd.grad(ops.projection(*arguments).sum(), wanted)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", BACKENDS)
def test_passes_opcheck(name):
    arguments = [t.float().requires_grad_() for t in inputs(2, 7, 16)]
    with backend(name):
        opcheck(_projection.call, arguments)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_one_graph(name, autocast):
    arguments = [t.float().requires_grad_() for t in inputs(2, 7, 16)]

    def run(*arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ops.projection(*arguments)

    with backend(name):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(run(*arguments).sum(), arguments)
        got = torch.autograd.grad(compiled(*arguments).sum(), arguments)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_sets_the_dtype_and_gradients_keep_theirs(name, ours):
    arguments = inputs(3, 35, 64)
    exact = [t.clone().requires_grad_() for t in arguments]
    leaves = [t.float().requires_grad_() for t in arguments]
    other = [t.float().requires_grad_() for t in arguments]
    direction = random(3, 35, 40)
    with torch.autocast("cpu", torch.bfloat16):
        with backend(name):
            mine = ops.projection(*leaves)
        linear = theirs(*other)
    assert mine.dtype == linear.dtype == torch.bfloat16
    expected = torch.autograd.grad(theirs(*exact), exact, direction)
    with backend(name):
        got = torch.autograd.grad(mine, leaves, direction.bfloat16())
    usual = torch.autograd.grad(linear, other, direction.bfloat16())
    assert [g.dtype for g in got] == [torch.float32] * 3
    assert_close(got, usual, expected, times=3.0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adds_to_what_is_there(dtype, ours):
    a, b, out = random(33, 50), random(50, 40), random(33, 40).float()
    expected = out.double() + a @ b
    matmul(a.to(dtype), b.to(dtype), dtype, out=out, add=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


class Multiplied(TorchDispatchMode):
    """Notes the dtypes that torch multiplies."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_16_bits_without_a_kernel_of_torchs_are_multiplied_in_32(dtype, out_dtype, monkeypatch):
    monkeypatch.setattr(matmuls, "_WIDENED", {dtype})
    monkeypatch.setattr(matmuls, "_is_faster", lambda *shape: False)
    a, b, bias = inputs(19, 33, out=65)
    a, b, bias = a.to(dtype), b.float(), bias.float()
    rounded = b.to(dtype)
    expected = a.double() @ rounded.double()
    into = torch.ones(19, 65, dtype=out_dtype or dtype)
    with Multiplied() as multiplied:
        results = {
            "plain": matmul(a, b, dtype, out_dtype=out_dtype),
            "bias": matmul(a, b, dtype, out_dtype=out_dtype, bias=bias),
            "add": matmul(a, b, dtype, out=into, add=True),
            "product": product(a, rounded),
            "product with a bias": product(a, rounded, bias.to(dtype)),
        }
    assert multiplied.dtypes == {torch.float32}
    for name, result in results.items():
        more = bias.to(dtype).double() if "bias" in name else 1.0 if name == "add" else 0.0
        assert result.dtype == (dtype if "product" in name else out_dtype or dtype), name
        error = 1e-5 if result.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(
            result.double(), expected + more, rtol=error, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_without_a_kernel_of_torchs_are_multiplied_in_32(autocast, monkeypatch):
    model = GPT2(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=65)).eval()
    tokens = torch.randint(65, (2, 9))
    if not autocast:
        model.bfloat16()

    def logits(widened):
        monkeypatch.setattr(matmuls, "_WIDENED", widened)
        enabled = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
        with enabled, torch.no_grad(), Multiplied() as multiplied:
            results = model(tokens).logits, model(tokens, labels=tokens).logits
        return results, multiplied.dtypes

    expected, narrow = logits(set())
    results, wide = logits({torch.bfloat16})
    # Products within an op are not noted.
    assert torch.bfloat16 in narrow and torch.bfloat16 not in wide
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == reference.dtype
        torch.testing.assert_close(result, reference, rtol=0.02, atol=0.01)


@needs_native
def test_a_weight_gradient_lies_as_its_weight_does(ours):
    x, grad = random(33, 24).float(), random(33, 40).float()
    for weight in (torch.empty(24, 40), torch.empty(40, 24).t()):
        sums = torch.empty(40)
        got = weight_gradient(x, grad, weight, sums)
        assert got.stride() == weight.stride()
        torch.testing.assert_close(got, x.t() @ grad)
        torch.testing.assert_close(sums, grad.sum(0))


@needs_native
def test_the_same_bits_on_any_number_of_threads(ours):
    x, weight, bias = (t.float() for t in inputs(300, 96, out=200))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.projection(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_is_not_finite_stays_so(ours):
    x, weight, bias = (t.float() for t in inputs(40, 16))
    x[3, 5] = float("nan")
    weight[2, 7] = float("inf")
    result = ops.projection(x, weight, bias)
    assert result[3].isnan().all() and not result[:, 7].isfinite().any()
    assert result[0, :7].isfinite().all()


def test_mismatched_shapes_are_named():
    x, weight, bias = inputs(2, 7, 16)
    with pytest.raises(ValueError, match=r"\(in, out\)"):
        ops.projection(x, weight.t(), bias)
    with pytest.raises(ValueError, match=r"\(16,\)"):
        ops.projection(x, weight, bias[:16])


def test_the_module_calls_the_op():
    module = Projection(16, 40)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(module(x), theirs(x, module.weight, module.bias))
