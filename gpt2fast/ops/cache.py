"""Writing, reordering and releasing the rows of a key-value cache.

A cache is a pair of (B, T_max, H, D) tensors a layer, owned by the caller. Row b holds its first
lengths[b] entries; rows are ragged and what lies behind a row's end is unspecified. Beside an int8
cache lie the (B, T_max, H) factors of its entries (int8_cache.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Arguments, Op
from .cuda import by_device, cuda, kernels
from .int8_cache import check_caches, check_scales, stored
from .native import native
from .requirements import (
    check_dim,
    check_floating,
    check_indices,
    check_integers,
    check_room,
    check_shape,
)
from .support import GPU_CACHE_DTYPES, Tensors
from .triton import triton


def append_to_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Store new keys and values behind each row's end: cache[b, lengths[b] + t] = new[b, t].

    Args:
        k, v: (B, T, H, D); where gradients are recorded, none that requires one, which would be
            lost: detach it.
        k_cache, v_cache: (B, T_max, H, D), written in place.
        lengths: (B,) int64, entries stored before; not changed, so that all layers can share it.
        counts: (B,) int64, how many of the T entries of each row are stored; None means all.
        k_scales, v_scales: (B, T_max, H) float32 factors of int8 caches, written in place.

    Raises:
        ArgumentError: an int8 cache without factors, or factors that don't fit.
    """
    _append.call(k, v, k_cache, v_cache, lengths, counts, k_scales, v_scales)


def reorder_cache(k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    """Replace the first rows of a cache by copies of chosen ones: cache[i] = cache[rows[i]].

    Args:
        k_cache, v_cache: (B, T_max, H, D), written in place.
        rows: (B',) int64 with B' <= B; rows may repeat.
    """
    _reorder.call(k_cache, v_cache, rows)


def release_rows(lengths: Tensor, rows: Tensor) -> None:
    """Empty rows of a cache, so that they can hold another sequence: lengths[rows] = 0.

    Args:
        lengths: (B,) int64, written in place.
        rows: (N,) int64.
    """
    _release.call(lengths, rows)


def _check_append(call: Arguments) -> None:
    k, v, k_cache = call.k, call.v, call.k_cache
    check_floating(k=k, v=v)
    check_dim("k", k, 4, says="(B, T, H, D)")
    check_caches(call, 4, "(B, T_max, H, D)")
    if k.shape != v.shape or k.shape[0] != k_cache.shape[0] or k.shape[2:] != k_cache.shape[2:]:
        raise ArgumentError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be alike, and of the caches' sizes "
            f"{tuple(k_cache.shape)} only the second may differ"
        )
    check_scales(call)
    check_integers(lengths=call.lengths, counts=call.counts)
    check_shape("lengths", call.lengths, k.shape[0], says="(B,)")
    if call.counts is not None:
        check_shape("counts", call.counts, k.shape[0], says="(B,)")


def _check_append_values(call: Arguments) -> None:
    check_room(call.lengths, call.counts, call.k.shape[1], call.k_cache.shape[1])


def _check_reorder(call: Arguments) -> None:
    k_cache, v_cache, rows = call.k_cache, call.v_cache, call.rows
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ArgumentError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} must share one "
            "shape (B, T_max, H, D)"
        )
    check_integers(rows=rows)
    if rows.dim() != 1 or len(rows) > len(k_cache):
        raise ArgumentError(
            f"rows must be (B',) with B' up to {len(k_cache)}, the cache's rows, "
            f"not {tuple(rows.shape)}"
        )


def _check_reorder_values(call: Arguments) -> None:
    check_indices("rows", call.rows, 0, len(call.k_cache) - 1, of="the rows of the cache")


def _check_release(call: Arguments) -> None:
    check_integers(lengths=call.lengths, rows=call.rows)
    check_dim("lengths", call.lengths, 1, says="(B,)")
    check_dim("rows", call.rows, 1, says="(N,)")


def _check_release_values(call: Arguments) -> None:
    check_indices("rows", call.rows, 0, len(call.lengths) - 1, of="the rows of the cache")


