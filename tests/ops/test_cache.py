from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from comparison import random
from gpt2fast import KVCache, ops
from gpt2fast.errors import GenerationError
from gpt2fast.ops.cache import _append, _release, _reorder


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
        assert torch.equal(cache.k[0, row, :count], first[row, :count])
        assert torch.equal(cache.k[0, row, count : count + 2], second[row])


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
    assert torch.equal(cache.k[:, 0, :3], before[:, 2, :3])
    assert torch.equal(cache.k[:, 1, :3], before[:, 2, :3])
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
    assert torch.equal(cache.k[0, 1, 0], new[1, 0])


def test_overflow_names_the_limit_and_is_found_before_writing():
    cache = new_cache(length=5)
    append(cache, 4, torch.tensor([1, 4, 2]))
    before = cache.k.clone()
    with pytest.raises(GenerationError, match=r"holds 5 tokens.*need 6"):
        append(cache, 2)
    assert torch.equal(cache.k, before)
    append(cache, 2, torch.tensor([2, 1, 2]))
    assert cache.lengths.tolist() == [3, 5, 4]


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
