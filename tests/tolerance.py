"""The project's one rule for "close enough": an error at most a few times torch's own.

    |ours - exact| <= times * |torch in that precision - exact| + 1e-6 * |exact|

with L2 norms over a tensor, `exact` computed in float64, and the last norm the largest among the
tensors compared together. `times` is 2 for outputs, 3 for gradients and whole-model logits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def assert_close(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor], times: float
) -> None:
    """Hold each of our tensors against the rule above."""
    largest = max(float(tensor.double().norm()) for tensor in exact)
    for index, (mine, other, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.shape == true.shape, f"tensor {index}: {mine.shape} instead of {true.shape}"
        assert mine.isfinite().all(), f"tensor {index} holds values that are not finite"
        error = float((mine.double() - true).norm())
        bound = times * float((other.double() - true).norm()) + 1e-6 * largest
        assert error <= bound, f"tensor {index}: error {error:.3e} exceeds {bound:.3e}"
