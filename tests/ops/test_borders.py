"""Ops at the borders of their kernels' blocks, with tensors of one call laid out differently.

Sizes are one block, one less, one more, and one past two blocks of every kernel there is; layouts,
scales and masks are drawn for each tensor by itself. What once was wrong is written down as an
example, which runs every time.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from comparison import BACKENDS, backend, compare, random
from gpt2fast import ops
from tolerance import assert_close, assert_equal

# Where each test runs; on the simulator and in Triton's interpreter rotation.py gives it its day.
# Two of them take half a minute in the interpreter: slow.
SLOW_IN_TRITON = [
    pytest.param("triton", marks=[*name.marks, pytest.mark.slow])
    if getattr(name, "values", ()) == ("triton",)
    else name
    for name in BACKENDS
]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def around(*blocks: int, least: int = 1) -> st.SearchStrategy[int]:
    """Sizes at the borders of these blocks."""
    sizes = {1} | {n for b in blocks for n in (b - 1, b, b + 1, 2 * b + 1)}
    return st.sampled_from(sorted(n for n in sizes if n >= least))


def plain(x):
    return x


def strided(x):
    return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]


def unaligned(x):
    flat = torch.cat([x.new_full((1,), math.nan), x.reshape(-1)])
    return flat[1:].view(x.shape)


def padded(x):
    """Rows with room behind them, and no number in it."""
    return F.pad(x, (0, 3), value=math.nan)[..., : x.shape[-1]]


def heads_first(x):
    """(batch, time, heads, size) in the memory of (batch, heads, time, size)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x


def time_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


LAYOUTS = (plain, strided, unaligned, padded, heads_first, time_first)
layouts = st.sampled_from(LAYOUTS)
# The native kernels refuse caches whose last dimension is not contiguous, in words.
cache_layouts = st.sampled_from([lay for lay in LAYOUTS if lay is not strided])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
often = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def attend(q, k, v, scale, mask=None):
    time = q.shape[1]
    visible = torch.ones(time, time, dtype=torch.bool).tril()
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    # A query that sees nothing has weights of zero.
    seen = visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~visible, -math.inf).masked_fill(~seen, 0.0).softmax(-1) * seen
    return torch.einsum("bhts,bshd->bthd", weights, v)


# 16, 32, 64: queries and keys of the tiles on a GPU; 32 and 56: of the CPU's; 128: of two tiles.
@pytest.mark.parametrize(
    "name", [name for name in BACKENDS if getattr(name, "values", (name,))[0] != "torch"]
)
@often
@given(
    time=around(16, 32, 56, 64),
    width=st.sampled_from([5, 16, 17, 32, 64]),
    shape=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    scale=st.sampled_from([0.0, 0.2, -0.3]),
    hidden=st.sampled_from(
        ["nothing", "all but the first", "every other", "the end", "the first tiles"]
    ),
    laid=st.tuples(layouts, layouts, layouts),
    dtype=dtypes,
)
@example(129, 32, (1, 2), 0.2, "all but the first", (plain,) * 3, torch.float32)
@example(129, 64, (2, 1), 0.2, "all but the last", (plain,) * 3, torch.bfloat16)
@example(65, 32, (2, 2), 0.2, "nothing", (plain, plain, heads_first), torch.float32)
@example(65, 64, (2, 2), 0.2, "nothing", (plain, padded, time_first), torch.bfloat16)
@example(33, 64, (2, 2), 0.0, "every other", (plain, unaligned, plain), torch.bfloat16)
@example(33, 17, (1, 2), 0.0, "nothing", (plain,) * 3, torch.float32)
def test_causal_attention(name, time, width, shape, scale, hidden, laid, dtype):
    check_causal_attention(name, time, width, shape, scale, hidden, laid, dtype)


