"""Each op against the expression that one would write in torch, eager and compiled.

Shapes are GPT-2's (124M); `forward` runs without gradients, `training` forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import ops


def each_way(test: Callable) -> Callable:
    """Both dtypes, both ways, against both of torch's."""
    dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_short)
    ways = pytest.mark.parametrize("way", ["forward", "training"])
    return dtypes(ways(pytest.mark.parametrize("against", ["eager", "compiled"])(test)))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


TIMES = pytest.mark.parametrize(("batch", "time"), [(8, 256), (2, 1024)])


def timed(function: Callable[..., Any], inputs: tuple[Tensor, ...], way: str) -> Callable:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def forward():
        with torch.no_grad():
            function(*leaves)

    def training():
        out = function(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return forward if way == "forward" else training


def pair(
    ours: Callable, theirs: Callable, inputs: tuple[Tensor, ...], way: str, against: str
) -> tuple[Callable, Callable]:
    if against == "compiled":
        torch.compiler.reset()
        theirs = torch.compile(theirs, dynamic=False)
    return timed(ours, inputs, way), timed(theirs, inputs, way)


@each_way
@TIMES
def test_causal_attention(versus, dtype, way, against, batch, time):
    qkv = torch.randn(batch, time, 3, 12, 64, dtype=dtype)

    def theirs(qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def ours(qkv):
        return ops.causal_attention(*qkv.unbind(2))

    versus(*pair(ours, theirs, (qkv,), way, against))


@each_way
@TIMES
@pytest.mark.parametrize(("causal", "key_heads"), [(False, 12), (True, 4)], ids=["all", "grouped"])
def test_attention(versus, dtype, way, against, batch, time, causal, key_heads):
    """Not causal, and causal with three heads of queries on one of keys."""
    q = torch.randn(batch, time, 12, 64, dtype=dtype)
    k, v = torch.randn(2, batch, time, key_heads, 64, dtype=dtype)

    def theirs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = key_heads < 12
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    def ours(q, k, v):
        return ops.attention(q, k, v, causal=causal)

    versus(*pair(ours, theirs, (q, k, v), way, against))


@each_way
@TIMES
def test_residual_layer_norm(versus, dtype, way, against, batch, time):
    x, residual = torch.randn(2, batch, time, 768, dtype=dtype)
    weight, bias = torch.ones(768, dtype=dtype), torch.zeros(768, dtype=dtype)

    def theirs(x, residual, weight, bias):
        summed = x + residual
        return F.layer_norm(summed, (768,), weight, bias), summed

    inputs = (x, residual, weight, bias)
    versus(*pair(ops.residual_layer_norm, theirs, inputs, way, against), rounds=21)


@each_way
@TIMES
def test_bias_gelu(versus, dtype, way, against, batch, time):
    def theirs(x, bias):
        return F.gelu(x + bias, approximate="tanh")

    inputs = (torch.randn(batch, time, 3072, dtype=dtype), torch.randn(3072, dtype=dtype))
    versus(*pair(ops.bias_gelu, theirs, inputs, way, against), rounds=21)


@each_way
@TIMES
def test_gelu_mlp(versus, dtype, way, against, batch, time):
    x = torch.randn(batch * time, 768, dtype=dtype)
    w_fc, w_proj = (torch.randn(s, dtype=dtype) * 0.02 for s in [(768, 3072), (3072, 768)])
    b_fc, b_proj = torch.zeros(3072, dtype=dtype), torch.zeros(768, dtype=dtype)

    def theirs(x, w_fc, b_fc, w_proj, b_proj):
        return torch.addmm(b_proj, F.gelu(torch.addmm(b_fc, x, w_fc), approximate="tanh"), w_proj)

    versus(*pair(ops.gelu_mlp, theirs, (x, w_fc, b_fc, w_proj, b_proj), way, against))


@each_way
@pytest.mark.parametrize("rows", [256, 1024])
def test_linear_cross_entropy(versus, dtype, way, against, rows):
    hidden = torch.randn(rows, 768, dtype=dtype)
    weight = torch.randn(50257, 768, dtype=dtype) * 0.02
    targets = torch.randint(50257, (rows,))

    def theirs(hidden, weight):
        return F.cross_entropy((hidden @ weight.t()).float(), targets)

    def ours(hidden, weight):
        return ops.linear_cross_entropy(hidden, weight, targets)

    versus(*pair(ours, theirs, (hidden, weight), way, against), rounds=5)


@each_way
@TIMES
def test_embedding(versus, dtype, way, against, batch, time):
    tables = torch.randn(50257, 768, dtype=dtype), torch.randn(1024, 768, dtype=dtype)
    tokens, positions = torch.randint(50257, (batch, time)), torch.arange(time)

    def theirs(wte, wpe):
        return F.embedding(tokens, wte) + F.embedding(positions, wpe)

    def ours(wte, wpe):
        return ops.embedding(tokens, positions, wte, wpe)

    versus(*pair(ours, theirs, tables, way, against), rounds=21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_short)
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_fused_adamw_against_torch_optim(versus, dtype, fused):
    params = [torch.randn(768, 3072, dtype=dtype, requires_grad=True) for _ in range(8)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=fused)
    ours = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    moments = [[torch.zeros_like(p) for p in ours] for _ in range(2)]
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

    def step():
        ops.fused_adamw(ours, grads, *moments, step=1, **settings)

    versus(step, optimizer.step, rounds=21)


def test_sample_against_sort_and_multinomial(versus):
    logits = torch.randn(1, 50257) * 3
    history, uniform = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0.3])

    def peer():
        values, indices = (logits / 0.8).topk(50)
        probabilities = values.softmax(-1)
        probabilities[probabilities.cumsum(-1) - probabilities > 0.95] = 0.0
        return indices.gather(1, probabilities.multinomial(1))

    def ours():
        return ops.sample(logits, history, uniform, temperature=0.8, top_k=50, top_p=0.95)

    versus(ours, peer, rounds=50)
