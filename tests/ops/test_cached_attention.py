"""Attention to a cache in the CUDA kernels: shapes at the borders of splits, groups and tiles."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from comparison import CUDA_BACKENDS, backend, random, unaligned
from gpt2fast import ops
from gpt2fast.errors import BackendError
from gpt2fast.ops.attention import _cached
from tolerance import assert_allclose, assert_close, assert_equal

pytestmark = pytest.mark.parametrize("name", CUDA_BACKENDS)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(name, q, caches, lengths, dtype, stored):
    """`q` and `caches` in float64; what lies behind the rows' ends becomes NaN, keys too."""
    time = q.shape[1]
    for row, length in enumerate(lengths):
        caches[:, row, length + time :] = float("nan")
    lengths = torch.tensor(lengths)
    with backend("reference"):
        exact = ops.attention_with_cache(q, *caches, lengths)
        other = ops.attention_with_cache(q.to(dtype), *caches.to(stored), lengths)
    with backend(name):
        ours = ops.attention_with_cache(q.to(dtype), *caches.to(stored), lengths)
    assert ours.dtype == dtype
    assert_close([ours], [other], [exact], times=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [1, 2, 5, 17])
@pytest.mark.parametrize(
    ("entries", "lengths"), [(33, [0, 7, 16]), (150, [64, 127, 133]), (1023, [1006, 300])], ids=str
)
def test_ragged_rows(name, dtype, time, entries, lengths):
    q = random(len(lengths), time, 2, 64)
    compare(name, q, random(2, len(lengths), entries, 2, 64), lengths, dtype, dtype)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("time", [1, 3])
@pytest.mark.parametrize("width", [1, 8, 32, 40, 64, 72, 96, 128])
def test_head_sizes(name, stored, time, width):
    compare(
        name, random(2, time, 3, width), random(2, 2, 70, 3, width), [0, 66], torch.float32, stored
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_one_entry(name, dtype):
    compare(name, random(3, 1, 2, 64), random(2, 3, 1, 2, 64), [0, 0, 0], dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_caches(name, dtype):
    q, caches = random(2, 2, 2, 64).to(dtype), random(2, 2, 40, 2, 64).to(dtype)
    lengths = torch.tensor([3, 30])
    with backend(name):
        expected = ops.attention_with_cache(q, *caches, lengths)
        ours = ops.attention_with_cache(q, *(unaligned(cache) for cache in caches), lengths)
    assert_allclose(ours.float(), expected.float(), atol=1e-2)
    compare(name, q.double(), caches.double(), [3, 30], dtype, dtype)


def test_a_query_does_not_see_later_entries_that_are_no_numbers(name):
    # Of new tokens that were not accepted, only the first ones' entries have been written.
    q, caches = random(1, 4, 2, 64).float(), random(2, 1, 40, 2, 64).float()
    caches[:, :, 12:] = float("nan")
    with backend(name):
        ours = ops.attention_with_cache(q, *caches, torch.tensor([10]))
        alone = ops.attention_with_cache(q[:, :2].contiguous(), *caches, torch.tensor([10]))
    assert ours[:, :2].isfinite().all()
    assert_allclose(ours[:, :2], alone, atol=1e-6)


def test_scores_far_apart(name):
    q, caches = 40 * random(2, 1, 2, 64), 10 * random(2, 2, 1000, 2, 64)
    compare(name, q, caches, [999, 500], torch.float32, torch.float32)


def test_results_repeat_to_the_bit(name):
    q, caches = random(3, 1, 2, 64).bfloat16(), random(2, 3, 700, 2, 64).bfloat16()
    lengths = torch.tensor([650, 12, 300])
    with backend(name):
        first = ops.attention_with_cache(q, *caches, lengths)
        assert_equal(first, ops.attention_with_cache(q, *caches, lengths))


def test_heads_that_are_too_wide_are_refused(name):
    q, cache = random(1, 1, 1, 136).float(), random(1, 4, 1, 136).float()
    with backend(name), pytest.raises(BackendError, match="up to 128, not 136"):
        ops.attention_with_cache(q, cache, cache, torch.tensor([0]))


def test_passes_opcheck(name):
    q, cache = random(2, 1, 2, 32).float(), random(2, 8, 2, 32).float()
    with backend(name):
        opcheck(_cached.call, (q, cache, cache, torch.tensor([3, 5]), 0.2))


def test_what_is_no_number_stays_none_and_what_is_hidden_by_value_does_not_spoil_the_rest(name):
    q = torch.randn(1, 1, 1, 8).abs()
    k, v = torch.randn(2, 1, 4, 1, 8)
    lengths = torch.tensor([3])
    with_nan, with_infinity = k.clone(), k.clone()
    with_nan[0, 1] = float("nan")
    with_infinity[0, 2] = -float("inf")
    with backend(name):
        assert ops.attention_with_cache(q, with_nan, v, lengths).isnan().all()
        found = ops.attention_with_cache(q, with_infinity, v, lengths)
    with backend("reference"):
        assert_allclose(found, ops.attention_with_cache(q, with_infinity, v, lengths))
