"""Refusals of ops, in the same words on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from comparison import backend, needs_native, needs_simulator, simulated_library
from gpt2fast import ops
from gpt2fast.errors import ArgumentError
from gpt2fast.ops.backend import OPS
from gpt2fast.ops.packed import MatrixFormat, ModelShape, PackedWeights
from gpt2fast.ops.requirements import overlap
from op_arguments import CPU_BACKENDS, LACKS, SHAPE, arguments

nan, inf = math.nan, math.inf
one = torch.tensor([1])
BAD = [
    ("residual_layer_norm", "eps", [-1.0, nan, inf]),
    ("residual_layer_norm", "weight", [torch.ones(7), torch.ones(1, 8), torch.ones(8).long()]),
    ("residual_layer_norm", "residual", [torch.ones(8, 3), torch.ones(8)]),
    ("bias_gelu", "bias", [torch.ones(7), torch.tensor(1.0), torch.ones(8, 1)]),
    ("gelu_mlp", "w_fc", [torch.ones(7, 8), torch.ones(8), torch.ones(8, 8, dtype=torch.int64)]),
    ("projection", "weight", [torch.ones(7, 8), torch.ones(8), torch.ones(8, 8).bool()]),
    ("embedding", "wte", [torch.ones(8), torch.ones(8, 9), torch.ones(2, 2, 8)]),
    ("embedding", "wpe", [torch.ones(8), torch.ones(5, 16), torch.ones(5, 7)]),
    ("embedding", "tokens", [torch.tensor([[8, 0]]), torch.tensor([[0, -1]]), torch.ones(1, 2)]),
    (
        "embedding",
        "positions",
        [torch.tensor([5, 0]), torch.tensor([0, -5]), torch.zeros(3).long()],
    ),
    ("causal_attention", "scale", [nan, inf, -inf]),
    ("causal_attention", "mask", [torch.ones(3, 2).bool(), torch.ones(2, 3, 1).bool()]),
    ("causal_attention", "dropout_p", [2.0, -1.0, nan, 1.0, 0.5]),
    ("causal_attention", "k", [torch.ones(2, 3, 2, 7), torch.ones(2, 3, 16)]),
    ("attention", "mask", [torch.ones(3, 2).bool(), torch.ones(2, 3, 1).bool()]),
    ("attention", "k", [torch.ones(2, 3, 2, 8), torch.ones(2, 3, 1, 7), torch.ones(2, 4, 1, 8)]),
    ("attention_with_cache", "lengths", [torch.tensor([0, 7]), torch.tensor([-1, 0]), one]),
    ("attention_with_cache", "lengths", [torch.tensor([0, 2**62]), torch.zeros(2), one.int()]),
    ("attention_with_cache", "scale", [nan, inf]),
    ("attention_with_cache", "v_cache", [torch.ones(2, 5, 2, 8), torch.ones(2, 6, 2, 9)]),
    ("append_to_cache", "lengths", [torch.tensor([0, 4]), torch.tensor([-1, 0]), one]),
    ("append_to_cache", "lengths", [torch.tensor([2**62, 0]), torch.tensor([2**63 - 1, 0])]),
    ("append_to_cache", "counts", [torch.ones(3).long(), torch.ones(2)]),
    ("append_to_cache", "v", [torch.ones(2, 3, 2, 7), torch.ones(2, 3, 2, 8).long()]),
    ("append_to_cache", "k_scales", [torch.ones(2, 6, 2)]),
    ("reorder_cache", "rows", [torch.tensor([2]), torch.tensor([-1]), torch.zeros(3).long()]),
    ("release_rows", "rows", [torch.tensor([2]), torch.tensor([-1]), torch.ones(1), one[None]]),
    ("sample", "temperature", [0.0, -1.0, nan, inf]),
    ("sample", "top_k", [-1]),
    ("sample", "top_p", [-0.1, 1.1, nan]),
    ("sample", "min_p", [-0.1, 1.1, nan]),
    ("sample", "typical_p", [0.0, -0.1, 1.1, nan]),
    ("sample", "repetition_penalty", [0.0, -2.0, nan, inf]),
    ("sample", "no_repeat_ngram_size", [-3]),
    ("sample", "uniform", [torch.tensor([0.5, 1.0]), torch.tensor([-0.1, 0]), torch.ones(3)]),
    ("sample", "uniform", [torch.tensor([nan, 0.0]), torch.tensor([1, 0])]),
    ("sample", "history", [torch.zeros(3, 2).long(), torch.zeros(2, 2), torch.zeros(2).long()]),
    ("sample", "token_mask", [one, one.int(), torch.ones(2, 2).int(), torch.zeros(2, 1).int()]),
    ("sample", "token_mask", [torch.tensor([[1], [2**9]]).int(), torch.ones(2, 1).bool()]),
    ("sample", "logits", [torch.ones(2, 0), torch.ones(9), torch.ones(2, 9).long()]),
    ("linear_cross_entropy", "targets", [torch.tensor([0, 8, 1]), torch.tensor([0, -1, 1])]),
    ("linear_cross_entropy", "targets", [torch.zeros(3), torch.zeros(2).long()]),
    ("linear_cross_entropy", "weight", [torch.ones(8, 7), torch.ones(8)]),
    ("fused_adamw", "step", [0, -1]),
    ("fused_adamw", "lr", [-0.1, nan, inf]),
    ("fused_adamw", "beta1", [-0.1, 1.0, nan]),
    ("fused_adamw", "beta2", [-0.1, 1.0, nan]),
    ("fused_adamw", "eps", [-1e-8, nan]),
    ("fused_adamw", "weight_decay", [-0.1, nan, inf]),
    ("fused_adamw", "grads", [[torch.ones(8, 3)], [], [torch.ones(3, 8).long()]]),
    ("decode_step", "tokens", [torch.tensor([0, 8]), torch.tensor([-1, 0]), torch.ones(2)]),
    ("decode_step", "positions", [torch.tensor([0, 5]), torch.tensor([-1, 0]), one]),
    ("decode_step", "lengths", [torch.tensor([0, 6]), torch.tensor([-1, 0]), one]),
    ("decode_step", "n_head", [3, 0, -2]),
    ("decode_step", "activation", ["gelu_neu"]),
    ("decode_step", "attention_scales", [[0.5, 0.5], [nan], []]),
    ("decode_step", "eps", [-1.0, nan]),
    ("packed_step", "tokens", [torch.tensor([1, 40, 2]), torch.tensor([-1, 0, 0])]),
    ("packed_step", "positions", [torch.tensor([0, 16, 0]), torch.tensor([0, -1, 0]), one]),
    ("packed_step", "starts", [torch.tensor([0, 3, 3]), torch.tensor([1, 2, 3]), one]),
    ("packed_step", "rows", [torch.tensor([0, 2]), torch.tensor([0, 0]), torch.tensor([-1, 0])]),
    ("packed_step", "lengths", [torch.tensor([5, 0]), torch.tensor([6, 0]), torch.tensor([-1, 0])]),
    ("packed_step", "outputs", [torch.tensor([3]), torch.tensor([-1]), torch.ones(1)]),
    ("packed_step", "k_cache", [torch.zeros(2, 2, 6, 2, 8), torch.zeros(2, 6, 2, 16)]),
    ("packed_next", "temperature", [0.0, nan]),
    ("packed_next", "top_p", [1.1, nan]),
    ("packed_next", "top_k", [-1]),
    ("packed_next", "min_p", [2.0]),
    ("packed_next", "typical_p", [0.0, 2.0]),
    ("packed_next", "repetition_penalty", [0.0, nan]),
    ("packed_next", "no_repeat_ngram_size", [-1]),
    ("packed_next", "vocab_size", [0, 41, -1]),
    ("packed_next", "uniform", [torch.tensor([0.5, 1.0]), torch.tensor([nan, 0.0])]),
    ("packed_next", "token_mask", [one, one.int(), torch.ones(2, 1).int(), torch.ones(2, 2)]),
    ("packed_next", "token_mask", [torch.tensor([[1, 1], [0, 2**8]]).int()]),
    ("packed_next", "history", [torch.zeros(3, 2).long(), torch.zeros(2, 2)]),
    ("packed_next", "tokens", [torch.tensor([1, 40]), one]),
    ("packed_next", "lengths", [torch.tensor([0, 6]), torch.tensor([-1, 0]), one]),
]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ArgumentError) as caught:
        call()
    text = str(caught.value)
    assert "csrc" not in text and ".cpp" not in text and "\n" not in text
    return text


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_good_arguments_pass(name):
    with backend(name):
        for op, given in arguments().items():
            if op not in LACKS.get(name, ()):
                getattr(ops, op)(**given)


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("op", "argument", "values"), BAD, ids=[f"{op}-{arg}" for op, arg, _ in BAD]
)
def test_every_backend_refuses_alike(name, op, argument, values):
    for value in values:
        messages = []
        for each in ("reference", name):
            given = arguments()[op] | {argument: value}
            with backend(each):
                messages.append(refusal(lambda given=given: getattr(ops, op)(**given)))
        assert messages[0] == messages[1]
        # A length that leaves no room is named with what it leaves no room for.
        named = (argument.removesuffix("s"), "shape", "row 1 holds")
        assert any(name in messages[0] for name in named), messages[0]


def tensors_of(given: dict[str, object]) -> list[str]:
    return [name for name, value in given.items() if isinstance(value, (torch.Tensor, list))]


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize("op", ops.__all__)
@pytest.mark.parametrize("left", [0, 4])
def test_a_storage_that_was_resized_is_refused(name, op, left):
    for argument in tensors_of(arguments()[op]):
        given = arguments()[op]
        value = given[argument]
        tensor = value[0] if isinstance(value, list) else value
        if not isinstance(tensor, torch.Tensor):
            continue
        # Of its own: others are shared by several arguments.
        own = tensor.clone()
        given[argument] = [own, *value[1:]] if isinstance(value, list) else own
        size = own.untyped_storage().nbytes()
        own.untyped_storage().resize_(left)
        try:
            with backend(name):
                message = refusal(lambda given=given: getattr(ops, op)(**given))
        finally:
            own.untyped_storage().resize_(size)  # a failure prints the tensors
        assert "it was resized" in message


WRITTEN = [
    ("append_to_cache", "k_cache"), ("append_to_cache", "v_cache"),
    ("reorder_cache", "k_cache"), ("reorder_cache", "v_cache"),
    ("release_rows", "lengths"), ("decode_step", "k_cache"), ("decode_step", "v_cache"),
    ("packed_step", "k_cache"), ("packed_step", "v_cache"),
    ("packed_next", "k_cache"), ("packed_next", "v_cache"),
    ("fused_adamw", "params"), ("fused_adamw", "exp_avgs"), ("fused_adamw", "exp_avg_sqs"),
]  # fmt: skip


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize(("op", "argument"), WRITTEN)
def test_what_is_written_may_not_be_expanded(name, op, argument):
    """torch refuses the same for its own in-place operations."""
    given = arguments()[op]
    value = given[argument]
    tensor = value[0] if isinstance(value, list) else value
    dim = 0 if tensor.shape[0] > 1 else 1
    tensor = tensor.narrow(dim, 0, 1).clone().expand(tensor.shape)
    given[argument] = [tensor] if isinstance(value, list) else tensor
    with backend(name):
        assert "share one place" in refusal(lambda: getattr(ops, op)(**given))


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("op", "first", "second"),
    [
        ("append_to_cache", "k_cache", "v_cache"),
        ("reorder_cache", "k_cache", "v_cache"),
        ("packed_step", "k_cache", "v_cache"),
        ("packed_next", "k_cache", "v_cache"),
        ("decode_step", "k_cache", "v_cache"),
        ("fused_adamw", "params", "grads"),
        ("fused_adamw", "params", "exp_avgs"),
        ("fused_adamw", "exp_avgs", "exp_avg_sqs"),
        ("release_rows", "lengths", "rows"),
    ],
)
def test_what_is_written_shares_no_memory(name, op, first, second):
    given = arguments()[op]
    given[second] = given[first]
    if op == "release_rows":
        given["lengths"] = given["rows"] = torch.tensor([0, 1])
    with backend(name):
        assert "shares memory with" in refusal(lambda: getattr(ops, op)(**given))


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_caches_may_interleave(name):
    """Keys and values of one tensor lie between each other and share nothing."""
    k = torch.randn(2, 3, 2, 8)
    for dim in range(5):
        both = torch.zeros(2, 6, 2, 8).unsqueeze(dim).repeat_interleave(2, dim)
        k_cache, v_cache = both.unbind(dim)
        if dim == 4 and name in ("native", "simulator"):
            continue  # they read caches whose last dimension is contiguous
        with backend(name):
            ops.append_to_cache(k, -k, k_cache, v_cache, torch.tensor([0, 3]))
        assert torch.equal(k_cache[1, 3:], k[1]) and torch.equal(v_cache[0, :3], -k[0])


def test_overlaps_are_found_exactly():
    """Compared with the sets of the elements' addresses."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    base = torch.zeros(60)
    addresses = torch.arange(60)
    found = set()
    for _ in range(500):
        sizes = [(draw(1, 4), draw(1, 4)) for _ in "xy"]
        steps = [(draw(0, 9), draw(0, 9)) for _ in "xy"]
        offsets = [draw(0, 20) for _ in "xy"]
        x, y = (base.as_strided(*v) for v in zip(sizes, steps, offsets, strict=True))
        a, b = (addresses.as_strided(*v) for v in zip(sizes, steps, offsets, strict=True))
        expected = bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))
        assert overlap(x, y) == expected
        found.add(expected)
    assert found == {True, False}


