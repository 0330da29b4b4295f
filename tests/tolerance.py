"""The project's one rule for "close enough": an error at most a few times torch's own.

    |ours - exact| <= times * |torch in that precision - exact| + 1e-6 * |exact|

with L2 norms over a tensor, `exact` computed in float64, and the last norm the largest among the
tensors compared together. `times` is 2 for outputs, 3 for gradients and whole-model logits. Of a
tensor of a few 16-bit numbers torch's error may be nothing, by chance: where sizes are drawn at
random, the last share is a step of the dtype (`step_of`) instead of 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def assert_close(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    exact: Sequence[Tensor],
    times: float,
    least: float = 1e-6,
) -> None:
    """Hold each of our tensors against the rule above; `least` is its last share."""
    largest = max(float(tensor.double().norm()) for tensor in exact)
    for index, (mine, other, true) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.shape == true.shape, f"tensor {index}: {mine.shape} instead of {true.shape}"
        assert mine.isfinite().all(), (
            f"tensor {index} holds values that are not finite; {worst(mine, true)}"
        )
        error = float((mine.double() - true).norm())
        bound = times * float((other.double() - true).norm()) + least * largest
        assert error <= bound, (
            f"tensor {index}: error {error:.3e} exceeds {bound:.3e}; {worst(mine, true)}"
        )


def step_of(dtype: torch.dtype) -> float:
    """The distance of 1 from the next number in `dtype`, but 1e-6 at least."""
    return max(1e-6, torch.finfo(dtype).eps)


def worst(ours: Tensor, exact: Tensor) -> str:
    """In words, the element of `ours` that is furthest from `exact`."""
    distance = (ours.detach().double() - exact.detach().double()).abs()
    distance = distance.where(distance == distance, distance.new_full((), math.inf))
    place = tuple(int(index) for index in torch.unravel_index(distance.argmax(), ours.shape))
    return (
        f"the worst of {ours.numel()} elements, at {place}, is {float(ours[place])!r} and not "
        f"{float(exact[place])!r}"
    )


def assert_near(ours: Tensor, exact: Tensor, share: float, what: str) -> None:
    """|ours - exact| <= share * |exact|, in L2 norms: where what is rounded is known.

    Args:
        ours, exact: of one shape; `exact` in float64.
        share: most relative error.
        what: a name for messages.
    """
    assert ours.shape == exact.shape, f"{what}: {tuple(ours.shape)}, not {tuple(exact.shape)}"
    error, norm = float((ours.double() - exact).norm()), float(exact.norm())
    assert error <= share * norm, (
        f"{what}: error {error:.3e} exceeds {share:g} of {norm:.3e}; {worst(ours, exact)}"
    )


def assert_equal(ours: Tensor, right: Tensor) -> None:
    """torch.equal, in words: where it fails, the worst element and both values."""
    _assert_shape(ours, right)
    assert torch.equal(ours, right), f"{_different(ours, right)}; {worst(ours, right)}"


def assert_allclose(ours: Tensor, right: Tensor, rtol: float = 1e-5, atol: float = 1e-8) -> None:
    """torch.allclose in words, the bound among them."""
    _assert_shape(ours, right)
    assert torch.allclose(ours, right, rtol=rtol, atol=atol), (
        f"{_different(ours, right)}, the bound is {atol:g} + {rtol:g} of it; {worst(ours, right)}"
    )


def _assert_shape(ours: Tensor, right: Tensor) -> None:
    assert ours.shape == right.shape, f"{tuple(ours.shape)} instead of {tuple(right.shape)}"


def _different(ours: Tensor, right: Tensor) -> str:
    return f"{int((ours != right).sum())} elements differ"
