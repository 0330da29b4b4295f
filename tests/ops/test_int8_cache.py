"""Keys and values in 8 bits: the bytes that are written, and what is read from them."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from comparison import BACKENDS, CUDA_BACKENDS, TRITON_BACKENDS, backend, needs_native, random
from gpt2fast import GPT2, GPT2Config, KVCache, ops
from gpt2fast.errors import ArgumentError, BackendError
from gpt2fast.inference import engine
from gpt2fast.inference.engine import ModelDecoder
from gpt2fast.ops.attention import _cached
from gpt2fast.ops.backend import record_calls
from gpt2fast.ops.cache import _append
from gpt2fast.ops.decode import _decode
from tolerance import assert_allclose, assert_close, assert_equal

# The CPU's kernels of single ops have no int8 caches.
BACKENDS = [each for each in BACKENDS if getattr(each, "values", ()) != ("native",)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_8_bits(x):
    """Entries (..., D) as csrc/cpu/decode.h stores them: int8, and factors (...)."""
    largest = x.float().abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0.0)
    return (x.float() * inverse).round().to(torch.int8), (largest / torch.tensor(127.0))[..., 0]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("given", "heads", "width"),
    [
        (torch.float32, 3, 64),
        (torch.bfloat16, 3, 64),
        (torch.float16, 12, 40),
        (torch.bfloat16, 2, 5),
        (torch.float32, 1, 1),
        (torch.bfloat16, 1, 136),
    ],
    ids=str,
)
def test_entries_are_rounded_to_the_same_bytes_everywhere(name, given, heads, width):
    packed = (7 * torch.randn(3, 4, 3, heads, width)).to(given)
    packed[1, :2] = 0.0
    packed[2, 1, :, 0] *= 1e-4
    _, k, v = packed.unbind(2)
    # Numbers halfway between integers: the factor is 1.
    k[0, :, 0] = torch.arange(width) % 8 + 0.5
    k[0, :, 0, width // 2] = 127.0
    starts, counts = [0, 3, 9], [4, 2, -1]
    # Views between other entries and heads, none of which may change.
    caches = torch.full((2, 3, 16, heads + 1, width), 99, dtype=torch.int8)
    scales = torch.full((2, 3, 16, heads + 1), -1.0)
    expected, expected_scales = caches.clone(), scales.clone()
    for new, whole, factors in zip((k, v), expected, expected_scales, strict=True):
        for row, (begin, count) in enumerate(zip(starts, counts, strict=True)):
            entries, found = in_8_bits(new[row, : max(count, 0)])
            whole[row, 2 + begin : 2 + begin + max(count, 0), :heads] = entries
            factors[row, 2 + begin : 2 + begin + max(count, 0), :heads] = found
    with backend(name):
        ops.append_to_cache(
            k, v, *caches[:, :, 2:14, :heads], torch.tensor(starts), torch.tensor(counts),
            *scales[:, :, 2:14, :heads],
        )  # fmt: skip
    assert torch.equal(caches, expected) and torch.equal(scales, expected_scales)


@needs_native
def test_packed_models_write_the_same_bytes():
    model = GPT2(GPT2Config(vocab_size=97, n_positions=16, n_embd=96, n_layer=1, n_head=2)).eval()
    tokens = torch.tensor([[5, 9, 70, 2]])
    packed, unpacked = (model.new_cache(1, 8, torch.int8) for _ in range(2))
    model.pack().prefill(tokens, [4], [0], packed)
    ModelDecoder(model).prefill(tokens, [4], [0], unpacked)
    # Keys differ by float32's rounding before they are stored.
    assert (packed.k.int() - unpacked.k.int()).abs().max() <= 1
    assert_allclose(packed.k_scales, unpacked.k_scales, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_no_number_makes_a_factor_none(name):
    k = torch.ones(1, 1, 3, 40)
    k[0, 0, 0, 33], k[0, 0, 1, 2] = float("nan"), float("inf")
    cache, scales = torch.zeros(2, 1, 2, 3, 40).to(torch.int8), torch.zeros(2, 1, 2, 3)
    with backend(name):
        ops.append_to_cache(k, k, *cache, torch.tensor([0]), None, *scales)
    assert scales[:, 0, 0, 0].isnan().all() and scales[:, 0, 0, 1].isinf().all()
    assert (cache[:, 0, 0, 2] == 127).all() and (scales[:, 0, 0, 2] * 127 == 1).all()


@needs_native
@pytest.mark.parametrize("width", [20, 64])
@pytest.mark.parametrize("part", [1, 2], ids=["keys", "values"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17])
def test_packed_models_keep_what_is_no_number(width, part, odd, place):
    config = GPT2Config(vocab_size=97, n_positions=16, n_embd=2 * width, n_layer=1, n_head=2)
    model = GPT2(config).eval()
    with torch.no_grad():
        model.h[0].attn.c_attn.bias[part * 2 * width + width + place] = odd
    packed, unpacked = (model.new_cache(1, 8, torch.int8) for _ in range(2))
    model.pack().prefill(torch.tensor([[5, 9, 70]]), [3], [0], packed)
    ModelDecoder(model).prefill(torch.tensor([[5, 9, 70]]), [3], [0], unpacked)
    scales, expected = ([x.k_scales, x.v_scales][part - 1] for x in (packed, unpacked))
    assert not expected[..., :3, 1].isfinite().any()
    assert_allclose(scales[..., :3, 0], expected[..., :3, 0], rtol=1e-4)
    assert_equal(scales[..., :3, 1].isinf(), expected[..., :3, 1].isinf())
    written = ([x.k, x.v][part - 1][..., :3, 1, :] for x in (packed, unpacked))
    assert all((entries == 0).all() for entries in written)
    # A step of one token meets them in the cache.
    assert model.pack().decode_step(torch.tensor([2]), packed).isnan().all()


@needs_native
@pytest.mark.parametrize("width", [20, 64])
def test_packed_models_store_tiny_entries(width):
    config = GPT2Config(vocab_size=97, n_positions=16, n_embd=2 * width, n_layer=1, n_head=2)
    model = GPT2(config).eval()
    tiny = 1e-38 * torch.randn(2 * width)
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:, 4 * width :] = 0.0
        model.h[0].attn.c_attn.bias[4 * width :] = tiny
    cache = model.new_cache(1, 8, torch.int8)
    model.pack().prefill(torch.tensor([[5]]), [1], [0], cache)
    assert (cache.v[0, 0, 0] == 0).all()
    assert_allclose(cache.v_scales[0, 0, 0], tiny.view(2, width).abs().amax(-1) / 127.0, atol=1e-42)


def compare(name, dtype, time, lengths, entries, heads, width):
    """Against float64 that reads the same bytes; what lies behind the rows' ends is no number."""
    q = random(len(lengths), time, heads, width)
    caches = torch.randint(-127, 128, (2, len(lengths), entries, heads, width)).to(torch.int8)
    scales = torch.rand(2, len(lengths), entries, heads) / 50
    for row, length in enumerate(lengths):
        scales[:, row, length + time :] = float("nan")
    starts = torch.tensor(lengths)
    with backend("reference"):
        exact = ops.attention_with_cache(q, *caches, starts, None, *scales)
        other = ops.attention_with_cache(q.to(dtype), *caches, starts, None, *scales)
    with backend(name):
        ours = ops.attention_with_cache(q.to(dtype), *caches, starts, None, *scales)
    assert ours.dtype == dtype
    assert_close([ours], [other], [exact], times=2.0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [1, 3])
