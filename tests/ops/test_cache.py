from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from comparison import BACKENDS, CUDA_BACKENDS, backend, needs_simulator, random, seeded
from gpt2fast import KVCache, ops
from gpt2fast.errors import ArgumentError, GenerationError
from gpt2fast.ops.cache import _append, _release, _reorder
from gpt2fast.ops.native import unavailable
from tolerance import assert_equal


def new_cache(rows=3, length=10):
    return KVCache(2, rows, length, 2, 4, torch.float32)


def append(cache, time, counts=None):
    """Store random entries in both layers; returns the keys of layer 0."""
    first = None
    cache.reserve(time, counts)
    for index in range(2):
        layer = cache.layer(index, counts)
        k, v = (random(cache.batch_size, time, 2, 4).float() for _ in "kv")
        ops.append_to_cache(k, v, layer.k, layer.v, layer.lengths, layer.counts)
        first = k if first is None else first
    cache.advance(time, counts, cache.positions + time)
    return first


def test_entries_go_behind_each_rows_end():
    cache = new_cache()
    first = append(cache, 4, torch.tensor([1, 4, 2]))
    second = append(cache, 2)
    assert cache.lengths.tolist() == [3, 6, 4]
    for row, count in enumerate([1, 4, 2]):
        assert_equal(cache.k[0, row, :count], first[row, :count])
        assert_equal(cache.k[0, row, count : count + 2], second[row])


def test_uncounted_entries_are_not_written_even_past_the_end():
    cache = new_cache(length=4)
    append(cache, 4, torch.tensor([4, 1, 0]))
    kept = cache.k.clone()
    append(cache, 4, torch.tensor([0, 3, 4]))
    assert cache.lengths.tolist() == [4, 4, 4]
    assert torch.equal(cache.k[:, 0], kept[:, 0]) and torch.equal(cache.k[:, 1, :1], kept[:, 1, :1])


def test_reordering_copies_and_drops_rows():
    cache = new_cache()
    append(cache, 5, torch.tensor([5, 2, 3]))
    before = cache.k.clone()
    cache.reorder(torch.tensor([2, 2]))
    assert cache.batch_size == 2 and cache.lengths.tolist() == [3, 3]
    assert_equal(cache.k[:, 0, :3], before[:, 2, :3])
    assert_equal(cache.k[:, 1, :3], before[:, 2, :3])
    with pytest.raises(GenerationError, match="expand"):
        cache.reorder(torch.tensor([0, 1, 0]))
    with pytest.raises(GenerationError, match=r"row 2 .* 0 \.\. 1"):
        cache.reorder(torch.tensor([0, 2]))
    with pytest.raises(GenerationError, match="row -1 "):
        cache.release(torch.tensor([-1]))


def test_expanding_repeats_rows_in_place():
    cache = new_cache(rows=2)
    append(cache, 3, torch.tensor([1, 3]))
    cache.expand(2)
    assert cache.lengths.tolist() == [1, 1, 3, 3]
    assert torch.equal(cache.k[:, 0], cache.k[:, 1]) and torch.equal(cache.v[:, 2], cache.v[:, 3])


def test_released_rows_begin_again():
    cache = new_cache()
    append(cache, 4)
    cache.release(torch.tensor([1]))
    assert cache.lengths.tolist() == [4, 0, 4] and cache.positions.tolist() == [4, 0, 4]
    new = append(cache, 1)
    assert_equal(cache.k[0, 1, 0], new[1, 0])


def test_overflow_names_the_limit_and_is_found_before_writing():
    cache = new_cache(length=5)
    append(cache, 4, torch.tensor([1, 4, 2]))
    before = cache.k.clone()
    with pytest.raises(GenerationError, match=r"holds 5 tokens.*need 6"):
        append(cache, 2)
    assert_equal(cache.k, before)
    append(cache, 2, torch.tensor([2, 1, 2]))
    assert cache.lengths.tolist() == [3, 5, 4]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "width"), [(3, 64), (2, 5), (1, 1)], ids=str)
