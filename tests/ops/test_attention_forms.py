"""Attention that is not causal, and with fewer heads of keys and values than of queries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from comparison import BACKENDS, DTYPES, LAYOUTS, backend, compare, needs_native, random
from gpt2fast import ops
from gpt2fast.errors import ArgumentError
from gpt2fast.ops.attention import _backward, _forward
from gpt2fast.ops.backend import record_calls
from philox import cpu_factors, gpu_factors
from tolerance import assert_close

# torch's flash attention takes neither mask nor dropout.
WITH_MASK = [each for each in BACKENDS if each != "torch"]
# Heads of queries and of keys, and whether attention is causal.
SHARING = [(2, 2, False), (4, 2, True), (4, 2, False), (3, 1, True), (3, 1, False)]


def torch_attention(q, k, v, causal, mask=None, scale=None):
    time = q.shape[1]
    visible = torch.ones(time, time, dtype=torch.bool)
    if causal:
        visible = visible.tril()
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, visible, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def inputs(batch, time, heads, key_heads, width):
    return [random(batch, time, count, width) for count in (heads, key_heads, key_heads)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 64), (3, 17, 32), (2, 65, 40), (1, 57, 128)], ids=str)
def test_matches_torch_in_every_form(name, dtype, sharing, shape):
    (heads, key_heads, causal), (batch, time, width) = sharing, shape
    compare(
        lambda q, k, v: ops.attention(q, k, v, causal=causal),
        lambda q, k, v: torch_attention(q, k, v, causal),
        inputs(batch, time, heads, key_heads, width),
        dtype,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_torch_on_a_long_sequence_that_is_not_causal(name, dtype):
    compare(
        ops.attention,
        lambda q, k, v: torch_attention(q, k, v, False),
        inputs(1, 1023, 2, 1, 64),
        dtype,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_causal_attention_takes_fewer_key_heads(name):
    compare(
        ops.causal_attention,
        lambda q, k, v: torch_attention(q, k, v, True),
        inputs(2, 33, 6, 2, 16),
        torch.float32,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_reads_strided_and_unaligned_views(name, layout, sharing):
    heads, key_heads, causal = sharing
    compare(
        lambda q, k, v: ops.attention(q, k, v, causal=causal),
        lambda q, k, v: torch_attention(q, k, v, causal),
        inputs(3, 17, heads, key_heads, 32),
        torch.float32,
        name,
        layout,
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_reads_views_of_packed_heads(name, causal):
    def heads(x):
        return x.unflatten(2, (8, 32)).split([4, 2, 2], 2)

    compare(
        lambda x: ops.attention(*heads(x), causal=causal),
        lambda x: torch_attention(*heads(x), causal),
        [random(3, 17, 8 * 32)],
        torch.float32,
        name,
    )


@pytest.mark.parametrize("name", WITH_MASK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize("time", [23, 130])
def test_any_mask_with_a_visible_key_matches_torch(name, dtype, sharing, time):
    heads, key_heads, causal = sharing
    mask = torch.rand(3, time) < 0.6
    mask[:, 0] = True
    compare(
        lambda q, k, v: ops.attention(q, k, v, 0.3, mask, causal=causal),
        lambda q, k, v: torch_attention(q, k, v, causal, mask, 0.3),
        inputs(3, time, heads, key_heads, 32),
        dtype,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_keys_past_the_end_do_not_count_where_all_scores_are_far_below_theirs(name, causal):
    q, k, v = inputs(2, 17, 2, 1, 32)
    compare(
        lambda q, k, v: ops.attention(q, k, v, 8.0, causal=causal),
        lambda q, k, v: torch_attention(q, k, v, causal, scale=8.0),
        [q.abs(), -k.abs(), v],  # scores of some -160, beside 0 of keys that are filled up
        torch.bfloat16,  # in float32, how torch rounds such scores is the whole error
        name,
    )


@pytest.mark.parametrize("name", WITH_MASK)
def test_queries_see_keys_after_them_and_none_in_a_row_of_padding(name):
    q, k, v = (x.float().requires_grad_() for x in inputs(2, 6, 4, 2, 32))
    mask = torch.tensor([[False, False, False, True, False, True], [False] * 6])
    with backend(name):
        out = ops.attention(q, k, v, mask=mask)
        out.sum().backward()
        lse = torch.ops.gpt2fast.causal_attention(q, k, v, 0.2, mask, 0.0, None, False)[1]
    assert (out[0] != 0).any(-1).all() and (out[1] == 0).all()
    assert lse[0].isfinite().all() and (lse[1] == math.inf).all()
    for tensor in (q, k, v):
        assert tensor.grad.isfinite().all() and (tensor.grad[1] == 0).all()
    assert (v.grad[0, ~mask[0]] == 0).all() and (v.grad[0, mask[0]] != 0).all()


@pytest.mark.parametrize("name", WITH_MASK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_draws_by_query_head(name, dtype, sharing, masked):
    (heads, key_heads, causal), batch, time, p, seed = sharing, 2, 70, 0.3, 123456789 << 31
    factors_of = cpu_factors if name in ("native", "reference") else gpu_factors
    factors = factors_of(p, seed, batch, heads, time).to(torch.get_default_device())
    visible = torch.ones(time, time, dtype=torch.bool)
    if causal:
        visible = visible.tril()
    mask = torch.rand(batch, time) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
        visible = visible & mask[:, None, None, :]

    def theirs(q, k, v):
        k, v = (x.repeat_interleave(heads // key_heads, 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k).to(torch.promote_types(dtype, v.dtype)) / 6
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1) * factors
        return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)

    compare(
        lambda q, k, v: ops.attention(q, k, v, 1 / 6, mask, p, torch.tensor([seed]), causal),
        theirs,
        inputs(batch, time, heads, key_heads, 36),
        dtype,
        name,
    )


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_derivatives_of_any_order_in_both_modes_and_batched(sharing, p):
    heads, key_heads, causal = sharing
    given = [x.requires_grad_() for x in inputs(1, 4, heads, key_heads, 4)]
    seed, mask = torch.tensor([3]), torch.tensor([[True, True, False, True]])

    def attend(q, k, v):
        return ops.attention(q, k, v, 0.4, mask, p, seed, causal)

    assert torch.autograd.gradcheck(attend, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attend, given)
    several = [torch.stack([x, 2 * x, -x]).detach() for x in given]
    batched = torch.func.vmap(attend)(*several)
    for row, out in zip(zip(*several, strict=True), batched, strict=True):
        assert_close([attend(*row)], [out], [out], times=2.0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_passes_opcheck(name, sharing):
    heads, key_heads, causal = sharing
    q, k, v = (x.float().requires_grad_() for x in inputs(2, 7, heads, key_heads, 32))
    options = 0.2, None, 0.0, None, causal
    with backend(name):
        opcheck(_forward.call, (q, k, v, *options))
        detached = [x.detach() for x in (q, k, v)]
        out, lse = _forward.call(*detached, *options)
        opcheck(_backward.call, (out, *detached, out, lse, *options))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_compiles_into_one_graph(name, sharing):
    heads, key_heads, causal = sharing
    given = [x.float().requires_grad_() for x in inputs(2, 7, heads, key_heads, 32)]

    def attend(q, k, v):
        return ops.attention(q, k, v, causal=causal)

    with backend(name):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(attend(*given).sum(), given)
        got = torch.autograd.grad(compiled(*given).sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_autocast_sets_the_dtype():
    q, k, v = (x.float() for x in inputs(2, 5, 4, 2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 3), (2, 4), (3, 0), (0, 2)])
def test_key_heads_that_do_not_divide_the_query_heads_are_named(heads, key_heads):
    with pytest.raises(ArgumentError, match=f"the {key_heads} heads.*the {heads} heads"):
        ops.attention(*inputs(1, 3, heads, key_heads, 8))


def test_keys_of_another_length_are_refused():
    q, k, v = random(1, 3, 2, 8), random(1, 4, 2, 8), random(1, 4, 2, 8)
    with pytest.raises(ArgumentError, match=r"\(1, 3, 2, 8\).*\(1, 4, 2, 8\)"):
        ops.attention(q, k, v)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_the_cpu_kernels_give_the_same_bits_on_any_number_of_threads(dtype, causal):
    given = [x.to(dtype).requires_grad_() for x in inputs(2, 70, 6, 2, 24)]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with record_calls() as calls:
                out = ops.attention(*given, causal=causal)
                results.append((out, *torch.autograd.grad(out.float().square().sum(), given)))
            assert [call.backend for call in calls] == ["native", "native"]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
