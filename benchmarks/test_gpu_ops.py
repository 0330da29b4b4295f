"""Each op on a GPU: our CUDA and Triton kernels beside torch's, FlashAttention's and Liger's.

Shapes are GPT-2's, 16,384 tokens, bfloat16. `forward` runs without gradients, `both` forward and
backward. With GPT2FAST_QUICK=1, torch.compile, which takes longest, is there for one width alone.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from contest import Work, sets_beyond_cache
from gpt2fast import backend, ops
from gpt2fast.ops.cuda import cublaslt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

TOKENS = 16384
WIDTHS = [768, 1024, 1280, 1600]
WAYS = pytest.mark.parametrize("way", ["forward", "both"])
DTYPE = torch.bfloat16


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(DTYPE)


def forced(name: str, function: Callable) -> Callable:
    """`function` with one of our backends."""

    def run(*arguments: Any) -> Any:
        with backend(name):
            return function(*arguments)

    return run


def with_cublaslt(on: bool, function: Callable) -> Callable:
    """`function` with cuBLASLt's epilogues, or without."""

    def run(*arguments: Any) -> Any:
        with cublaslt.forced(on):
            return function(*arguments)

    return run


def ours(function: Callable) -> dict[str, Callable]:
    return {"ours": forced("native", function), "ours (Triton)": forced("triton", function)}


def beside_torch(ways: dict[str, Callable], plain: Callable, width: int) -> dict[str, Callable]:
    """Adds what one would write in torch, eager and compiled; in a hurry compiled once only."""
    ways["torch"] = plain
    if width == WIDTHS[0] or os.environ.get("GPT2FAST_QUICK") != "1":
        torch.compiler.reset()
        ways["torch.compile"] = torch.compile(plain, dynamic=False)
    return ways


def differentiated(ways: dict[str, Callable], leaves: int) -> dict[str, Callable]:
    """Forward and backward; the gradients of the results follow the first `leaves` arguments."""

    def both(function: Callable) -> Callable:
        def run(*arguments: Any) -> None:
            inputs = [x.detach().requires_grad_() for x in arguments[:leaves]]
            out = function(*inputs)
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, inputs, arguments[leaves])

        return run

    return {way: both(function) for way, function in ways.items()}


def without_gradients(ways: dict[str, Callable], leaves: int) -> dict[str, Callable]:
    def forward(function: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            with torch.no_grad():
                return function(*arguments[:leaves])

        return run

    return {way: forward(function) for way, function in ways.items()}


def run_ways(
    compete: Callable, way: str, ways: dict[str, Callable], make: Callable, work: Work, size: float
) -> None:
    """make() returns one set of arguments, the gradient of the result last."""
    compete(*prepare(way, ways, make, size), work)


def prepare(
    way: str, ways: dict[str, Callable], make: Callable, size: float
) -> tuple[dict[str, Callable], list]:
    """The ways with their backward passes where these are wanted, and the inputs; as `run_ways`."""
    inputs = [make() for _ in range(sets_beyond_cache(size))]
    leaves = len(inputs[0]) - 1
    prepared = (differentiated if way == "both" else without_gradients)(ways, leaves)
    # The backward pass, too, runs with the backend that its forward pass had.
    for name, chosen in {"ours": "native", "ours (Triton)": "triton"}.items():
        prepared[name] = forced(chosen, prepared[name])
    return prepared, inputs


@WAYS
@pytest.mark.parametrize("time", [1024, 4096, 16384])
def test_causal_attention(compete, way, time):
    batch, heads, size = TOKENS // time, 12, 64

    def with_kernel(kernel: SDPBackend) -> Callable:
        def run(qkv: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return run

    ways = ours(lambda qkv: ops.causal_attention(*qkv.unbind(2)))
    ways["torch (flash)"] = with_kernel(SDPBackend.FLASH_ATTENTION)
    ways["torch (cuDNN)"] = with_kernel(SDPBackend.CUDNN_ATTENTION)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_qkvpacked_func

        ways["FlashAttention"] = lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True)
    product = 2 * batch * heads * time * time * size / 2  # half is hidden
    elements = TOKENS * heads * size
    flops, moved = (2, 4) if way == "forward" else (7, 12)
    work = Work(moved * elements * 2, flops * product)

    def make():
        return random(batch, time, 3, heads, size), random(batch, time, heads, size)

    run_ways(compete, way, ways, make, work, 8 * elements)


@WAYS
@pytest.mark.parametrize("width", WIDTHS)
def test_residual_layer_norm(compete, way, width):
    weight, bias = random(width), random(width)

    def plain(x, residual, weight, bias):
        summed = x + residual
        return F.layer_norm(summed, (width,), weight, bias), summed

    ways = beside_torch(ours(ops.residual_layer_norm), plain, width)
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        ways["Liger"] = lambda x, residual, weight, bias: LigerLayerNormFunction.apply(
            x + residual, weight, bias, 1e-5
        )
    elements = TOKENS * width
    # Backward reads the gradient and the sum, and writes the gradient of both inputs once.
    work = Work((8 if way == "forward" else 8 + 6) * elements)

    def make():
        x, residual, grad = (random(TOKENS, width) for _ in range(3))
        return x, residual, weight, bias, grad

    run_ways(compete, way, ways, make, work, 6 * elements)


@WAYS
@pytest.mark.parametrize("width", WIDTHS)
def test_bias_gelu(compete, way, width):
    inner = 4 * width
    bias = random(inner)

    def plain(x, bias):
        return F.gelu(x + bias, approximate="tanh")

    ways = beside_torch(ours(ops.bias_gelu), plain, width)
    elements = TOKENS * inner
    work = Work((4 if way == "forward" else 4 + 6) * elements)

    def make():
        return random(TOKENS, inner), bias, random(TOKENS, inner)

    run_ways(compete, way, ways, make, work, 4 * elements)


@WAYS
@pytest.mark.parametrize("width", WIDTHS)
def test_gelu_mlp(compete, way, width):
    inner = 4 * width
    weights = random(width, inner, scale=0.02), random(inner), random(inner, width, scale=0.02)

    def plain(x, w_fc, b_fc, w_proj, b_proj):
        return torch.addmm(b_proj, F.gelu(torch.addmm(b_fc, x, w_fc), approximate="tanh"), w_proj)

    ways = beside_torch(ours(ops.gelu_mlp), plain, width)
    flops = (4 if way == "forward" else 12) * TOKENS * width * inner
    work = Work(2 * (2 * TOKENS * width + 2 * width * inner), flops)

    def make():
        return random(TOKENS, width), *weights, random(width), random(TOKENS, width)

    prepared, inputs = prepare(way, ways, make, 4 * TOKENS * width)
    # The same op with and without epilogues: whichever is faster should be the default.
    for name, on in {"ours (cuBLASLt)": True, "ours (cuBLAS, GELU apart)": False}.items():
        prepared[name] = with_cublaslt(on, prepared["ours"])
    compete(prepared, inputs, work)


@pytest.mark.parametrize("width", [768, 1600])
def test_linear_cross_entropy(compete, width):
    vocabulary = 50257
    weight = random(vocabulary, width, scale=0.02)

    def plain(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.t()).float(), targets)

    def both(function: Callable) -> Callable:
        def run(hidden: Tensor, targets: Tensor) -> None:
            leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
            torch.autograd.grad(function(*leaves, targets), leaves)

        return run

    ways = beside_torch(ours(ops.linear_cross_entropy), plain, width)
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        ways["Liger"] = lambda hidden, weight, targets: LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, targets
        )[0]
    inputs = [
        (random(TOKENS, width), torch.randint(vocabulary, (TOKENS,), device="cuda"))
        for _ in range(2)
    ]
    work = Work(2 * TOKENS * vocabulary * 2, 6 * TOKENS * width * vocabulary)
    compete({way: both(function) for way, function in ways.items()}, inputs, work)