def test_appending_to_views(name, stored, given, heads, width):
    packed = torch.randn(4, 7, 3, heads, width).to(given)
    _, k, v = packed.unbind(2)
    lengths, counts = torch.tensor([0, 3, 9, 5]), torch.tensor([7, 0, 3, -1])
    for cut in (lambda x: x, lambda x: x[:, 2:14], lambda x: x[..., :heads, :width]):
        whole = torch.zeros(2, 4, 16, heads + 1, width).to(stored)
        k_cache, v_cache = (cut(cache[..., :heads, :]) for cache in whole)
        expected_k, expected_v = k_cache.clone(), v_cache.clone()
        with backend(name):
            ops.append_to_cache(k, v, k_cache, v_cache, lengths, counts)
        for row, (begin, count) in enumerate(zip([0, 3, 9, 5], [7, 0, 3, 0], strict=True)):
            expected_k[row, begin : begin + count] = k[row, :count]
            expected_v[row, begin : begin + count] = v[row, :count]
        assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)
        assert (whole[..., heads, :] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_reordering_reads_rows_before_they_are_overwritten(name, dtype):
    generator = seeded(0)
    orders = [torch.randint(7, (n,), generator=generator) for n in (1, 3, 7, 7, 7, 7, 7)]
    orders += [torch.randperm(7, generator=generator) for _ in range(6)]
    orders += [torch.tensor(rows) for rows in ([1, 2, 3, 4, 5, 6, 0], [1, 0, 3, 2], [6] * 7, [])]
    for order in orders:
        order = order.long()
        k = torch.randint(-99, 99, (7, 5, 2, 3), generator=generator).to(dtype)
        wide = torch.randint(-99, 99, (7, 9, 3, 3), generator=generator).to(dtype)
        untouched = wide.clone()
        v = wide[:, 2:7, :2]
        before_k, before_v = k.clone(), v.clone()
        with backend(name):
            ops.reorder_cache(k, v, order)
        assert_equal(k[: len(order)], before_k[order])
        assert_equal(v[: len(order)], before_v[order])
        assert_equal(k[len(order) :], before_k[len(order) :])
        wide[:, 2:7, :2] = untouched[:, 2:7, :2]
        assert_equal(wide, untouched)


@pytest.mark.parametrize("name", BACKENDS)
def test_releasing_through_views(name):
    lengths, rows = torch.arange(1, 13), torch.tensor([3, 9, 0, 9, 5])
    with backend(name):
        ops.release_rows(lengths[::2], rows[::2])
    assert lengths.tolist() == [0, 2, 3, 4, 5, 6, 0, 8, 9, 10, 0, 12]


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_native_refuses_what_lies_outside():
    k, cache = torch.zeros(2, 3, 1, 4), torch.zeros(2, 5, 1, 4)
    with backend("native"):
        with pytest.raises(ArgumentError, match="row 1 holds 3 of at most 5 entries; 3 more"):
            ops.append_to_cache(k, k, cache, cache.clone(), torch.tensor([2, 3]))
        with pytest.raises(ArgumentError, match=r"lengths\[0\] = -1"):
            ops.append_to_cache(k, k, cache, cache.clone(), torch.tensor([-1, 0]))
        with pytest.raises(ArgumentError, match=r"rows\[1\] = 2 is not in 0 .. 1"):
            ops.reorder_cache(cache, cache.clone(), torch.tensor([0, 2]))
        with pytest.raises(ArgumentError, match=r"rows\[0\] = -3"):
            ops.release_rows(torch.tensor([4, 5]), torch.tensor([-3]))
        with pytest.raises(ArgumentError, match="must share one shape"):
            ops.append_to_cache(k, k, cache[..., :2], cache, torch.tensor([0, 0]))
        with pytest.raises(ArgumentError, match="must share one shape"):
            ops.attention_with_cache(k, cache[..., :2], cache, torch.tensor([0, 0]))


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 40, 6])
def test_cuda_stores_every_dtype_in_every_other(name, given, stored, width):
    packed = (100 * torch.randn(2, 5, 3, 2, width)).to(given)
    _, k, v = packed.unbind(2)
    k_cache, v_cache = torch.full((2, 2, 300, 2, width), float("nan"), dtype=stored)
    lengths, counts = torch.tensor([295, 17]), torch.tensor([9, 4])
    with backend(name):
        ops.append_to_cache(k, v, k_cache, v_cache, lengths, counts)
    for new, cache in ((k, k_cache), (v, v_cache)):
        assert_equal(cache[0, 295:], new[0].to(stored))
        assert_equal(cache[1, 17:21], new[1, :4].to(stored))
        assert cache[0, :295].isnan().all() and cache[1, :17].isnan().all()
        assert cache[1, 21:].isnan().all()


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("rows", [97, 400])
def test_cuda_reorders_many_rows(name, rows):
    k, v = torch.randn(2, rows, 3, 2, 8)
    order = torch.randint(rows, (rows,))
    expected_k, expected_v = k[order], v[order]
    with backend(name):
        ops.reorder_cache(k, v, order)
    assert torch.equal(k, expected_k) and torch.equal(v, expected_v)