def test_attention_to_ragged_rows(name, dtype, time):
    compare(name, dtype, time, [64, 0, 127], 150, 2, 64)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize("width", [1, 16, 40, 96, 128])
def test_attention_to_heads_of_every_size(name, time, width):
    compare(name, torch.float32, time, [0, 60], 70, 1, width)


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [1, 2, 17])
def test_attention_to_rows_that_end_anywhere(name, dtype, time):
    compare(name, dtype, time, [1006, 300, 127], 1023, 2, 64)


@pytest.mark.parametrize("name", BACKENDS)
def test_attention_reads_views(name):
    q = torch.randn(2, 1, 2, 64)
    caches = torch.randint(-127, 128, (2, 2, 21, 5, 64)).to(torch.int8)
    scales = torch.rand(2, 2, 21, 5)
    lengths = torch.tensor([3, 15])
    with backend(name):
        # The second of a pair of heads in the middle: bytes that nothing aligns.
        found = ops.attention_with_cache(
            q, *caches[:, :, 1:, 1:3], lengths, None, *scales[:, :, 1:, 1:3]
        )
        copies = [x[:, :, 1:, 1:3].contiguous() for x in (caches, scales)]
        expected = ops.attention_with_cache(q, *copies[0], lengths, None, *copies[1])
        shifted = caches.new_zeros(caches.numel() + 1)[1:].view(caches.shape).copy_(caches)
        unaligned = ops.attention_with_cache(
            q, *shifted[:, :, 1:, 1:3], lengths, None, *scales[:, :, 1:, 1:3]
        )
    assert_equal(found, expected)
    assert_allclose(unaligned, expected, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_move_with_their_factors(name):
    cache = KVCache(1, 3, 10, 2, 16, torch.int8)
    layer = cache.layer(0)
    k, v = torch.randn(2, 3, 2, 2, 16)
    with backend(name):
        ops.append_to_cache(
            k, v, layer.k, layer.v, layer.lengths, None, layer.k_scales, layer.v_scales
        )
        cache.advance(2, None, cache.positions + 2)
        before = [x.clone() for x in (cache.k, cache.v, cache.k_scales, cache.v_scales)]
        cache.reorder(torch.tensor([2, 0]))
    for now, old in zip((cache.k, cache.v, cache.k_scales, cache.v_scales), before, strict=True):
        assert_equal(now[:, :, :2], old[:, [2, 0], :2])


def test_nonsense_is_refused():
    k, cache, lengths = torch.ones(2, 1, 3, 8), torch.zeros(2, 5, 3, 8), torch.zeros(2).long()
    narrow, scales = cache.to(torch.int8), torch.zeros(2, 5, 3)

    def refused(message, k_cache, v_cache, k_scales, v_scales):
        with pytest.raises(ArgumentError, match=message):
            ops.append_to_cache(k, k, k_cache, v_cache, lengths, None, k_scales, v_scales)
        with pytest.raises(ArgumentError, match=message):
            ops.attention_with_cache(k, k_cache, v_cache, lengths, None, k_scales, v_scales)

    refused(r"k_cache is int8 and needs k_scales.*\(2, 5, 3\)", narrow, narrow, None, None)
    refused("v_cache is int8 and needs v_scales", narrow, narrow, scales, None)
    refused("k_cache is torch.float32; leave them out", cache, cache, scales, scales)
    refused(r"\(2, 5, 3\).* not torch.float32 \(2, 4, 3\)", narrow, narrow, scales[:, :4], scales)
    refused("v_scales must be float32", narrow, narrow, scales, scales.double())
    refused("both are int8 or none", narrow, cache, scales, None)


@needs_native
def test_kernels_of_single_ops_on_the_cpu_leave_8_bits_to_torch():
    k, cache = torch.ones(1, 1, 1, 8), torch.zeros(1, 2, 1, 8).to(torch.int8)
    scales, lengths = torch.ones(1, 2, 1), torch.tensor([0])
    with backend("native"):
        with pytest.raises(BackendError, match="int8 caches are those of packed models"):
            ops.append_to_cache(k, k, cache, cache.clone(), lengths, None, scales, scales.clone())
        with pytest.raises(BackendError, match="int8 caches are those of packed models"):
            ops.attention_with_cache(k, cache, cache, lengths, None, scales, scales)


@pytest.mark.parametrize("name", ["torch", *CUDA_BACKENDS])
def test_the_ops_pass_opcheck(name):
    k, q = random(2, 3, 2, 16).float(), random(2, 1, 2, 16).float()
    caches, scales = torch.ones(2, 2, 9, 2, 16).to(torch.int8), torch.ones(2, 2, 9, 2)
    lengths = torch.tensor([1, 5])
    with backend(name):
        opcheck(_append.call, (k, k, *caches, lengths, None, *scales))
        opcheck(_cached.call, (q, *caches, lengths, 0.2, *scales))


@pytest.mark.parametrize("name", CUDA_BACKENDS)
def test_whole_steps_pass_opcheck(name):
    model = Model(32, 2, [3, 1], entries=5, layers=1)
    with backend(name):
        opcheck(
            _decode.call,
            (
                [weight.float() for weight in model.weights], *model.caches, model.tokens,
                model.lengths, model.lengths, *model.options.values(), *model.scales,
            ),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )  # fmt: skip


class Model:
    """A whole step's weights, and caches in which some entries are stored."""

    def __init__(self, width, heads, lengths, entries=40, inner=80, vocab=61, layers=2):
        def some(*shape):
            return 0.3 * random(*shape)

        self.weights = [some(vocab, width), some(entries, width)]
        for _ in range(layers):
            self.weights += [1 + some(width), some(width)]
            self.weights += [some(width, 3 * width), some(3 * width), some(width, width)]
            self.weights += [some(width), 1 + some(width), some(width), some(width, inner)]
            self.weights += [some(inner), some(inner, width), some(width)]
        self.weights += [1 + some(width), some(width), some(vocab, width)]
        shape = (2, layers, len(lengths), entries, heads, width // heads)
        self.caches = torch.randint(-127, 128, shape).to(torch.int8)
        self.scales = torch.rand(shape[:-1]) / 100
        self.lengths = torch.tensor(lengths)
        self.rows = torch.arange(len(lengths))
        self.tokens = torch.randint(vocab, (len(lengths),))
        self.options = dict(
            n_head=heads, attention_scales=[0.3] * layers, activation="gelu_new", eps=1e-5
        )

    def run(self, name, dtype):
        """Logits, and the new keys and values as they are read; the others must be as before."""
        caches, scales = self.caches.clone(), self.scales.clone()
        with backend(name):
            logits = ops.decode_step(
                [weight.to(dtype) for weight in self.weights], *caches, self.tokens, self.lengths,
                self.lengths, **self.options, k_scales=scales[0], v_scales=scales[1],
            )  # fmt: skip
        new = (slice(None), slice(None), self.rows, self.lengths)
        entries = caches[new].double() * scales[new].double()[..., None]
        caches[new], scales[new] = self.caches[new], self.scales[new]
        assert torch.equal(caches, self.caches) and torch.equal(scales, self.scales)
        return logits, entries


@pytest.mark.parametrize("name", [*CUDA_BACKENDS, *TRITON_BACKENDS])
@pytest.mark.parametrize(
    ("dtype", "width", "heads", "lengths"),
    [
        (torch.float32, 48, 3, [4]),
        (torch.bfloat16, 64, 1, [12, 0, 31]),
        (torch.float16, 51, 3, [7, 39]),
    ],
    ids=str,
)
def test_whole_steps(name, dtype, width, heads, lengths):
    model = Model(width, heads, lengths)
    if dtype == torch.float32:
        # Keys and values are their biases: what float32 rounds otherwise than float64 might be
        # another integer, and that is not an error of float32's size.
        for layer in range(2):
            model.weights[2 + 12 * layer + 2][:, width:] = 0.0
    exact, exact_entries = model.run("reference", torch.float64)
    other, other_entries = model.run("reference", dtype)
    ours, entries = model.run(name, dtype)
    assert_close([ours], [other], [exact], times=3.0)
    assert_close([entries], [other_entries], [exact_entries], times=3.0)


def test_a_whole_step_needs_the_factors():
    model = Model(48, 3, [4])
    with pytest.raises(ArgumentError, match=r"k_cache is int8 and needs.*\(2, 1, 40, 3\)"):
        ops.decode_step(
            model.weights, *model.caches, model.tokens, model.lengths, model.lengths,
            **model.options,
        )  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
def test_a_model_decodes_with_half_the_cache(name, monkeypatch):
    # The simulator's tensors are on a CPU, where a model would be packed for steps.
    monkeypatch.setattr(engine, "packed_copy", lambda model, thorough: None)
    config = GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2)
    model = GPT2(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    prompts = torch.randint(61, (2, 5))

    def logits(name, dtype):
        """After a padded prompt, after two more tokens at once, and after two single steps."""
        cache = model.new_cache(2, 12, dtype)
        with backend(name), record_calls() as calls, torch.no_grad():
            found = [ModelDecoder(model).prefill(prompts, [5, 3], [0, 0], cache)]
            found.append(model(prompts[:, :2], cache=cache).logits[:, -1])
            found += [model.decode_step(prompts[:, i], cache) for i in (2, 3)]
        return torch.stack(found), cache, {call.op for call in calls}

    expected, cache, _ = logits("reference", torch.int8)
    found, same, called = logits(name, torch.int8)
    assert {"append_to_cache", "attention_with_cache", "decode_step"} <= called
    assert same.lengths.tolist() == [9, 7] and same.entry_bytes == 2 * 2 * 2 * (16 + 4)
    # A number on the border of two integers may fall to either side.
    assert (same.k.int() - cache.k.int()).abs().max() <= 1
    assert_allclose(found, expected, atol=0.02)
    exact, _, _ = logits("reference", torch.float32)
    assert not torch.equal(found[1:], exact[1:])
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generation_runs_on_int8_caches(options, monkeypatch):
    config = GPT2Config(vocab_size=61, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    model = GPT2(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts, mask = torch.tensor([[5, 9, 33], [0, 0, 7]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    new_cache = model.new_cache
    # No option of generate's: an int8 cache is for who makes it, and the loop takes any.
    monkeypatch.setattr(model, "new_cache", lambda *sizes: new_cache(*sizes, torch.int8))
    with backend("reference"), record_calls() as calls:
        tokens = model.generate(prompts, mask, max_new_tokens=12, **options)
        uncached = model.generate(prompts, mask, max_new_tokens=12, use_cache=False, **options)
    assert "decode_step" in {call.op for call in calls}
    assert_equal(tokens, uncached)
