from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from comparison import BACKENDS, DTYPES, LAYOUTS, backend, compare, contiguous, random, strided
from gpt2fast import ops
from gpt2fast.errors import BackendError
from gpt2fast.ops.attention import _backward, _cached, _forward
from philox import cpu_factors, gpu_factors
from tolerance import assert_allclose, assert_close

# torch's flash attention takes neither mask nor dropout.
WITH_MASK = [name for name in BACKENDS if name != "torch"]


def torch_attention(q, k, v, mask=None, scale=None):
    time = q.shape[1]
    visible = torch.ones(time, time, dtype=torch.bool).tril()
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, visible, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 1, 2, 64), (3, 17, 3, 32), (2, 65, 1, 40), (1, 57, 2, 128), (2, 9, 1, 7), (1, 100, 2, 64)],
    ids=str,
)
def test_matches_torch_at_odd_shapes(name, dtype, shape):
    compare(ops.causal_attention, torch_attention, [random(*shape) for _ in "qkv"], dtype, name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_torch_on_a_long_sequence(name, dtype):
    heads = 1 if name == "triton" else 2  # the interpreter takes its time
    inputs = [random(1, 1023, heads, 64) for _ in "qkv"]
    compare(ops.causal_attention, torch_attention, inputs, dtype, name)


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


@pytest.mark.parametrize("name", WITH_MASK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("time", [23, 130])
def test_any_mask_with_a_visible_key_matches_torch(name, dtype, time):
    mask = torch.rand(3, time) < 0.6
    mask[:, 0] = True
    compare(
        lambda q, k, v: ops.causal_attention(q, k, v, mask=mask),
        lambda q, k, v: torch_attention(q, k, v, mask=mask),
        [random(3, time, 2, 32) for _ in "qkv"],
        dtype,
        name,
    )


@pytest.mark.parametrize("name", WITH_MASK)
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(name):
    q, k, v = (random(1, 6, 2, 32).float().requires_grad_() for _ in "qkv")
    mask = torch.tensor([[False, False, True, True, False, True]])
    with backend(name):
        out = ops.causal_attention(q, k, v, mask=mask)
        assert (out[0, :2] == 0).all() and (out[0, 2:] != 0).any()
        out.sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad.isfinite().all()
    assert (q.grad[0, :2] == 0).all() and (v.grad[0, ~mask[0]] == 0).all()


@pytest.mark.parametrize("name", WITH_MASK)
def test_one_seed_drops_the_same_weights_forward_and_backward(name):
    q, k = (random(2, 12, 2, 32).float() for _ in "qk")
    seed = torch.tensor([7])
    identity = torch.eye(12)[None, :, None, :].expand(2, 12, 2, 12)
    # With the identity for values, the output is the matrix of dropped weights itself.
    padded = F.pad(identity, (0, 20)).clone().requires_grad_()

    def attend(p, seed):
        return torch.ops.gpt2fast.causal_attention(q, k, padded, 0.2, None, p, seed, True)[0]

    def weights(p, seed):
        return attend(p, seed)[..., :12].transpose(1, 2)

    with backend(name):
        dropped, whole = weights(0.375, seed), weights(0.0, None)
        kept = dropped != 0
        assert_allclose(dropped[kept], whole[kept] / 0.625)
        visible = torch.ones(12, 12).tril().bool().expand_as(kept)
        assert 0.5 < kept[visible].double().mean() < 0.7
        again, other = weights(0.375, seed), weights(0.375, seed + 1)
        assert torch.equal(dropped, again) and not torch.equal(dropped, other)
        # The values' gradient is the transposed matrix of the very weights of the forward pass.
        (gradient,) = torch.autograd.grad(attend(0.375, seed)[..., 0].sum(), padded)
    assert_allclose(gradient[..., 0].transpose(1, 2), dropped.sum(2))


@pytest.mark.parametrize("name", [name for name in WITH_MASK if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_dropout_is_a_function_of_seed_and_place(name, dtype, masked):
    check_dropout(name, dtype, masked, 2, 70, 3, 36)


@pytest.mark.parametrize("name", [name for name in WITH_MASK if name != "reference"])
def test_dropout_goes_on_in_the_next_head_row_and_block(name):
    # One more key than a tile of 32 or 64 has; the CPU's have 56.
    check_dropout(name, torch.float32, False, 2, 33 if name == "triton" else 65, 2, 16)


def check_dropout(name, dtype, masked, batch, time, heads, width):
    p, seed = 0.3, 123456789 << 31
    factors_of = cpu_factors if name == "native" else gpu_factors
    factors = factors_of(p, seed, batch, heads, time).to(torch.get_default_device())
    visible = torch.ones(time, time).tril().bool()
    kept = factors[..., visible]
    # Of a mean of n factors with variance p / (1 - p); 4 standard deviations.
    assert abs(kept.mean() - 1.0) < 4 * math.sqrt(p / (1.0 - p) / kept.numel())
    mask = torch.rand(batch, time) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
        visible = visible & mask[:, None, None, :]

    def theirs(q, k, v):
        scores = torch.einsum("bthd,bshd->bhts", q, k).to(torch.promote_types(dtype, v.dtype)) / 6
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1) * factors
        return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)

    compare(
        lambda q, k, v: ops.causal_attention(q, k, v, 1 / 6, mask, p, torch.tensor([seed])),
        theirs,
        [random(batch, time, heads, width) for _ in "qkv"],
        dtype,
        name,
    )


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
        opcheck(_forward.call, (q, k, v, 0.2, None, 0.0, None, True))
        detached = [x.detach() for x in (q, k, v)]
        out, lse = _forward.call(*detached, 0.2, None, 0.0, None, True)
        opcheck(_backward.call, (out, *detached, out, lse, 0.2, None, 0.0, None, True))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_into_one_graph(name):
    q, k, v = (random(2, 7, 2, 32).float().requires_grad_() for _ in "qkv")
    with backend(name):
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


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, strided])
@pytest.mark.parametrize(
    ("heads", "width", "old", "new"),
    [(2, 32, [0, 5, 11], 4), (3, 64, [0, 40, 130], 1), (1, 33, [7, 0], 70), (2, 6, [64, 3], 33)],
    ids=str,
)
def test_against_a_cache_equals_attention_over_the_whole_sequence(
    name, dtype, stored, layout, heads, width, old, new
):
    rows = [[random(1, length + new, heads, width) for _ in "qkv"] for length in old]
    entries = max(old) + new + 3
    caches = torch.full((2, len(old), entries, heads + 1, width), float("nan"), dtype=stored)
    k_cache, v_cache = caches[..., :heads, :]
    for row, (_, k, v) in enumerate(rows):
        k_cache[row, : k.shape[1]], v_cache[row, : v.shape[1]] = k[0].to(stored), v[0].to(stored)
    # Entries past a row's end are unspecified, keys too.
    k_cache[k_cache.isnan()] = 1e4
    queries = torch.cat([q[:, -new:] for q, _, _ in rows]).to(dtype)
    with backend(name):
        out = ops.attention_with_cache(layout(queries), k_cache, v_cache, torch.tensor(old))
    exact = torch.cat([torch_attention(*row)[:, -new:] for row in rows])
    other = torch.cat([torch_attention(*(x.to(dtype) for x in row))[:, -new:] for row in rows])
    assert_close([out], [other], [exact], times=2.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_queries_past_the_end_of_a_cache_leave_the_others_alone(name):
    cache = random(2, 40, 2, 16).float()
    q = random(2, 36, 2, 16).float()
    with backend(name):
        alone = ops.attention_with_cache(q[:, :3], cache, cache, torch.tensor([1, 37]))
        padded = ops.attention_with_cache(q, cache, cache, torch.tensor([1, 37]))
    assert_allclose(padded[1, :3], alone[1], atol=1e-5)
    assert_allclose(padded[0, :3], alone[0], atol=1e-5)


def test_cached_attention_passes_opcheck_and_refuses_a_gradient():
    q, cache = random(2, 1, 2, 32).float(), random(2, 8, 2, 32).float()
    opcheck(_cached.call, (q, cache, cache, torch.tensor([3, 5]), 0.2))
    out = ops.attention_with_cache(q.requires_grad_(), cache, cache, torch.tensor([3, 5]))
    with pytest.raises(NotImplementedError, match="causal_attention"):
        out.sum().backward()
