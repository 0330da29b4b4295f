from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from comparison import BACKENDS, DTYPES, LAYOUTS, compare, contiguous, random, strided
from gpt2fast import backend, ops
from gpt2fast.errors import BackendError
from gpt2fast.ops.attention import _backward, _cached, _forward
from tolerance import assert_close


def torch_attention(q, k, v, mask=None, scale=None):
    time = q.shape[1]
    visible = torch.ones(time, time, dtype=torch.bool).tril()
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, visible, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 2, 64), (3, 17, 3, 32), (2, 65, 1, 40)], ids=str)
def test_matches_torch_at_odd_shapes(name, dtype, shape):
    compare(ops.causal_attention, torch_attention, [random(*shape) for _ in "qkv"], dtype, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_matches_torch_on_a_long_sequence(name):
    inputs = [random(1, 1023, 2, 64) for _ in "qkv"]
    compare(ops.causal_attention, torch_attention, inputs, torch.float32, name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_strided_and_unaligned_views(name, layout):
    inputs = [random(3, 17, 2, 32) for _ in "qkv"]
    compare(ops.causal_attention, torch_attention, inputs, torch.float32, name, layout)


@pytest.mark.parametrize("name", BACKENDS)
def test_reads_views_of_packed_qkv(name):
    def ours(qkv):
        return ops.causal_attention(*qkv.unbind(2))

    def theirs(qkv):
        return torch_attention(*qkv.unbind(2))

    compare(ours, theirs, [random(3, 17, 3, 2, 32)], torch.float32, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_scale_replaces_the_default(name):
    inputs = [random(2, 9, 2, 32) for _ in "qkv"]
    compare(
        lambda q, k, v: ops.causal_attention(q, k, v, scale=0.37),
        lambda q, k, v: torch_attention(q, k, v, scale=0.37),
        inputs,
        torch.float32,
        name,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_mask_with_a_visible_key_matches_torch(dtype):
    mask = torch.rand(3, 23) < 0.6
    mask[:, 0] = True
    compare(
        lambda q, k, v: ops.causal_attention(q, k, v, mask=mask),
        lambda q, k, v: torch_attention(q, k, v, mask=mask),
        [random(3, 23, 2, 32) for _ in "qkv"],
        dtype,
        "auto",
    )


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    q, k, v = (random(1, 6, 2, 32).float().requires_grad_() for _ in "qkv")
    mask = torch.tensor([[False, False, True, True, False, True]])
    out = ops.causal_attention(q, k, v, mask=mask)
    assert (out[0, :2] == 0).all() and (out[0, 2:] != 0).any()
    out.sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad.isfinite().all()
    assert (q.grad[0, :2] == 0).all() and (v.grad[0, ~mask[0]] == 0).all()


def test_one_seed_drops_the_same_weights_forward_and_backward():
    q, k = (random(2, 12, 2, 32) for _ in "qk")
    seed = torch.tensor([7])
    identity = torch.eye(12, dtype=torch.float64)[None, :, None, :].expand(2, 12, 2, 12)
    attend = torch.ops.gpt2fast.causal_attention
    # With the identity for values, the output is the matrix of dropped weights itself.
    padded = F.pad(identity, (0, 20))
    dropped = attend(q, k, padded, 0.2, None, 0.4, seed)[0][..., :12].transpose(1, 2)
    whole = attend(q, k, padded, 0.2, None, 0.0, None)[0][..., :12].transpose(1, 2)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], whole[kept] / 0.6)
    visible = torch.ones(12, 12).tril().bool().expand_as(kept)
    assert 0.5 < kept[visible].double().mean() < 0.7
    again = attend(q, k, padded, 0.2, None, 0.4, seed)[0][..., :12].transpose(1, 2)
    other = attend(q, k, padded, 0.2, None, 0.4, seed + 1)[0][..., :12].transpose(1, 2)
    assert torch.equal(dropped, again) and not torch.equal(dropped, other)


def test_gradient_with_dropout_passes_gradcheck():
    q, k, v = (random(1, 5, 2, 4).requires_grad_() for _ in "qkv")
    seed = torch.tensor([3])
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.causal_attention(q, k, v, None, None, 0.3, seed), (q, k, v)
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_passes_opcheck(name):
    q, k, v = (random(2, 7, 2, 32).float().requires_grad_() for _ in "qkv")
    with backend(name):
        opcheck(_forward.call, (q, k, v, 0.2, None, 0.0, None))
        detached = [x.detach() for x in (q, k, v)]
        out, lse = _forward.call(*detached, 0.2, None, 0.0, None)
        opcheck(_backward.call, (out, *detached, out, lse, 0.2, None, 0.0, None))


def test_compiles_into_one_graph():
    q, k, v = (random(2, 7, 2, 32).float().requires_grad_() for _ in "qkv")
    compiled = torch.compile(ops.causal_attention, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(ops.causal_attention(q, k, v).sum(), (q, k, v))
    got = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_forced_backend_says_what_it_cannot_do():
    q = random(1, 3, 1, 32)
    with backend("torch"), pytest.raises(BackendError, match="padding mask"):
        ops.causal_attention(q, q, q, mask=torch.ones(1, 3, dtype=torch.bool))


def test_mismatched_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 32\).*\(1, 4, 1, 32\)"):
        ops.causal_attention(random(1, 3, 1, 32), random(1, 4, 1, 32), random(1, 4, 1, 32))
    with pytest.raises(ValueError, match="seed"):
        ops.causal_attention(*[random(1, 3, 1, 32)] * 3, dropout_p=0.5)


def test_autocast_sets_the_dtype():
    q, k, v = (random(2, 5, 2, 32).float() for _ in "qkv")
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.causal_attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, strided])
def test_against_a_cache_equals_attention_over_the_whole_sequence(dtype, layout):
    heads, width, old, new = 2, 32, [0, 5, 11], 4
    rows = [[random(1, length + new, heads, width) for _ in "qkv"] for length in old]
    k_cache, v_cache = (torch.full((3, 20, heads, width), float("nan"), dtype=dtype) for _ in "kv")
    for row, (_, k, v) in enumerate(rows):
        k_cache[row, : k.shape[1]], v_cache[row, : v.shape[1]] = k[0].to(dtype), v[0].to(dtype)
    # Entries past a row's end are unspecified, keys too.
    k_cache = torch.where(k_cache.isnan(), 1e4, k_cache)
    queries = torch.cat([q[:, -new:] for q, _, _ in rows]).to(dtype)
    out = ops.attention_with_cache(layout(queries), k_cache, v_cache, torch.tensor(old))
    exact = torch.cat([torch_attention(*row)[:, -new:] for row in rows])
    other = torch.cat([torch_attention(*(x.to(dtype) for x in row))[:, -new:] for row in rows])
    assert_close([out], [other], [exact], times=2.0)


def test_cached_attention_passes_opcheck_and_refuses_a_gradient():
    q, cache = random(2, 1, 2, 32).float(), random(2, 8, 2, 32).float()
    opcheck(_cached.call, (q, cache, cache, torch.tensor([3, 5]), 0.2))
    out = ops.attention_with_cache(q.requires_grad_(), cache, cache, torch.tensor([3, 5]))
    with pytest.raises(NotImplementedError, match="causal_attention"):
        out.sum().backward()
