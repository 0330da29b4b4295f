"""Matrix products and casts that mean the same on a GPU and in the interpreter.

The interpreter of Triton 3.6 multiplies the bits of bfloat16 operands as if they were integers, and
truncates where it should round to bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, sum=None):
    """a @ b (+ sum) in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def rounded(x):
    """float32 x, of size below 2**22, as the nearest integer, halves to even."""
    if INTERPRETED:
        return (x + 12582912.0) - 12582912.0  # between 2**23 and 2**24 all floats are integers
    else:
        return libdevice.rint(x)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to the nearest, halves to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x == x, rounded, bits | 0x400000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