@pytest.mark.parametrize("op", [op for op in ops.__all__ if op != "fused_adamw"])
def test_tensors_on_several_devices_are_refused(op):
    """Otherwise torch would give a result without data if one is on the meta device."""
    for argument in tensors_of(arguments()[op]):
        given = arguments()[op]
        value = given[argument]
        if not isinstance(value if not isinstance(value, list) else value[0], torch.Tensor):
            continue
        if isinstance(value, list):
            given[argument] = [value[0].to("meta"), *value[1:]]
        else:
            given[argument] = value.to("meta")
        assert "on one device" in refusal(lambda given=given: getattr(ops, op)(**given))


# Compiled ops called past all that.


@needs_native
def test_native_ops_refuse_what_does_not_fit():
    native = torch.ops.gpt2fast_native
    x, ids = torch.randn(3, 8), torch.tensor([0, 1, 2])
    heads, cache = torch.randn(2, 3, 2, 8), torch.zeros(2, 6, 2, 8)
    two = torch.tensor([0, 0])
    lse = torch.zeros(2, 2, 3)
    bad = [
        lambda: native.bias_gelu(x[0], x[0]),
        lambda: native.bias_gelu(x, x[0, :7]),
        lambda: native.bias_gelu(x.double(), x[0].double()),
        lambda: native.bias_gelu(x.t(), x[:, 0].contiguous()),
        lambda: native.layer_norm(x, x[:2], x[0], x[0], 1e-5),
        lambda: native.layer_norm(x, None, x[0], x[0, :3], 1e-5),
        lambda: native.layer_norm_backward(x, None, x, x[:2, 0], x[:, 0], x[0]),
        lambda: native.embedding(ids, ids, x, x[:, :7].contiguous()),
        lambda: native.embedding(ids, ids, x, x[0]),
        lambda: native.embedding(ids + 1, ids, x, x),
        lambda: native.embedding(ids, ids[:2], x, x),
        lambda: native.embedding(ids.int(), ids, x, x),
        lambda: native.embedding_backward(x, ids, 2),
        lambda: native.embedding_backward(x[:2], ids, 3),
        lambda: native.embedding_backward(x, ids, -1),
        lambda: native.embedding_backward_add(x, ids, x[:2].contiguous()),
        lambda: native.embedding_backward_add(x, ids, x[:, :7].contiguous()),
        lambda: native.embedding_backward_add(x, ids, x.double()),
        lambda: native.attention(heads, heads[:1], heads, 1.0, None, 0.0, 0, True),
        lambda: native.attention(heads, heads, heads, 1.0, torch.ones(2, 2).bool(), 0.0, 0, True),
        lambda: native.attention(heads, heads, heads, 1.0, None, 2.0, 0, True),
        lambda: native.attention(heads[0], heads[0], heads[0], 1.0, None, 0.0, 0, True),
        lambda: native.attention_backward(
            heads, heads, heads, heads, heads, lse[:1], 1.0, None, 0.0, 0, True
        ),
        lambda: native.attention(heads, heads[:, :, :0], heads[:, :, :0], 1.0, None, 0.0, 0, True),
        lambda: native.attention(heads[:, :, :1], heads, heads, 1.0, None, 0.0, 0, True),
        lambda: native.attention(heads, heads[:, :, :1], heads, 1.0, None, 0.0, 0, False),
        lambda: native.attention_backward(
            heads, heads, heads[:, :2], heads, heads, lse, 1.0, None, 0.0, 0, False
        ),
        lambda: native.attention_with_cache(heads, cache, cache[:, :5], two, 1.0),
        lambda: native.attention_with_cache(heads, cache, cache, two + 7, 1.0),
        lambda: native.append_to_cache(heads, heads, cache, cache, two + 4, None),
        lambda: native.append_to_cache(heads[0], heads[0], cache, cache, two, None),
        lambda: native.reorder_cache(cache, cache[:1], two),
        lambda: native.release_rows(two, two + 2),
        lambda: native.cross_entropy(x, ids + 6, x[:, 0].contiguous(), -100, 1.0, True),
        lambda: native.cross_entropy(x, ids[:2], x[:, 0].contiguous(), -100, 1.0, True),
        lambda: native.cross_entropy(x.t(), ids, x[:, 0].contiguous(), -100, 1.0, True),
        lambda: native.adamw([x], [x[0]], [x], [x], 1, 0.1, 0.9, 0.9, 1e-8, 0.0),
        lambda: native.adamw([x], [], [x], [x], 1, 0.1, 0.9, 0.9, 1e-8, 0.0),
        lambda: native.matmul(x, x, None, x, False, False, None),
        lambda: native.matmul(x, x.t(), x[0], torch.zeros(3, 3), False, False, None),
        lambda: native.sample(x[0], two[None], None, None, 1.0, 0, 1.0, 0.0, 1.0, 1.0, 0),
        lambda: native.sample(x, two[None], None, None, 1.0, 0, 1.0, 0.0, 1.0, 2.0, 0),
        lambda: native.sample(x, two[None], None, None, math.nan, 0, 1.0, 0.0, 1.0, 1.0, 0),
    ]  # fmt: skip
    for call in bad:
        with pytest.raises(RuntimeError, match="^gpt2fast: [^/]*$"):
            call()


