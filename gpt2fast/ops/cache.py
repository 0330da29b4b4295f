"""Writing, reordering and releasing the rows of a key-value cache.

A cache is a pair of (B, T_max, H, D) tensors a layer, owned by the caller. Row b holds its first
lengths[b] entries; rows are ragged and what lies behind a row's end is unspecified.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import Op


def append_to_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None = None,
) -> None:
    """Store new keys and values behind each row's end: cache[b, lengths[b] + t] = new[b, t].

    Args:
        k, v: (B, T, H, D).
        k_cache, v_cache: (B, T_max, H, D), written in place.
        lengths: (B,) int64, entries stored before; not changed, so that all layers can share it.
        counts: (B,) int64, how many of the T entries of each row are stored; None means all.
    """
    _append.call(k, v, k_cache, v_cache, lengths, counts)


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


def _append_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
) -> None:
    batch, time = k.shape[:2]
    rows = torch.arange(batch, device=k.device)[:, None].expand(batch, time)
    steps = torch.arange(time, device=k.device)
    positions = lengths[:, None] + steps
    if counts is not None:
        stored = steps < counts[:, None]
        rows, positions, k, v = rows[stored], positions[stored], k[stored], v[stored]
    k_cache[rows, positions] = k.to(k_cache.dtype)
    v_cache[rows, positions] = v.to(v_cache.dtype)


def _reorder_reference(k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    k_cache[: len(rows)] = k_cache[rows]
    v_cache[: len(rows)] = v_cache[rows]


def _release_reference(lengths: Tensor, rows: Tensor) -> None:
    lengths[rows] = 0


_append = Op(
    "append_to_cache",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, "
    "Tensor? counts) -> ()",
    torch=_append_reference,
    reference=_append_reference,
)
_reorder = Op(
    "reorder_cache",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rows) -> ()",
    torch=_reorder_reference,
    reference=_reorder_reference,
)
_release = Op(
    "release_rows",
    "(Tensor(a!) lengths, Tensor rows) -> ()",
    torch=_release_reference,
    reference=_release_reference,
)


@_append.register_fake
def _(k, v, k_cache, v_cache, lengths, counts):  # type: ignore[no-untyped-def]
    return None


@_reorder.register_fake
def _(k_cache, v_cache, rows):  # type: ignore[no-untyped-def]
    return None


@_release.register_fake
def _(lengths, rows):  # type: ignore[no-untyped-def]
    return None
