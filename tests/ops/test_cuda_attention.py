"""Promises of the CUDA kernels of attention beyond those of the op, in the simulator."""

from __future__ import annotations

import pytest
import torch

from comparison import backend, needs_simulator, random
from gpt2fast import ops
from gpt2fast.ops.attention import _backward, _forward
from gpt2fast.ops.cuda.attention import _heads
from tolerance import assert_allclose, assert_close, assert_equal

pytestmark = needs_simulator


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(q, k, v, grad, mask=None, p=0.0, causal=True, scale=0.2):
    seed = torch.tensor([9])
    with backend("simulator"):
        out, lse = _forward.call(q, k, v, scale, mask, p, seed, causal)
        return _backward.call(grad, q, k, v, out, lse, scale, mask, p, seed, causal)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("key_heads", "causal"), [(2, True), (1, True), (1, False)])
def test_deterministic_gradients_are_the_same_bits_in_every_order(
    width, p, key_heads, causal, deterministic, monkeypatch
):
    heads = [2, key_heads, key_heads, 2]
    inputs = [random(1, 200, count, width).bfloat16() for count in heads]
    mask = torch.rand(1, 200) < 0.7
    monkeypatch.setenv("GPT2FAST_SIM_ORDER", "fifo")
    once = gradients(*inputs, mask, p, causal)
    monkeypatch.setenv("GPT2FAST_SIM_ORDER", "random")
    for mine, other in zip(once, gradients(*inputs, mask, p, causal), strict=True):
        assert_equal(mine, other)
    torch.use_deterministic_algorithms(False)
    both = gradients(*inputs, mask, p, causal)
    # With atomics only the last bits of the queries' gradient differ.
    assert_close([once[0]], [both[0].roll(1)], [both[0].double()], times=0.01)
    for mine, other in zip(once[1:], both[1:], strict=True):
        assert_equal(mine, other)


@pytest.mark.parametrize("causal", [False, True])
def test_deterministic_gradients_do_not_count_keys_past_the_end(causal, deterministic):
    q, k, v, grad = (random(2, 17, heads, 32).bfloat16() for heads in (2, 1, 1, 2))
    # Scores of some -160, beside 0 of keys that are filled up.
    given = q.abs(), -k.abs(), v, grad
    found = gradients(*given, causal=causal, scale=8.0)
    with backend("reference"):
        seed = torch.tensor([9])
        options = 8.0, None, 0.0, seed, causal
        out, lse = _forward.call(*(x.double() for x in given[:3]), *options)
        exact = _backward.call(grad.double(), *(x.double() for x in given[:3]), out, lse, *options)
        out, lse = _forward.call(*given[:3], *options)
        rounded = _backward.call(grad, *given[:3], out, lse, *options)
    assert_close(found, rounded, exact, times=3.0)


@pytest.mark.parametrize("width", [64, 20])
def test_half_precision_views_at_odd_addresses_and_strides(width):
    packed = random(2, 33, 3, 2, width + 1).bfloat16()
    expected = None
    for q, k, v in [
        packed[..., 1:].unbind(2),  # rows that are not aligned
        packed[..., 1:].contiguous().unbind(2),
        packed[..., 1:].permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4).unbind(2),
    ]:
        grad = torch.ones((), dtype=q.dtype).expand(q.shape)
        got = gradients(q, k, v, grad)
        expected = expected or got
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_views_of_packed_tensors_are_read_in_place():
    packed = torch.zeros(2, 5, 3, 4, 64, dtype=torch.bfloat16)
    assert all(_heads(x) is x for x in packed.unbind(2))
    fewer = packed.flatten(2, 3).split([8, 2, 2], 2)
    assert all(_heads(x) is x for x in fewer)


def test_wider_heads_fall_back():
    q = torch.randn(1, 3, 1, 136)
    with backend("simulator"), pytest.raises(Exception, match="128, not 136"):
        ops.causal_attention(q, q, q)


def test_permuted_heads_of_an_odd_size_are_filled_up():
    x = torch.randn(1, 1, 31, 3).half().permute(0, 3, 1, 2)
    with backend("simulator"):
        found = ops.causal_attention(x, x, x)
    with backend("reference"):
        assert_allclose(found, ops.causal_attention(x, x, x), atol=1e-2)