@needs_native
@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8", "int4"])
def test_a_native_step_reads_no_arena_whose_header_is_damaged(form):
    """Every word of the header in turn, set to small and large numbers that it must not be."""
    group = 64 if form.startswith("int") else 0
    shape = ModelShape(2, 64, 64, 40, 16, "gelu_new", 1e-5, (0.25,), not group)
    formats = dict.fromkeys(shape.matrices(), MatrixFormat(form, group))
    weights = PackedWeights(shape, formats)
    vector = torch.tensor([0])
    given = {
        "k_cache": torch.zeros(1, 1, 4, 2, 32), "v_cache": torch.zeros(1, 1, 4, 2, 32),
        "k_scales": None, "v_scales": None, "tokens": vector, "positions": vector,
        "starts": torch.tensor([0, 1]), "rows": vector, "lengths": vector, "outputs": vector,
        "vocab_size": 40,
    }  # fmt: skip
    torch.ops.gpt2fast.packed_step(weights.arena, *given.values())
    refused = 0
    for word in range(30 + 37):
        for value in (-1, 3, 2**20, 2**62):
            arena = weights.arena.clone()
            arena[8 * word : 8 * word + 8].view(torch.int64)[0] = value
            try:
                torch.ops.gpt2fast.packed_step(arena, *given.values())
            except ArgumentError as error:
                refused += 1
                assert "packed weights" in str(error) or "k_cache must be" in str(error)
    # Of the words some are numbers in which nothing can be wrong: eps, the layers' scales; an
    # activation may be another; offsets of what is small enough may point elsewhere.
    assert refused > 3.5 * 60


