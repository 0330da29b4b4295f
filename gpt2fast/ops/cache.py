"""Writing, reordering and releasing the rows of a key-value cache.

A cache is a pair of (B, T_max, H, D) tensors a layer, owned by the caller. Row b holds its first
lengths[b] entries; rows are ragged and what lies behind a row's end is unspecified. Beside an int8
cache lie the (B, T_max, H) factors of its entries (int8_cache.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from .backend import Op
from .cuda import CACHE_DTYPES, by_device, cuda, kernels
from .cuda import unsuitable as unsuitable_for_cuda
from .int8_cache import check_caches, check_scales, stored
from .native import native, refuses_int8, refuses_tensors
from .requirements import (
    check_dim,
    check_floating,
    check_indices,
    check_integers,
    check_room,
    check_shape,
)
from .triton import triton, unsuitable


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


def _check_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    check_floating(k=k, v=v)
    check_dim("k", k, 4, says="(B, T, H, D)")
    check_caches(k_cache, v_cache, 4, "(B, T_max, H, D)")
    if k.shape != v.shape or k.shape[0] != k_cache.shape[0] or k.shape[2:] != k_cache.shape[2:]:
        raise ArgumentError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be alike, and of the caches' sizes "
            f"{tuple(k_cache.shape)} only the second may differ"
        )
    check_scales(k_cache, v_cache, k_scales, v_scales)
    check_integers(lengths=lengths, counts=counts)
    check_shape("lengths", lengths, k.shape[0], says="(B,)")
    if counts is not None:
        check_shape("counts", counts, k.shape[0], says="(B,)")


def _check_append_values(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    *scales: Tensor | None,
) -> None:
    check_room(lengths, counts, k.shape[1], k_cache.shape[1])


def _check_reorder(k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
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


def _check_reorder_values(k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    check_indices("rows", rows, 0, len(k_cache) - 1, of="the rows of the cache")


def _check_release(lengths: Tensor, rows: Tensor) -> None:
    check_integers(lengths=lengths, rows=rows)
    check_dim("lengths", lengths, 1, says="(B,)")
    check_dim("rows", rows, 1, says="(N,)")


def _check_release_values(lengths: Tensor, rows: Tensor) -> None:
    check_indices("rows", rows, 0, len(lengths) - 1, of="the rows of the cache")


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


def _refuses_cache(*caches: Tensor) -> str | None:
    for cache in caches:
        if cache.device.type != "cpu":
            return f"the native kernels run on the CPU, and a cache is on {cache.device}"
        if cache.stride(-1) != 1 and cache.shape[-1] != 1:
            return "the native kernels write to caches whose last dimension is contiguous"
    return None


def _append_native(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    k, v = _contiguous_heads(k), _contiguous_heads(v)
    scales = () if k_scales is None else (k_scales, v_scales)
    kernels(k).append_to_cache(k, v, k_cache, v_cache, lengths, counts, *scales)


def _append_refuses(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> str | None:
    return (
        refuses_tensors(k, v)
        or refuses_int8(k_cache)
        or refuses_tensors(k_cache, v_cache)
        or _refuses_cache(k_cache, v_cache)
    )


def _reorder_native(k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    kernels(k_cache).reorder_cache(k_cache, v_cache, rows)


def _release_native(lengths: Tensor, rows: Tensor) -> None:
    kernels(lengths).release_rows(lengths, rows)


def _release_refuses(lengths: Tensor, rows: Tensor) -> str | None:
    if lengths.device.type != "cpu":
        return f"the native kernels run on the CPU, and the lengths are on {lengths.device}"
    return None


def _triton_refuses_reorder(k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> str | None:
    if len(rows) > 1024:
        return f"the Triton kernel moves up to 1024 rows, not {len(rows)}"
    return unsuitable(k_cache, v_cache, rows, may_be_empty=True)


def _cuda_refuses_integers(*vectors: Tensor | None) -> str | None:
    for vector in vectors:
        if vector is not None and vector.dtype != torch.int64:
            return f"the CUDA kernels take lengths, counts and rows in int64, not {vector.dtype}"
    return None


def _cuda_refuses_cache(*caches: Tensor) -> str | None:
    for cache in caches:
        if cache.stride(-1) != 1 and cache.shape[-1] != 1:
            return "the CUDA kernels write to caches whose last dimension is contiguous"
    return None


def _append_cuda_refuses(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> str | None:
    return (
        unsuitable_for_cuda(k, v, one_dtype=True, may_be_empty=True)
        or unsuitable_for_cuda(
            k_cache, v_cache, dtypes=CACHE_DTYPES, one_dtype=True, may_be_empty=True
        )
        or unsuitable_for_cuda(
            k, k_cache, lengths, counts, k_scales, v_scales, dtypes=CACHE_DTYPES, may_be_empty=True
        )
        or _cuda_refuses_cache(k_cache, v_cache)
        or _cuda_refuses_integers(lengths, counts)
    )


# A thread reads what it needs of all replaced rows before it writes the first.
_MOST_REORDERED = 1024


def _reorder_cuda_refuses(k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> str | None:
    if rows.numel() > _MOST_REORDERED:
        return f"the CUDA kernel reorders {_MOST_REORDERED} rows at most, not {rows.numel()}"
    if k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        return "the CUDA kernel reorders caches that are alike"
    return (
        unsuitable_for_cuda(
            k_cache, v_cache, rows, dtypes=(*CACHE_DTYPES, torch.float64), may_be_empty=True
        )
        or _cuda_refuses_cache(k_cache, v_cache)
        or _cuda_refuses_integers(rows)
    )


def _release_cuda_refuses(lengths: Tensor, rows: Tensor) -> str | None:
    return unsuitable_for_cuda(lengths, rows, may_be_empty=True) or _cuda_refuses_integers(
        lengths, rows
    )


_append = Op(
    "append_to_cache",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, "
    "Tensor? counts, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
    check=_check_append,
    values=_check_append_values,
    native=by_device(
        cpu=native(_append_native, _append_refuses),
        cuda=cuda(_append_native, _append_cuda_refuses),
    ),
    triton=triton("cache", "append"),
    torch=_append_reference,
    reference=_append_reference,
)
_reorder = Op(
    "reorder_cache",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rows) -> ()",
    check=_check_reorder,
    values=_check_reorder_values,
    native=by_device(
        cpu=native(
            _reorder_native, lambda k_cache, v_cache, rows: _refuses_cache(k_cache, v_cache)
        ),
        cuda=cuda(_reorder_native, _reorder_cuda_refuses),
    ),
    triton=triton("cache", "reorder", _triton_refuses_reorder),
    torch=_reorder_reference,
    reference=_reorder_reference,
)
_release = Op(
    "release_rows",
    "(Tensor(a!) lengths, Tensor rows) -> ()",
    check=_check_release,
    values=_check_release_values,
    native=by_device(
        cpu=native(_release_native, _release_refuses),
        cuda=cuda(_release_native, _release_cuda_refuses),
    ),
    triton=triton("cache", "release"),
    torch=_release_reference,
    reference=_release_reference,
)


_append.refuse_gradient("what it stores are constants; train with causal_attention")


@_append.register_fake
def _(k, v, k_cache, v_cache, lengths, counts, k_scales=None, v_scales=None):  # type: ignore[no-untyped-def]
    return None


@_reorder.register_fake
def _(k_cache, v_cache, rows):  # type: ignore[no-untyped-def]
    return None


@_release.register_fake
def _(lengths, rows):  # type: ignore[no-untyped-def]
    return None
