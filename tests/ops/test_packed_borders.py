"""Steps of packed weights where sizes fill no vector, panel, group or word, against float64.

What a packed step rounds is rounded here as well: the inputs of bfloat16 and quantized matrices,
and what enters the cache. So little is left to a tolerance that one element of a group shows.
"""

from __future__ import annotations

import math

import pytest
import torch

from comparison import backend, needs_native
from gpt2fast import ops
from gpt2fast.errors import ArgumentError
from gpt2fast.ops.packed import MatrixFormat, ModelShape, PackedWeights, QuantizedMatrix
from packed_sequences import exact_logits, random_weights
from tolerance import assert_equal, assert_near

FORMATS = [
    MatrixFormat("float32"), MatrixFormat("bfloat16"), MatrixFormat("float16"),
    MatrixFormat("int8", 64), MatrixFormat("int8", 32),
    MatrixFormat("int4", 64), MatrixFormat("int4", 32),
]  # fmt: skip
# Heads, their size, inner width, vocabulary. No head fills the words of a vector, so that queries
# of int8 entries stay float32; 17 heads are one more than are computed at once.
SHAPES = [(3, 17, 70, 33), (17, 5, 33, 64), (1, 33, 65, 32), (2, 35, 129, 97)]


@pytest.fixture
def one_thread_afterward():
    yield
    torch.set_num_threads(1)


class Caches:
    """Keys and values of three rows, laid out differently."""

    def __init__(self, shape, dtype):
        size = (len(shape.scales), 3, 80, shape.n_head, shape.width // shape.n_head)
        filler = 77 if dtype == torch.int8 else math.nan

        def turned(*size):
            return torch.full((size[1], size[0], size[2] + 3, *size[3:]), filler, dtype=dtype)

        self.k = torch.full(size, filler, dtype=dtype)
        self.v = turned(*size).transpose(0, 1)[:, :, 2:-1]
        self.k_scales = self.v_scales = None
        if dtype == torch.int8:
            self.k_scales = torch.full(size[:-1], math.nan)
            self.v_scales = torch.full((80, *size[:2], size[3] + 1), math.nan)
            self.v_scales = self.v_scales.permute(1, 2, 0, 3)[..., :-1]

    def step(self, weights, sequences, counts):
        """Logits after the last token of each sequence; `counts` of them are stored before."""
        lengths = [len(tokens) for tokens in sequences]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return ops.packed_step(
            weights, self.k, self.v, torch.cat(sequences),
            torch.cat([torch.arange(p, p + n) for p, n in zip(counts, lengths, strict=True)]),
            starts, torch.tensor([2, 0, 1])[: len(sequences)], torch.tensor(counts),
            starts[1:] - 1, k_scales=self.k_scales, v_scales=self.v_scales,
        )  # fmt: skip


@needs_native
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name} {form.group}".strip(" 0"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_a_step_of_odd_sizes(one_thread_afterward, form, dtype, sizes):
    heads, size, *others = sizes
    size += dtype == torch.bfloat16  # whose entries are read in pairs
    weights = random_weights(form, heads, size, *others, tied=heads != 1)
    prompts = [torch.randint(sizes[-1], (count + 4,)) for count in (1, 33, 66)]
    exact = [exact_logits(weights, prompt, dtype) for prompt in prompts]
    # One rounding that falls otherwise moves many that follow.
    share = 3e-2 if form.group else 2e-2
    if form.name in ("float32", "float16") and dtype == torch.float32:
        share = 1e-5
    # With two threads the entries of few rows are read in parts, some of them empty.
    for threads in (1, 2):
        torch.set_num_threads(threads)
        caches, counts = Caches(weights.shape, dtype), [0, 0, 0]
        # Prompts of all; a token of all; of one row; one beside two.
        for news in ([1, 33, 66], [1, 1, 1], [1], [1, 2]):
            ends = [count + new for count, new in zip(counts, news, strict=False)]
            given = [
                prompt[count:end] for prompt, count, end in zip(prompts, counts, ends, strict=False)
            ]
            with backend("native"):
                found = caches.step(weights, given, counts[: len(news)])
            for row, (logits, end) in enumerate(zip(found, ends, strict=True)):
                what = f"row {row} of {news}, {threads} threads"
                assert_near(logits, exact[row][end - 1], share, what)
            counts[: len(ends)] = ends


