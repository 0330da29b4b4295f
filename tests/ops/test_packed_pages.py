"""Packed steps that find keys and values through tables of pages."""

from __future__ import annotations

import pytest
import torch

from comparison import needs_native
from gpt2fast import backend, ops
from gpt2fast.errors import ArgumentError
from gpt2fast.ops.native import loaded
from gpt2fast.ops.packed import MatrixFormat
from packed_sequences import Sequences, exact_logits, random_weights
from tolerance import assert_close, assert_equal, assert_near

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


FORMS = [
    MatrixFormat("float32"), MatrixFormat("bfloat16"), MatrixFormat("float16"),
    MatrixFormat("int8", 64), MatrixFormat("int4", 32),
]  # fmt: skip
# Heads and their size; 17 heads are one more than are computed at once.
HEADS = [(2, 64), (17, 6)]
LENGTHS = [150, 70, 133]
"""Of texts: entries of one part, of two, and of two of which the second has few."""


@pytest.fixture
def threads():
    """Sets the number of threads, until the test ends."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models():
    """Weights and texts, made once for each format and size."""
    made = {}

    def model(form, heads):
        if (form, heads) not in made:
            torch.manual_seed(0)
            weights = random_weights(form, *heads, 70, 33, tied=False, positions=160)
            made[form, heads] = weights, [torch.randint(33, (length,)) for length in LENGTHS]
        return made[form, heads]

    return model


def read(sequences, texts, plan):
    """Logits after every token of every text; `plan` says, step by step, who reads how many tokens
    and whether singly."""
    found = [[] for _ in texts]
    done = [0] * len(texts)
    for step in plan:
        news = {text: texts[text][done[text] : done[text] + count] for text, count, _ in step}
        logits = sequences.step(news, [singly for *_, singly in step])
        for text, part in zip(news, logits.split([len(new) for new in news.values()]), strict=True):
            found[text].append(part)
            done[text] += len(part)
    assert done == [len(text) for text in texts]
    return [torch.cat(parts) for parts in found]


def alone(blocks, step=1):
    """A plan: one text after another, of which the first `blocks` tokens as a block, then singly
    `step` at a time."""
    plan = []
    for text, length in enumerate(LENGTHS):
        plan += [[(text, blocks, False)]]
        at = blocks
        while at < length:
            plan += [[(text, min(step, length - at), True)]]
            at += step
    return plan


def together(blocks, chunk, step):
    """The same in company: blocks in chunks, one text beginning later than the other, and tokens
    `step` at a time."""
    done, plan = [0] * len(LENGTHS), []
    while done != LENGTHS:
        news = []
        for text, length in enumerate(LENGTHS):
            if len(plan) < 2 * text or done[text] == length:
                continue
            singly = done[text] >= blocks
            count = min(step, length - done[text]) if singly else min(chunk, blocks - done[text])
            news.append((text, count, singly))
            done[text] += count
        plan.append(news)
    return plan


@needs_native
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_native_token_depends_on_its_own_text_alone(models, threads, form, dtype, heads):
    """Bit for bit: not on chunks, company, threads, pages, or how many tokens are read singly."""
    if loaded().isa.endswith("amx"):
        pytest.skip("AMX's tiles round otherwise than vectors")
    weights, texts = models(form, heads)
    blocks = 50
    threads(1)
    with backend("native"):
        expected = read(Sequences(weights, dtype, 3, 160), texts, alone(blocks))
        for count, page, plan in [
            (2, None, alone(blocks)),
            (2, None, together(blocks, 7, 1)),
            (1, 16, together(blocks, 49, 4)),
            (2, 32, together(blocks, 33, 3)),
            (2, 48, alone(blocks, 90)),
        ]:
            threads(count)
            found = read(Sequences(weights, dtype, 3, 160, page, seed=count), texts, plan)
            for text in range(3):
                assert_equal(found[text], expected[text])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [16, 32, 48])
def test_shared_pages_hold_what_rows_hold(models, dtype, page):
    weights, texts = models(FORMS[0], HEADS[0])
    texts = [text.clone() for text in texts]
    for text in texts:
        text[:48] = texts[0][:48]
    shared = 48 // page * page
    plan = together(50, 50, 2)
    with backend("native"):
        expected = read(Sequences(weights, dtype, 3, 160), texts, plan)
        sequences = Sequences(weights, dtype, 3, 160, page, shared=shared)
        first = sequences.step({0: texts[0][:50]})
        assert_equal(first, expected[0][:50])
        before = sequences.k[:, sequences.pages[0, : shared // page]].clone()
        sequences.share(shared)
        logits = sequences.step({text: texts[text][shared:50] for text in (1, 2)})
        for text, found in zip((1, 2), logits.split(50 - shared), strict=True):
            assert_equal(found, expected[text][shared:50])
        ends = sequences.step({text: texts[text][50:60] for text in range(3)}, [True] * 3)
        for text, found in enumerate(ends.split(10)):
            assert_equal(found, expected[text][50:60])
        assert_equal(sequences.k[:, sequences.pages[0, : shared // page]], before)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_that_chooses_has_the_logits_of_one_that_does_not(models, threads, dtype, count):
    weights, texts = models(FORMS[0], HEADS[0])
    with backend("native"):
        threads(count)
        rows = Sequences(weights, dtype, 3, 160)
        for text in range(3):
            rows.step({text: texts[text][:-1]})
        lengths = torch.tensor(rows.lengths)
        tokens = torch.stack([text[-1] for text in texts])
        found, _ = ops.packed_next(
            weights, rows.k, rows.v, tokens, lengths, lengths,
            torch.zeros(3, 0, dtype=torch.int64), k_scales=rows.k_scales, v_scales=rows.v_scales,
        )  # fmt: skip
        threads(1)
        for text in range(3):
            assert_equal(rows.step({text: texts[text][-1:]})[0], found[text])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_pages_and_single_tokens_are_as_exact_as_torchs(models, dtype):
    weights, texts = models(FORMS[0], HEADS[1])
    plan = together(50, 33, 4)
    found = {}
    for name in ("native", "reference"):
        with backend(name):
            found[name] = read(Sequences(weights, dtype, 3, 160, 32), texts, plan)
    exact = [exact_logits(weights, text, dtype) for text in texts]
    for ours, theirs, true in zip(found["native"], found["reference"], exact, strict=True):
        if dtype == torch.float32:
            assert_close([ours], [theirs], [true], times=3.0)
        else:  # blocks of queries, and weights, are rounded as the entries are
            assert_near(ours, true, 2e-2, "a text")
