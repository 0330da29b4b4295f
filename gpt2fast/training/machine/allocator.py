"""Keep freed memory for the next step instead of returning it to the system after each tensor."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Tell glibc's malloc, for this process, never to give large blocks back.

    A training step on a CPU allocates and frees the same large tensors every time. By default each
    of them is mapped afresh and its pages are faulted in one by one; kept, they are reused. No
    effect where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