SHAPE = ModelShape(1, 24, 40, 20, 4, "relu", 1e-5, (1.0,), True)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (MatrixFormat("int4", 12), "int4 in groups of 12: .* groups of 32 or 64 inputs"),
        (MatrixFormat("int8", 128), "int8 in groups of 128"),
        (MatrixFormat("int8", 0), "int8 in groups of 0"),
        (MatrixFormat("int8", -32), "int8 in groups of -32"),
        (MatrixFormat("float32", 32), "float32 in groups of 32"),
        (MatrixFormat("float16", 32), "float16 in groups of 32"),
        (MatrixFormat("float64"), "float64; these can: float32, bfloat16, int8, int4, float16"),
    ],
    ids=str,
)
def test_groups_that_the_kernels_have_no_room_for_are_refused(form, says):
    with pytest.raises(ArgumentError, match=f"wte.weight cannot be packed as {says}"):
        PackedWeights(SHAPE, dict.fromkeys(SHAPE.matrices(), form))


def quantized(inputs=24, outputs=20, groups=1, low=-8, high=7, bits=4):
    q = torch.full((inputs, outputs), low, dtype=torch.int8)
    q[-1, -1] = high
    return QuantizedMatrix(q, torch.ones(groups, outputs, dtype=torch.float16), bits, 32)


@pytest.mark.parametrize(
    ("bits", "matrix", "says"),
    [
        (4, quantized(low=-9), "from -9 to 7; 4 bits hold those from -8 to 7"),
        (4, quantized(high=8), "from -8 to 8; 4 bits"),
        (4, quantized(outputs=19), r"is \(24, 19\), not \(24, 20\)"),
        (8, quantized(groups=2, bits=8), r"scales \(2, 20\); 24 inputs in groups of 32 .*\(1, 20"),
        (0, torch.zeros(24, 21), r"is \(24, 21\), not \(24, 20\)"),
        (0, torch.zeros(20, 24), r"is \(20, 24\), not \(24, 20\)"),
    ],
)  # fmt: skip
def test_a_matrix_that_does_not_fit_is_refused(bits, matrix, says):
    form = MatrixFormat(f"int{bits}", 32) if bits else MatrixFormat("float32")
    weights = PackedWeights(SHAPE, dict.fromkeys(SHAPE.matrices(), form))
    before = weights.arena.clone()
    with pytest.raises(ArgumentError, match=f"wte.weight .*{says}"):
        weights.put("wte.weight", matrix)
    assert_equal(weights.arena, before)


FLOAT16 = MatrixFormat("float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_what_float16_cannot_hold_is_refused(dtype, value):
    weights = PackedWeights(SHAPE, dict.fromkeys(SHAPE.matrices(), FLOAT16))
    before = weights.arena.clone()
    matrix = torch.zeros(24, 20, dtype=dtype)
    matrix[5, 7] = value
    matrix[0, 0] = math.inf
    given = f"{float(matrix[5, 7]):g}".replace("+", r"\+")
    with pytest.raises(ArgumentError, match=f"wte.weight holds {given}, .* 65504: .* bfloat16"):
        weights.put("wte.weight", matrix)
    assert_equal(weights.arena, before)


def test_float16_holds_numbers_up_to_its_largest_and_infinity_and_nan():
    weights = PackedWeights(SHAPE, dict.fromkeys(SHAPE.matrices(), FLOAT16))
    matrix = torch.zeros(24, 20)
    matrix[:3, 0] = torch.tensor([65519.0, -65504.0, 2.0**-24])
    weights.put("wte.weight", matrix)
    assert_equal(weights.get("wte.weight"), matrix.half())
    matrix[4, 4], matrix[5, 5] = math.inf, math.nan
    weights.put("wte.weight", matrix)
    found = weights.get("wte.weight")
    assert found[4, 4] == math.inf and found[5, 5].isnan() and found.isfinite().sum() == 478


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_at_both_ends_of_their_bits_come_out_again(bits):
    weights = PackedWeights(SHAPE, dict.fromkeys(SHAPE.matrices(), MatrixFormat(f"int{bits}", 32)))
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    given = quantized(low=low, high=high, bits=bits)
    weights.put("wte.weight", given)
    found = weights.get("wte.weight")
    assert torch.equal(found.q, given.q) and torch.equal(found.scales, given.scales)
