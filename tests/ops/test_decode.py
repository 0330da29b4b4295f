"""A whole step in CUDA kernels, beside the reference."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from comparison import CUDA_BACKENDS, backend, needs_simulator, random
from gpt2fast import ops
from gpt2fast.errors import ArgumentError, BackendError
from gpt2fast.ops.backend import record_calls
from gpt2fast.ops.decode import _decode
from tolerance import assert_allclose, assert_close, assert_equal

# What goes with each width: heads, vocabulary, inner width. 51 and 70 allow no vectors.
WIDTHS = {64: (2, 97, 256), 51: (3, 101, 70), 240: (3, 64, 80)}


def random_weights(width, layers, positions):
    """Float64 weights, as `ops.decode_step` lists them, whose every number counts."""
    _, vocab, inner = WIDTHS[width]

    def matrix(inputs, outputs):
        return random(inputs, outputs) / inputs**0.5

    def norm():
        return [1 + 0.1 * random(width), 0.1 * random(width)]

    weights = [random(vocab, width) / 2, random(positions, width) / 4]
    for _ in range(layers):
        weights += [*norm(), matrix(width, 3 * width), 0.1 * random(3 * width)]
        weights += [matrix(width, width), 0.1 * random(width)]
        weights += [*norm(), matrix(width, inner), 0.1 * random(inner)]
        weights += [matrix(inner, width), 0.1 * random(width)]
    return [*weights, *norm(), random(vocab, width) / width**0.5]


class Step:
    """One step at ragged lengths; what lies behind the rows' ends is not a number."""

    def __init__(self, width, lengths, entries, layers=2):
        heads, vocab, _ = WIDTHS[width]
        self.weights = random_weights(width, layers, entries)
        self.lengths = torch.tensor(lengths)
        self.rows = torch.arange(len(lengths))
        self.tokens = torch.randint(vocab, (len(lengths),))
        self.options = dict(
            n_head=heads, attention_scales=[0.2 / (i + 1) for i in range(layers)],
            activation="gelu_new", eps=1e-5,
        )  # fmt: skip
        self.caches = random(2, layers, len(lengths), entries, heads, width // heads)
        for row, length in enumerate(lengths):
            self.caches[:, :, row, length:] = float("nan")

    def arguments(self, dtype, stored):
        return (
            [weight.to(dtype) for weight in self.weights],
            *self.caches.to(stored),
            self.tokens,
            self.lengths.clone(),
            self.lengths,
        )

    def run(self, name, dtype, stored):
        """Logits, new keys and new values; nothing else in the caches may change."""
        arguments = self.arguments(dtype, stored)
        with backend(name):
            logits = ops.decode_step(*arguments, **self.options)
        new = []
        for cache, before in zip(arguments[1:3], self.caches.to(stored), strict=True):
            new.append(cache[:, self.rows, self.lengths].clone())
            cache[:, self.rows, self.lengths] = before[:, self.rows, self.lengths]
            assert_equal(cache.nan_to_num(0.125), before.nan_to_num(0.125))
        assert logits.dtype == dtype
        return [logits, *new]


def compare_step(step, name, dtype, stored=None):
    exact = step.run("reference", torch.float64, torch.float64)
    other = step.run("reference", dtype, stored or dtype)
    assert_close(step.run(name, dtype, stored or dtype), other, exact, times=3.0)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9])
def test_steps_equal_the_reference(name, dtype, batch):
    lengths = [(7 * row * row + 3) % 33 for row in range(batch)]
    compare_step(Step(64, lengths, 33), name, dtype)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "lengths", "entries"),
    [(51, [5, 39, 0], 40), (240, [0], 1), (240, [700, 31], 1023), (51, [0, 64], 65)],
    ids=str,
)
def test_steps_of_odd_sizes(name, width, lengths, entries, dtype):
    compare_step(Step(width, lengths, entries, layers=1), name, dtype)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_store_in_the_caches_dtype(name, stored):
    compare_step(Step(64, [4, 17], 20), name, torch.float32, stored)
    compare_step(Step(64, [4, 17], 20), name, torch.bfloat16, stored)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
def test_steps_are_one_call_and_repeat_to_the_bit(name):
    step = Step(64, [12, 0, 31], 33)
    arguments = step.arguments(torch.bfloat16, torch.bfloat16)
    with backend(name), record_calls() as calls:
        first = ops.decode_step(*arguments, **step.options)
        again = ops.decode_step(*arguments, **step.options)
    assert_equal(first, again)
    assert [call.op for call in calls] == ["decode_step"] * 2


@pytest.mark.parametrize("name", CUDA_BACKENDS)
def test_a_row_does_not_depend_on_its_neighbors(name):
    step = Step(64, [12, 0, 31, 5], 33)
    weights, k, v, tokens, positions, lengths = step.arguments(torch.float32, torch.float32)
    with backend(name):
        together = ops.decode_step(weights, k, v, tokens, positions, lengths, **step.options)
        for row in range(4):
            one = slice(row, row + 1)
            alone = ops.decode_step(
                weights, k[:, one], v[:, one], tokens[one], positions[one], lengths[one],
                **step.options,
            )  # fmt: skip
            assert_allclose(alone, together[one], atol=1e-5)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
def test_steps_read_views(name):
    step = Step(64, [12, 3], 33)
    weights, k, v, tokens, positions, lengths = step.arguments(torch.float32, torch.float32)
    expected = step.run(name, torch.float32, torch.float32)[0]
    wide = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in weights]
    vectors = [x.repeat_interleave(2)[::2] if x.dim() == 1 else x for x in wide]
    caches = [torch.cat([x, x], 3)[:, :, :, : x.shape[3]] for x in (k, v)]
    indices = [torch.stack([x, x], 1)[:, 0] for x in (tokens, positions, lengths)]
    with backend(name):
        logits = ops.decode_step(vectors, *caches, *indices, **step.options)
    assert_equal(logits, expected)


@needs_simulator
def test_refuses_what_there_are_no_kernels_for():
    step = Step(64, [3], 5)
    weights, k, v, tokens, positions, lengths = step.arguments(torch.float32, torch.float32)

    def run(weights=weights, k=k, v=v, **options):
        with backend("simulator"):
            ops.decode_step(
                weights, k, v, tokens, positions, lengths, **{**step.options, **options}
            )

    with pytest.raises(BackendError, match="gelu_new as activation, not relu"):
        run(activation="relu")
    with pytest.raises(BackendError, match="float64"):
        run([weight.double() for weight in weights])
    with pytest.raises(BackendError, match="last dimension is contiguous"):
        run([weight.t().contiguous().t() if weight.dim() == 2 else weight for weight in weights])
    with pytest.raises(BackendError, match="one dtype"):
        run(k=k.bfloat16())
    vocab_size, entries = len(weights[0]), k.shape[2]
    for name, token, length in (("tokens", vocab_size, 0), ("row 0", 0, entries)):
        tokens, lengths = torch.tensor([token]), torch.tensor([length])
        with pytest.raises(ArgumentError, match=name):
            run()
        options = list(step.options.values())
        # What the op does not look at on a GPU stops the kernel.
        with backend("simulator"), pytest.raises(RuntimeError, match="__trap"):
            torch.ops.gpt2fast_cuda.decode_step(
                weights, k, v, tokens, positions, lengths, options[1], options[3]
            )


@pytest.mark.parametrize("name", CUDA_BACKENDS)
def test_steps_pass_opcheck(name):
    step = Step(64, [3, 1], 5, layers=1)
    with backend(name):
        opcheck(
            _decode.call,
            (*step.arguments(torch.float32, torch.float32), *step.options.values()),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