def test_arenas_from_outside_are_checked():
    weights = PackedWeights(SHAPE, dict.fromkeys(SHAPE.matrices(), MatrixFormat("float32")))
    arena = weights.arena
    assert PackedWeights.from_arena(arena.clone()).shape == SHAPE
    unaligned = torch.zeros(len(arena) + 1, dtype=torch.uint8)[1:]
    unaligned.copy_(arena)
    emptied = arena.clone()
    emptied.untyped_storage().resize_(0)
    bad = [
        (arena.float(), "uint8"), (arena[None], "uint8"), (arena[:-4096], "not an arena"),
        (unaligned, "16 divides"), (emptied, "resized"), (arena[::2], "contiguous"),
        (arena[:8], "not an arena"), (torch.zeros(0, dtype=torch.uint8), "not an arena"),
    ]  # fmt: skip
    for tensor, message in bad:
        with pytest.raises(ArgumentError, match=message):
            PackedWeights.from_arena(tensor)
    for word in range(30 + 2 * 37):
        for value in (-1, 3, 2**62):
            damaged = arena.clone()
            words = damaged[8 * word : 8 * word + 8].view(torch.int64)
            if int(words[0]) == value:
                continue
            words[0] = value
            try:
                found = PackedWeights.from_arena(damaged)
            except ArgumentError:
                continue
            assert found.shape != SHAPE  # another eps, scale or activation