# One case of each kind, small enough for every day. Tiles have 32, 56 or 64 keys.
SMALL = {
    "values laid out unlike keys": (33, 16, (2, 2), 0.2, "nothing", (plain, plain, heads_first)),
    "keys laid out unlike queries": (17, 17, (2, 2), 0.2, "nothing", (plain, time_first, padded)),
    "a scale of 0": (33, 16, (1, 2), 0.0, "every other", (plain,) * 3),
    "a first tile that is hidden": (97, 16, (2, 1), 0.2, "the first tiles", (plain,) * 3),
    "one visible key in the last tile": (65, 16, (2, 1), -0.3, "all but the last", (plain,) * 3),
    "a mask for each row": (65, 16, (2, 2), 0.2, "the end", (plain,) * 3),
}


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("case", SMALL)
def test_attention_of_several_rows_and_heads(name, case):
    check_causal_attention(name, *SMALL[case], torch.float32)


def check_causal_attention(name, time, width, shape, scale, hidden, laid, dtype):
    batch, heads = shape
    mask = None
    if hidden != "nothing":
        mask = torch.zeros(batch, time, dtype=torch.bool)
        mask[:, 0] = True
        if hidden == "every other":
            mask[:, ::2] = True
        elif hidden == "the end":
            mask[:, : max(1, time - 3)] = True
        elif hidden == "the first tiles":
            mask[:, 0] = False
            mask[:, time * 2 // 3 :] = True
        elif hidden == "all but the last":
            mask[:, 0] = False
            mask[:, -1] = True
        mask[-1] = torch.arange(time) < max(1, time // 2)
    compare(
        lambda q, k, v: ops.causal_attention(
            *(lay(x) for lay, x in zip(laid, (q, k, v), strict=True)), scale=scale, mask=mask
        ),
        lambda q, k, v: attend(q, k, v, scale, mask),
        [random(batch, time, heads, width) for _ in "qkv"],
        dtype,
        name,
    )


@pytest.mark.parametrize("name", SLOW_IN_TRITON)
@often
@given(
    lengths=st.lists(around(16, 32, 64, 128), min_size=1, max_size=3),
    time=st.sampled_from([1, 2, 16, 17, 33]),
    width=st.sampled_from([8, 17, 32, 64]),
    heads=st.integers(1, 3),
    laid=st.tuples(layouts, cache_layouts, cache_layouts),
    scale=st.sampled_from([0.0, 0.2, -0.3]),
    dtype=dtypes,
    stored=dtypes,
)
@example([700, 64, 0], 5, 64, 2, (plain,) * 3, 0.2, torch.float32, torch.float32)
@example([129, 511], 17, 64, 2, (plain, plain, padded), 0.2, torch.bfloat16, torch.bfloat16)
@example([63, 0], 1, 17, 2, (plain, heads_first, time_first), 0.0, torch.float32, torch.bfloat16)
@example([63, 0], 1, 17, 2, (plain, heads_first, time_first), 0.2, torch.float32, torch.float32)
@example([65, 0], 1, 33, 17, (plain,) * 3, 0.2, torch.bfloat16, torch.bfloat16)
def test_attention_with_cache(name, lengths, time, width, heads, laid, scale, dtype, stored):
    check_cached_attention(name, lengths, time, width, heads, laid, scale, dtype, stored)


# Lengths, queries, head size, heads, layouts. A tile has 32 or 64 entries, a share of them at most.
SMALL_CACHED = {
    "several queries and shares": ([70, 3], 3, 16, 2, (plain, plain, time_first)),
    "two blocks of queries": ([31, 0], 33, 16, 2, (padded, plain, heads_first)),
    "one query of an odd head": ([64, 129, 0], 1, 17, 3, (plain, heads_first, padded)),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", SMALL_CACHED)
def test_cached_attention_of_several_rows_and_heads(name, case):
    check_cached_attention(name, *SMALL_CACHED[case], -0.3, torch.float32, torch.float32)


def check_cached_attention(name, lengths, time, width, heads, laid, scale, dtype, stored):
    entries = max(lengths) + time + 1
    caches = random(2, len(lengths), entries, heads, width)
    q = random(len(lengths), time, heads, width)
    counts = torch.tensor(lengths)
    for row, length in enumerate(lengths):
        caches[:, row, length + time :] = math.nan

    def run(name, laid, dtype, stored):
        tensors = [
            lay(x.to(t))
            for lay, x, t in zip(laid, (q, *caches), (dtype, stored, stored), strict=True)
        ]
        with backend(name):
            return ops.attention_with_cache(*tensors, counts, scale)

    exact = run("reference", (plain,) * 3, torch.float64, torch.float64)
    other = run("reference", (plain,) * 3, dtype, stored)
    assert_close([run(name, laid, dtype, stored)], [other], [exact], times=2.0)


# 17 fills no vector; the factors of rows and heads lie apart.
@pytest.mark.parametrize(
    "name", [name for name in BACKENDS if getattr(name, "values", "") != ("native",)]
)
@pytest.mark.parametrize("width", [16, 17, 33, 64])
@pytest.mark.parametrize("time", [1, 3])
def test_attention_with_an_int8_cache(name, width, time):
    lengths = torch.tensor([0, 31, 32, 64])
    caches = torch.randint(-127, 128, (2, 4, 65 + time, 3, width)).to(torch.int8)
    # Factors of keys that lie in memory as their entries do, of values that do not.
    scales = [
        torch.rand(4, 65 + time, 3) / 50,
        (torch.rand(3, 65 + time, 4) / 50).permute(2, 1, 0),
    ]
    q = random(4, time, 3, width)
    values = [c.double() * s.double()[..., None] for c, s in zip(caches, scales, strict=True)]
    with backend("reference"):
        exact = ops.attention_with_cache(q, *values, lengths)
        other = ops.attention_with_cache(q.float(), *caches, lengths, None, *scales)
    with backend(name):
        ours = ops.attention_with_cache(q.float(), *caches, lengths, None, *scales)
    assert_close([ours], [other], [exact], times=2.0)


@pytest.mark.parametrize("name", SLOW_IN_TRITON)
@often
@given(
    rows=around(4, 16, 32),
    columns=around(8, 16, 32, 64, 128, 256),
    laid=st.tuples(layouts, layouts, layouts, layouts),
    with_residual=st.booleans(),
    dtype=dtypes,
)
@example(33, 513, (plain, padded, strided, plain), True, torch.float32)
@example(65, 1025, (padded, plain, plain, strided), True, torch.bfloat16)
@example(3, 8192, (plain,) * 4, True, torch.float32)
@example(17, 8193, (plain, padded, plain, plain), False, torch.float32)
def test_residual_layer_norm(name, rows, columns, laid, with_residual, dtype):
    def ours(x, residual, weight, bias):
        x, residual, weight, bias = (
            lay(t) for lay, t in zip(laid, (x, residual, weight, bias), strict=True)
        )
        if with_residual:
            return ops.residual_layer_norm(x, residual, weight, bias, 1e-3)
        return ops.residual_layer_norm(x, None, weight, bias, 1e-3)[0] + residual

    def theirs(x, residual, weight, bias):
        summed = x + residual if with_residual else x
        normed = F.layer_norm(summed, weight.shape, weight, bias, 1e-3)
        return (normed, summed) if with_residual else normed + residual

    inputs = [random(rows, columns), random(rows, columns), random(columns), random(columns)]
    compare(ours, theirs, inputs, dtype, name)


@pytest.mark.parametrize("name", BACKENDS)
@often
@given(
    rows=around(4, 8, 32),
    columns=around(16, 32, 64, 128),
    laid=st.tuples(layouts, layouts),
    dtype=dtypes,
)
@example(65, 257, (padded, strided), torch.bfloat16)
def test_bias_gelu(name, rows, columns, laid, dtype):
    compare(
        lambda x, bias: ops.bias_gelu(laid[0](x), laid[1](bias)),
        lambda x, bias: F.gelu(x + bias, approximate="tanh"),
        [random(rows, columns), random(columns)],
        dtype,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
@often
@given(
    rows=around(16, 32),
    inputs=around(16, 32, 64),
    inner=around(32, 64),
    laid=st.tuples(*[layouts] * 5),
    dtype=dtypes,
)
@example(65, 65, 129, (padded, plain, strided, time_first, plain), torch.float32)
def test_gelu_mlp(name, rows, inputs, inner, laid, dtype):
    compare(
        lambda *t: ops.gelu_mlp(*(lay(x) for lay, x in zip(laid, t, strict=True))),
        lambda x, a, b, c, d: F.gelu(x @ a + b, approximate="tanh") @ c + d,
        [random(rows, inputs), random(inputs, inner) / 8, random(inner),
         random(inner, inputs) / 8, random(inputs)],
        dtype,
        name,
    )  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
@often
@given(
    rows=around(8, 32),
    vocab=around(32, 256, 1024, 2048, least=2),
    ignored=st.sampled_from(["none", "first", "all but one"]),
    laid=st.tuples(layouts, layouts),
    dtype=dtypes,
)
@example(33, 2049, "all but one", (plain, padded), torch.float32)
@example(5, 4097, "first", (time_first, plain), torch.bfloat16)
@example(2, 8193, "none", (plain, plain), torch.float32)
def test_linear_cross_entropy(name, rows, vocab, ignored, laid, dtype):
    targets = torch.randint(vocab, (rows,))
    targets[-1] = vocab - 1
    if ignored == "first" and rows > 1:
        targets[0] = -100
    elif ignored == "all but one":
        targets[:-1] = -100
    compare(
        lambda h, w: ops.linear_cross_entropy(laid[0](h), laid[1](w), targets),
        lambda h, w: F.cross_entropy(
            (h @ w.t()).to(torch.promote_types(h.dtype, torch.float32)), targets
        ),
        [random(rows, 8), random(vocab, 8)],
        dtype,
        name,
    )


@pytest.mark.parametrize("name", BACKENDS)
@often
@given(
    count=around(8, 16, 32, 64),
    columns=around(8, 16, 64),
    distinct=st.sampled_from([1, 2, 7, 1000]),
    shared=st.booleans(),
    dtype=dtypes,
)
@example(65, 17, 1, False, torch.float32)
@example(129, 129, 2, True, torch.bfloat16)
def test_embedding(name, count, columns, distinct, shared, dtype):
    tokens = torch.randint(min(distinct, 91), (2, count))
    positions = torch.arange(count).expand(1 if shared else 2, count)
    compare(
        lambda wte, wpe: ops.embedding(tokens, positions, wte, wpe),
        lambda wte, wpe: wte[tokens] + wpe[positions],
        [random(91, columns), random(count + 2, columns)],
        dtype,
        name,
    )


# Scores that are whole numbers times log 2 give weights that float32 holds exactly: the thresholds
# of top-k, top-p and min-p fall upon scores, and many are equal there.
TIES = [
    {"top_k": 1}, {"top_k": 2}, {"top_k": 3}, {"top_k": 63}, {"top_k": 64}, {"top_k": 65},
    {"top_p": 0.5}, {"top_p": 0.75}, {"min_p": 0.25}, {"min_p": 0.5}, {"min_p": 1.0},
    {"top_k": 5, "min_p": 0.5},
]  # fmt: skip


def kept_by(options, logits):
    """Tokens that stay, in float64: top-k and min-p keep all that equal the last one."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if "top_k" in options:
        kept &= logits >= logits.topk(min(options["top_k"], logits.shape[-1])).values[:, -1:]
    if "min_p" in options:
        kept &= (logits - logits.amax(-1, keepdim=True)) >= math.log2(options["min_p"]) - 1e-9
    return kept


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", TIES, ids=str)
@pytest.mark.parametrize("vocab", [7, 63, 64, 65, 129, 1025])
def test_ties_at_a_threshold(name, options, vocab):
    halvings = torch.randint(-3, 1, (8, vocab))
    halvings[0] = 0
    logits = halvings.float() * math.log(2.0)
    uniform = (torch.arange(8) + 0.5) / 8
    history = torch.empty(8, 0, dtype=torch.int64)
    # A hair above a power of two: what min-p compares is rounded.
    given_options = {k: v * (1 - 1e-6) if k == "min_p" else v for k, v in options.items()}
    with backend("reference"):
        expected = ops.sample(logits, history, uniform, **given_options)
    with backend(name):
        found = ops.sample(logits, history, uniform, **given_options)
    if "top_p" not in options:
        kept = kept_by(options, halvings.double())
        assert kept.gather(1, found[:, None]).all(), "a token was drawn that is not kept"
        weights = (2.0 ** halvings.double()) * kept
        cumulative = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
        first = (cumulative > uniform.double()[:, None] + 1e-6).int().argmax(-1)
        near = ((cumulative - uniform.double()[:, None]).abs() < 2e-6).any(-1)
        assert (first[~near] == found[~near]).all(), (first.tolist(), found.tolist())
    else:
        different = (expected != found).nonzero()[:, 0].tolist()
        assert len(different) <= 2, f"rows {different}: {found.tolist()}, {expected.tolist()}"


# Weights of 1, of which every sum and every share is exact, in any order.
EXACT = [
    {"top_k": 1}, {"top_k": 3}, {"top_p": 0.25}, {"top_p": 0.5}, {"top_p": 0.75}, {"min_p": 1.0},
    {"typical_p": 0.5}, {"top_k": 2, "top_p": 0.5, "min_p": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", EXACT, ids=str)
@pytest.mark.parametrize("vocab", [8, 64, 128, 2048, 8192])
@pytest.mark.parametrize("others", [None, -1.0, -math.inf])
def test_what_lies_exactly_at_a_threshold(name, options, vocab, others):
    """Top-k and min-p keep all equal scores, top-p the last ones; a draw may fall on an end."""
    logits = torch.full((8, vocab), 0.75)
    candidates = torch.arange(vocab)
    if others is not None:
        if "top_p" in options and not options.get("top_k") and others > -math.inf:
            pytest.skip("lower scores are a part of what top-p measures")
        if "typical_p" in options and others > -math.inf:
            pytest.skip("lower scores have a part in what is expected")
        logits[:, 1::2] += others
        candidates = candidates[::2]
    first = round((1 - options.get("top_p", 1.0)) * len(candidates))
    kept = candidates[first:]
    uniform = (torch.arange(8) + 0.5) / 8
    with backend(name):
        found = ops.sample(logits, torch.empty(8, 0, dtype=torch.int64), uniform, **options)
    assert found.tolist() == [int(kept[int(u * len(kept))]) for u in uniform.tolist()]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_fused_adamw(name, dtype, masters, eps):
    """Sizes around the pieces of 8192 and 16384 elements that a program takes."""
    if masters and dtype == torch.float32:
        pytest.skip("float32 is its own master")
    sizes = [1, 16384, 8193, 16385, 32769, 7, 8191]
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.97, "eps": eps, "weight_decay": 0.3}
    initial = [random(n) for n in sizes]
    gradients = [[random(n) / 64 for n in sizes] for _ in range(3)]
    held = torch.float32 if masters else dtype

    def torchs(dtype):
        params = [p.to(dtype, copy=True).requires_grad_() for p in initial]
        optimizer = torch.optim.AdamW(
            params, lr=1e-2, betas=(0.9, 0.97), eps=eps, weight_decay=0.3, foreach=False
        )
        for step in gradients:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad.to(dtype)
            optimizer.step()
        return [p.detach() for p in params]

    params = [p.to(dtype, copy=True) for p in initial]
    kept = [p.to(held) for p in initial] if masters else None
    moments = [[torch.zeros(n, dtype=held) for n in sizes] for _ in range(2)]
    with backend(name):
        for step, grads in enumerate(gradients, start=1):
            grads = [g.to(dtype) for g in grads]
            ops.fused_adamw(params, grads, *moments, masters=kept, step=step, **settings)
    assert_close(kept or params, torchs(held), torchs(torch.float64), times=2.0)
    for param, master in zip(params, kept or params, strict=True):
        assert_equal(param, master.to(dtype))