@needs_simulator
def test_cuda_stops_at_what_lies_outside():
    k, cache = torch.zeros(2, 3, 1, 4), torch.zeros(2, 5, 1, 4)
    narrow, scales = cache.to(torch.int8), torch.zeros(2, 5, 1)
    with backend("simulator"):
        # The ops look at values on a CPU themselves; on a GPU the kernels are left to it.
        kernels = torch.ops.gpt2fast_cuda
        for lengths in map(torch.tensor, ([2, 3], [-1, 0])):
            with pytest.raises(RuntimeError, match="__trap"):
                kernels.append_to_cache(k, k, cache, cache.clone(), lengths, None)
            with pytest.raises(RuntimeError, match="__trap"):
                kernels.append_to_cache(
                    k, k, narrow, narrow.clone(), lengths, None, scales, scales.clone()
                )
        with pytest.raises(RuntimeError, match="k_scales are missing"):
            kernels.append_to_cache(k, k, narrow, narrow, lengths, None)
        with pytest.raises(RuntimeError, match="belong to int8 caches only"):
            kernels.attention_with_cache(k, cache, cache, lengths, 1.0, scales, scales)
        with pytest.raises(RuntimeError, match="a factor for each head's entry"):
            kernels.attention_with_cache(k, narrow, narrow, lengths, 1.0, scales[:, 1:], scales)
        with pytest.raises(RuntimeError, match="__trap"):
            kernels.reorder_cache(cache, cache.clone(), torch.tensor([0, 2]))
        with pytest.raises(RuntimeError, match="__trap"):
            kernels.release_rows(torch.tensor([4, 5]), torch.tensor([-3]))
        with pytest.raises(ArgumentError, match="must share one shape"):
            ops.append_to_cache(k, k, cache[..., :2], cache, torch.tensor([0, 0]))
        with pytest.raises(ArgumentError, match="must share one shape"):
            ops.attention_with_cache(k, cache[..., :2], cache, torch.tensor([0, 0]))


def test_the_ops_pass_opcheck():
    k, v, k_cache, v_cache = (
        random(2, 3, 2, 4),
        random(2, 3, 2, 4),
        random(2, 9, 2, 4),
        random(2, 9, 2, 4),
    )
    opcheck(_append.call, (k, v, k_cache, v_cache, torch.tensor([1, 5]), None))
    opcheck(_reorder.call, (k_cache, v_cache, torch.tensor([1, 0])))
    opcheck(_release.call, (torch.tensor([4, 5]), torch.tensor([1])))
    # Which entries are written depends on the values of counts: shapes that vary with data.
    opcheck(
        _append.call,
        (k, v, k_cache, v_cache, torch.tensor([1, 5]), torch.tensor([2, 1])),
    )
