"""Packed steps that find keys and values through tables of pages."""

from __future__ import annotations

import pytest
import torch

from gpt2fast import backend, ops
from gpt2fast.errors import ArgumentError
from gpt2fast.ops.packed import MatrixFormat
from packed_sequences import Sequences, random_weights
from tolerance import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return random_weights(MatrixFormat("float32"), 3, 16, 70, 33, tied=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [16, 48])
def test_the_reference_reads_pages_as_rows(weights, dtype, page):
    """A prompt, a token beside a prompt, tokens of both; and what two texts share is read once."""
    first, second = torch.randint(33, (75,)), torch.randint(33, (70,))
    second[:48] = first[:48]
    with backend("reference"):
        rows = Sequences(weights, dtype, 2, 96)
        pages = Sequences(weights, dtype, 2, 96, page, shared=48)
        for each in (rows, pages):
            each.found = [each.step({0: first[:50]})]
        rows.step({1: second[:48]})
        pages.share(48)
        for each in (rows, pages):
            each.found.append(each.step({1: second[48:60], 0: first[50:51]}))
            each.found.append(each.step({1: second[60:70], 0: first[51:75]}, [True, False]))
    for ours, theirs in zip(pages.found, rows.found, strict=True):
        assert_near(ours, theirs.double(), 1e-6, f"pages of {page}")


def paged_call(weights, **changes):
    """A valid call for two sequences, the second of which continues the first's page."""
    shape = weights.shape
    size = (len(shape.scales), 5, 16, shape.n_head, shape.width // shape.n_head)
    given = {
        "k_cache": torch.zeros(size), "v_cache": torch.zeros(size),
        "tokens": torch.tensor([1, 2, 3]), "positions": torch.tensor([17, 18, 16]),
        "starts": torch.tensor([0, 2, 3]), "rows": torch.arange(2),
        "lengths": torch.tensor([17, 16]), "outputs": torch.tensor([1, 2]),
        "pages": torch.tensor([[3, 1, -1], [3, 4, 2]]), "singly": torch.tensor([True, False]),
    }  # fmt: skip
    return ops.packed_step(weights, **(given | changes))


MISTAKES = [
    ({"pages": torch.tensor([[3, 5, -1], [3, 4, 2]])}, r"pages\[0, 1\] = 5 is not in -1 .. 4"),
    ({"pages": torch.tensor([[3, -2, 0], [3, 4, 2]])}, r"pages\[0, 1\] = -2 is not in -1 .. 4"),
    ({"pages": torch.tensor([[3, -1, 0], [3, 4, 2]])}, r"pages\[0, 1\] = -1, .* its 19 entries"),
    ({"pages": torch.tensor([[3], [4]])}, r"lengths\[0\] = 17 is not in 0 .. 15"),
    ({"pages": torch.tensor([[3, 1], [4, 1]])}, "sequence 0 writes to page 1, .* copy it first"),
    ({"pages": torch.tensor([[3, 1], [1, 4]])}, "sequence 0 writes to page 1, .* copy it first"),
    ({"pages": torch.tensor([[3, 1], [4, 4]])}, "sequence 1 writes to page 4, .* copy it first"),
    ({"pages": torch.tensor([[3, 1]])}, r"pages must be \(S, M\) = \(2, 2\), not \(1, 2\)"),
    ({"pages": torch.tensor([3, 1])}, r"pages must be \(S, M\), not \(2,\)"),
    ({"pages": torch.tensor([[3, 1], [3, 4]]).int()}, "pages must be int64, not torch.int32"),
    ({"lengths": torch.tensor([48, 16])}, r"lengths\[0\] = 48 is not in 0 .. 47"),
    ({"lengths": torch.tensor([47, 16])}, "sequence 0 holds 47 of at most 48 entries; 2 more"),
    ({"singly": torch.tensor([1, 0])}, "singly must be bool, not torch.int64"),
    ({"singly": torch.tensor([True])}, r"singly must be \(S,\) = \(2,\), not \(1,\)"),
    (
        {"k_cache": torch.zeros(2, 5, 24, 3, 16), "v_cache": torch.zeros(2, 5, 24, 3, 16)},
        "pages have 24 entries .*; their size must be a multiple of 16",
    ),
    (
        {"k_cache": torch.zeros(2, 5, 0, 3, 16), "v_cache": torch.zeros(2, 5, 0, 3, 16)},
        "pages have 0 entries",
    ),
]


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(("changes", "says"), MISTAKES)
def test_mistakes_are_named(weights, name, changes, says):
    with backend(name), pytest.raises(ArgumentError, match=says):
        paged_call(weights, **changes)


def test_what_a_call_does_not_read_may_be_anything(weights):
    """Rows, pages behind the last one, and pages that are only read, however often."""
    expected = paged_call(weights)
    found = paged_call(
        weights,
        rows=torch.tensor([7, 7]),
        pages=torch.tensor([[3, 1, 4], [3, 4, 1]]),
    )
    assert torch.equal(found, expected)
