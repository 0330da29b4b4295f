from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from comparison import BACKENDS, DTYPES, LAYOUTS, backend, compare, random
from gpt2fast import ops
from gpt2fast.ops.layer_norm import _forward
from tolerance import assert_close


def torch_layer_norm(x, residual, weight, bias):
    summed = x + residual
    return F.layer_norm(summed, weight.shape, weight, bias), summed


def inputs(*shape):
    return [random(*shape), random(*shape), random(shape[-1]), random(shape[-1])]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 48), (3, 17, 33), (1, 1023, 8)], ids=str)
def test_matches_torch_at_odd_shapes(name, dtype, shape):
    compare(ops.residual_layer_norm, torch_layer_norm, inputs(*shape), dtype, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_wider_than_a_program_holds(name):
    compare(ops.residual_layer_norm, torch_layer_norm, inputs(2, 8193), torch.float32, name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_strided_and_unaligned_views(name, layout):
    compare(
        ops.residual_layer_norm, torch_layer_norm, inputs(3, 17, 24), torch.float32, name, layout
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_residual_it_normalizes_x(name, dtype):
    x, _, weight, bias = inputs(2, 5, 24)
    compare(
        lambda x, w, b: ops.residual_layer_norm(x, None, w, b)[0],
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        [x, weight, bias],
        dtype,
        name,
    )
    assert ops.residual_layer_norm(x, None, weight, bias)[1] is x


@pytest.mark.parametrize("name", BACKENDS)
def test_a_wide_residual_stays_wide(name):
    x, residual, weight, bias = inputs(2, 5, 24)
    with backend(name):
        normed, summed = ops.residual_layer_norm(
            x.bfloat16(), residual.float(), weight.float(), bias.float()
        )
    assert normed.dtype == torch.bfloat16 and summed.dtype == torch.float32
    exact = torch_layer_norm(x, residual, weight, bias)
    assert_close([summed], [summed], [exact[1]], times=2.0)
    rounded = exact[0].bfloat16()
    assert_close([normed], [rounded], [exact[0]], times=2.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_large_offsets_do_not_cancel_the_variance(name):
    x = (1e4 + torch.randn(4, 64)).double()
    weight, bias = torch.ones(64), torch.zeros(64)
    exact = F.layer_norm(x, (64,))
    with backend(name):
        normed, _ = ops.residual_layer_norm(x.float(), None, weight, bias)
    other = F.layer_norm(x.float(), (64,))
    assert_close([normed], [other], [exact], times=2.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_passes_opcheck(name):
    x, residual, weight, bias = (t.float().requires_grad_() for t in inputs(2, 7, 16))
    with backend(name):
        opcheck(_forward.call, (x, residual, weight, bias, 1e-5))
        opcheck(_forward.call, (x, None, weight, bias, 1e-5))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_into_one_graph(name):
    arguments = [t.float().requires_grad_() for t in inputs(2, 7, 16)]

    def loss(*arguments):
        normed, summed = ops.residual_layer_norm(*arguments)
        return (normed * summed).sum()

    with backend(name):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(loss(*arguments), arguments)
        got = torch.autograd.grad(compiled(*arguments), arguments)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_mismatched_shapes_are_named():
    x, residual, weight, bias = inputs(2, 7, 16)
    with pytest.raises(ValueError, match=r"\(15,\)"):
        ops.residual_layer_norm(x, residual, weight[1:], bias)
    with pytest.raises(ValueError, match=r"\(2, 6, 16\)"):
        ops.residual_layer_norm(x, residual[:, 1:], weight, bias)
