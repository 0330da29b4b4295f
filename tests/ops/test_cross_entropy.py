from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from comparison import BACKENDS, DTYPES, LAYOUTS, backend, compare, random
from gpt2fast import ops
from gpt2fast.errors import ArgumentError
from gpt2fast.ops import cross_entropy
from gpt2fast.ops.cross_entropy import _forward


def ours(targets, ignore_index=-100):
    return lambda h, w: ops.linear_cross_entropy(h, w, targets, ignore_index)


def theirs(targets, ignore_index=-100):
    return lambda h, w: F.cross_entropy(
        (h @ w.t()).to(torch.promote_types(h.dtype, torch.float32)),
        targets,
        ignore_index=ignore_index,
    )


def targets_for(rows, vocab):
    targets = torch.randint(vocab, (rows,))
    targets[::5] = -100
    if rows == 1:
        targets[0] = 2
    return targets


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 8, 7), (51, 24, 33), (1023, 8, 101)])
def test_matches_torch_at_odd_shapes(name, dtype, rows, width, vocab):
    targets = targets_for(rows, vocab)
    inputs = [random(rows, width), random(vocab, width) / 4]
    compare(ours(targets), theirs(targets), inputs, dtype, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_classes_in_several_blocks(name):
    """One more than a block of 8192; the CPU's have 2048. The last block has the largest logit."""
    weight = random(8193, 8) / 4
    weight[-1] *= 8
    targets = torch.tensor([8192, 0, 5000])
    compare(ours(targets), theirs(targets), [random(3, 8), weight], torch.float32, name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_do_not_change_the_result(name, dtype, monkeypatch):
    # No setting: chunks are of many megabytes, and the result does not depend on them.
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    targets = targets_for(200, 50)
    inputs = [random(200, 16), random(50, 16) / 4]
    compare(ours(targets), theirs(targets), inputs, dtype, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(name):
    targets = targets_for(17, 11)
    with backend(name):
        hidden, weight = (random(rows, 16).float().requires_grad_() for rows in (17, 11))
        loss = ops.linear_cross_entropy(hidden, weight, targets)
        passes = [
            torch.autograd.grad(factor * loss, (hidden, weight), retain_graph=factor < 5)
            for factor in (1, 3, 5)
        ]
    for factor, gradients in zip((1, 3, 5), passes, strict=True):
        for gradient, first in zip(gradients, passes[0], strict=True):
            torch.testing.assert_close(gradient, factor * first)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_strided_and_unaligned_views(name, layout):
    targets = targets_for(17, 11)
    inputs = [random(17, 16), random(11, 16)]
    compare(ours(targets), theirs(targets), inputs, torch.float32, name, layout)


@pytest.mark.parametrize("name", BACKENDS)
def test_another_ignore_index(name):
    targets = torch.tensor([1, 3, 3, 0])
    inputs = [random(4, 16), random(5, 16)]
    compare(ours(targets, 3), theirs(targets, 3), inputs, torch.float32, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_left_to_count_is_nan_as_in_torch(name):
    with backend(name):
        loss = ops.linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.full((3,), -100))
    assert loss.isnan()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_target_outside_the_vocabulary_is_an_error(name):
    if name.startswith("cuda"):
        pytest.skip("it ends all work on the GPU, as torch's own assertion does")
    with backend(name), pytest.raises(ArgumentError, match=r"targets\["):
        ops.linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 5, 1]))


@pytest.mark.parametrize("name", BACKENDS)
def test_never_holds_all_logits(name, monkeypatch):
    if name == "reference":
        pytest.skip("the reference is the expression with all logits")
    # No setting: logits that do not fit its chunks would take a test minutes.
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    rows, vocab = 1024, 2048
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    with backend(name), torch.profiler.profile(profile_memory=True) as profile:
        ops.linear_cross_entropy(hidden, weight, targets).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < rows * vocab * 4 / 4


@pytest.mark.parametrize("name", BACKENDS)
def test_passes_opcheck(name):
    hidden, weight = (random(7, 16).float().requires_grad_() for _ in "hw")
    with backend(name):
        opcheck(_forward.call, (hidden, weight, torch.randint(7, (7,)), -100, True, True))


@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_into_one_graph(name):
    hidden, weight = (random(7, 16).float().requires_grad_() for _ in "hw")
    targets = torch.randint(7, (7,))
    with backend(name):
        compiled = torch.compile(ours(targets), fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(ours(targets)(hidden, weight), (hidden, weight))
        got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_mismatched_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(5, 6\)"):
        ops.linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 6), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        ops.linear_cross_entropy(torch.ones(3, 4), torch.ones(5, 4), torch.zeros(2).long())


@pytest.mark.parametrize(
    ("rows", "row_bytes", "device", "expected"),
    [
        (16384, 50257 * 2, "cpu", 1261),  # 13 chunks of 128 MB
        (16384, 50304 * 2, "cuda", 8192),
        (16385, 50304 * 2, "cuda", 8320),
        (12288, 50304 * 4, "cuda", 4096),
        (5000, 50304 * 2, "cuda", 5000),
        (300, 1 << 24, "cuda", 64),
        (300, 1 << 22, "cuda", 256),
        (0, 100, "cuda", 1),
        (7, 0, "meta", 7),
    ],
)
def test_chunks_are_of_one_size_and_on_a_gpu_of_whole_tiles(rows, row_bytes, device, expected):
    assert cross_entropy._chunk_rows(rows, row_bytes, device) == expected