def _append_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    batch, time = k.shape[:2]
    rows = torch.arange(batch, device=k.device)[:, None].expand(batch, time)
    steps = torch.arange(time, device=k.device)
    positions = lengths[:, None] + steps
    if counts is not None:
        kept = steps < counts[:, None]
        rows, positions, k, v = rows[kept], positions[kept], k[kept], v[kept]
    for new, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        if scales is None:
            cache[rows, positions] = new.to(cache.dtype)
        else:
            cache[rows, positions], scales[rows, positions] = stored(new)


def _reorder_reference(k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    k_cache[: len(rows)] = k_cache[rows]
    v_cache[: len(rows)] = v_cache[rows]


def _release_reference(lengths: Tensor, rows: Tensor) -> None:
    lengths[rows] = 0


def _contiguous_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _append_native(call: Arguments) -> None:
    scales = () if call.k_scales is None else (call.k_scales, call.v_scales)
    kernels(call.k).append_to_cache(
        _contiguous_heads(call.k), _contiguous_heads(call.v),
        call.k_cache, call.v_cache, call.lengths, call.counts, *scales,
    )  # fmt: skip


def _reorder_native(call: Arguments) -> None:
    kernels(call.k_cache).reorder_cache(*call)


def _release_native(call: Arguments) -> None:
    kernels(call.lengths).release_rows(*call)


# Each thread of a GPU reads what it needs of all replaced rows before it writes the first.
_MOST_REORDERED = 1024


def _too_many_rows(call: Arguments) -> str | None:
    if len(call.rows) <= _MOST_REORDERED:
        return None
    return f"the kernels reorder {_MOST_REORDERED} rows at most, not {len(call.rows)}"


def _cuda_refuses_reorder(call: Arguments) -> str | None:
    if call.k_cache.dtype != call.v_cache.dtype:
        return "the CUDA kernel reorders caches that are alike"
    return _too_many_rows(call)


_NEW = Tensors("k", "v", one_dtype=True, may_be_empty=True)
_append = Op(
    "append_to_cache",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, "
    "Tensor? counts, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
    check=_check_append,
    values=_check_append_values,
    native=by_device(
        cpu=native(
            _NEW,
            Tensors("k_cache", "v_cache", one_dtype=True, may_be_empty=True, contiguous_rows=True),
        )(_append_native),
        cuda=cuda(
            _NEW,
            Tensors(
                "k_cache", "v_cache",
                dtypes=GPU_CACHE_DTYPES, one_dtype=True, may_be_empty=True, contiguous_rows=True,
            ),
        )(_append_native),
    ),
    triton=triton(
        "cache",
        "append",
        Tensors("k", "v", may_be_empty=True),
        Tensors("k_cache", "v_cache", dtypes=GPU_CACHE_DTYPES, may_be_empty=True),
    ),
    reference=_append_reference,
)  # fmt: skip
_MOVED = Tensors(
    "k_cache", "v_cache",
    dtypes=(*GPU_CACHE_DTYPES, torch.float64), may_be_empty=True, contiguous_rows=True,
)  # fmt: skip
_reorder = Op(
    "reorder_cache",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rows) -> ()",
    check=_check_reorder,
    values=_check_reorder_values,
    native=by_device(
        cpu=native(_MOVED)(_reorder_native),
        cuda=cuda(_MOVED, refuses=_cuda_refuses_reorder)(_reorder_native),
    ),
    triton=triton(
        "cache",
        "reorder",
        Tensors("k_cache", "v_cache", dtypes=GPU_CACHE_DTYPES, may_be_empty=True),
        refuses=_too_many_rows,
    ),
    reference=_reorder_reference,
)
_release = Op(
    "release_rows",
    "(Tensor(a!) lengths, Tensor rows) -> ()",
    check=_check_release,
    values=_check_release_values,
    native=by_device(cpu=native()(_release_native), cuda=cuda()(_release_native)),
    triton=triton("cache", "release"),
    reference=_release_reference,
)


_append.refuse_gradient("what it stores are constants; train with causal_attention")


@_append.register_fake
def _(call: Arguments) -> None:
    return None


@_reorder.register_fake
def _(call: Arguments) -> None:
    return None


@_release.register_fake
def _(call: Arguments) -> None:
    return None