@needs_simulator
def test_the_cuda_binding_refuses_what_does_not_fit():
    torch.ops.load_library(simulated_library().path)
    cuda = torch.ops.gpt2fast_cuda
    x, ids = torch.randn(3, 8), torch.tensor([0, 1, 2])
    heads, cache = torch.randn(2, 3, 2, 8), torch.zeros(2, 6, 2, 8)
    emptied = torch.randn(3, 8)
    emptied.untyped_storage().resize_(0)
    two = torch.tensor([0, 0])
    bad = [
        lambda: cuda.bias_gelu(x, x[0, :7]),
        lambda: cuda.bias_gelu(emptied, x[0]),
        lambda: cuda.layer_norm(x, x[:2], x[0], x[0], 1e-5),
        lambda: cuda.layer_norm(x, None, x[0], x[0, :3], 1e-5),
        lambda: cuda.embedding(ids, ids, x, x[0]),
        lambda: cuda.embedding(ids, ids, x, x[:, :7].contiguous()),
        lambda: cuda.embedding(ids, ids[:2], x, x),
        lambda: cuda.embedding_backward(x[:2], ids, ids, 3),
        lambda: cuda.attention(heads, heads[:1], heads, 1.0, None, 0.0, None, True),
        lambda: cuda.attention(heads, heads, heads[:, :, :1], 1.0, None, 0.0, None, True),
        lambda: cuda.attention(heads[:, :, :1], heads, heads, 1.0, None, 0.0, None, True),
        lambda: cuda.attention(heads, heads[:, :, :0], heads[:, :, :0], 1.0, None, 0.0, None, True),
        lambda: cuda.attention(heads, heads, heads, 1.0, None, 0.5, None, True),
        lambda: cuda.append_to_cache(heads[0], heads[0], cache, cache, two, None),
        lambda: cuda.cross_entropy(x, ids[:2], x[:, 0].contiguous(), -100, x[0, :1], True),
        lambda: cuda.adamw([x], [x[0]], [x], [x], [], 1, 0.1, 0.9, 0.9, 1e-8, 0.0),
        lambda: cuda.sample(x, two[None], None, None, math.nan, 0, 1.0, 0.0, 1.0, 1.0, 0),
        lambda: cuda.decode_step([], cache, cache, two, two, two, [], 1e-5),
        lambda: cuda.decode_step([x] * 17, cache[None], cache[None], two, two, two, [1.0], 1e-5),
    ]  # fmt: skip
    for call in bad:
        with pytest.raises(RuntimeError, match="^gpt2fast: [^/]*$"):
            call()


def test_every_op_declares_what_it_asks():
    for name, op in OPS.items():
        assert op._check.__name__ != "_asks_nothing", name