@WAYS
def test_embedding(compete, way):
    width, time = 768, 1024
    tables = random(50257, width), random(time, width)
    positions = torch.arange(time, device="cuda")
    # Words are frequent and rare, as in text: token n about as often as 1 / n.
    weights = 1.0 / torch.arange(1, 50258, device="cuda")

    def plain(tokens):
        return lambda wte, wpe: F.embedding(tokens, wte) + F.embedding(positions, wpe)

    def op(tokens):
        return lambda wte, wpe: ops.embedding(tokens, positions, wte, wpe)

    def prepared(make_function: Callable) -> Callable:
        def run(tokens: Tensor, grad: Tensor) -> None:
            if way == "forward":
                with torch.no_grad():
                    make_function(tokens)(*tables)
                return
            leaves = [table.detach().requires_grad_() for table in tables]
            torch.autograd.grad(make_function(tokens)(*leaves), leaves, grad)

        return run

    ways = {
        "ours": forced("native", prepared(op)),
        "ours (Triton)": forced("triton", prepared(op)),
        "torch": prepared(plain),
    }
    elements = TOKENS * width
    work = Work(4 * elements if way == "forward" else 6 * elements + 2 * tables[0].numel())
    inputs = []
    for _ in range(4):
        tokens = torch.multinomial(weights, TOKENS, replacement=True).view(-1, time)
        inputs.append((tokens, random(*tokens.shape, width)))
    compete(ways, inputs, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_adamw(compete, dtype):
    shapes = [(768, 2304), (2304,), (768, 768), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    shapes = [(50257, 768), *shapes * 12]

    def make():
        params, grads = ([torch.randn(s, device="cuda").to(dtype) for s in shapes] for _ in "pg")
        moments = [[torch.rand(s, device="cuda").to(dtype) for s in shapes] for _ in "mv"]
        return params, grads, *moments

    def op(*lists):
        ops.fused_adamw(
            *lists, step=3, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1
        )  # fmt: skip

    def torchs(params, grads, first, second):
        steps = [torch.full((), 3.0, device="cuda")] * len(params)
        torch._fused_adamw_(
            params, grads, first, second, [], steps, lr=1e-3, beta1=0.9, beta2=0.95,
            weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    inputs = [make()]
    elements = sum(x.numel() for x in inputs[0][0])
    work = Work(7 * elements * inputs[0][0][0].element_size())
    compete({**ours(op), "torch (fused)": torchs}, inputs, work)


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("length", [128, 1000])
def test_attention_with_cache(compete, batch, length):
    heads, size, room = 12, 64, 1024
    lengths = torch.full((batch,), length, device="cuda")

    def plain(q, k_cache, v_cache):
        q, k, v = (
            x.transpose(1, 2) for x in (q, k_cache[:, : length + 1], v_cache[:, : length + 1])
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def op(q, k_cache, v_cache):
        return ops.attention_with_cache(q, k_cache, v_cache, lengths)

    entries = batch * (length + 1) * heads * size

    def make():
        return random(batch, 1, heads, size), *(random(batch, room, heads, size) for _ in "kv")

    inputs = [make() for _ in range(sets_beyond_cache(4 * entries))]
    ways = without_gradients({**ours(op), "torch": plain}, 3)
    compete(ways, inputs, Work(4 * entries))
