from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from comparison import BACKENDS, DTYPES, LAYOUTS, backend, compare, random
from gpt2fast import ops
from gpt2fast.ops.mlp import _bias_gelu, _gelu_mlp


def torch_bias_gelu(x, bias):
    return F.gelu(x + bias, approximate="tanh")


def torch_mlp(x, w_fc, b_fc, w_proj, b_proj):
    return F.gelu(x @ w_fc + b_fc, approximate="tanh") @ w_proj + b_proj


def mlp_inputs(*shape, inner=40):
    width = shape[-1]
    return [
        random(*shape),
        random(width, inner) / 8,
        random(inner),
        random(inner, width) / 8,
        random(width),
    ]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 48), (3, 17, 33), (1, 1023, 8)], ids=str)
def test_bias_gelu_matches_torch_at_odd_shapes(name, dtype, shape):
    compare(ops.bias_gelu, torch_bias_gelu, [random(*shape), random(shape[-1])], dtype, name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 16), (3, 17, 9), (1, 1023, 8)], ids=str)
def test_gelu_mlp_matches_torch_at_odd_shapes(name, dtype, shape):
    compare(ops.gelu_mlp, torch_mlp, mlp_inputs(*shape), dtype, name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_read_strided_and_unaligned_views(name, layout):
    compare(ops.gelu_mlp, torch_mlp, mlp_inputs(3, 17, 16), torch.float32, name, layout)
    pair = [random(3, 17, 16), random(16)]
    compare(ops.bias_gelu, torch_bias_gelu, pair, torch.float32, name, layout)


@pytest.mark.parametrize("name", BACKENDS)
def test_gelu_mlp_reads_transposed_linear_weights(name):
    x, w_fc, b_fc, w_proj, b_proj = mlp_inputs(2, 5, 16)
    compare(
        lambda x, a, b, c, d: ops.gelu_mlp(x, a.t(), b, c.t(), d),
        lambda x, a, b, c, d: torch_mlp(x, a.t(), b, c.t(), d),
        [x, w_fc.t().contiguous(), b_fc, w_proj.t().contiguous(), b_proj],
        torch.float32,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_both_pass_opcheck(name):
    arguments = [t.float().requires_grad_() for t in mlp_inputs(2, 7, 16)]
    with backend(name):
        opcheck(_gelu_mlp.call, arguments)
        opcheck(_bias_gelu.call, (arguments[0], arguments[4]))


@pytest.mark.parametrize("name", BACKENDS)
def test_gelu_mlp_compiles_into_one_graph(name):
    arguments = [t.float().requires_grad_() for t in mlp_inputs(2, 7, 16)]
    with backend(name):
        compiled = torch.compile(ops.gelu_mlp, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(ops.gelu_mlp(*arguments).sum(), arguments)
        got = torch.autograd.grad(compiled(*arguments).sum(), arguments)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_autocast_sets_the_dtype():
    arguments = [t.float() for t in mlp_inputs(2, 7, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.gelu_mlp(*arguments).dtype == torch.bfloat16


def test_mismatched_shapes_are_named():
    x, w_fc, b_fc, w_proj, b_proj = mlp_inputs(2, 7, 16)
    with pytest.raises(ValueError, match=r"\(in, out\)"):
        ops.gelu_mlp(x, w_fc.t(), b_fc, w_proj, b_proj)
    with pytest.raises(ValueError, match=r"\(40,\)"):
        ops.bias_gelu(x, b_fc)
