"""Forward and backward of each op against the expression that one would write in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpt2fast import ops

DTYPES = [torch.float32, torch.bfloat16]


def both_ways(function, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run():
        out = function(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out.sum(), leaves)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_attention_against_scaled_dot_product_attention(versus, dtype):
    qkv = torch.randn(8, 256, 3, 12, 64, dtype=dtype)

    def peer(qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    ours = both_ways(lambda qkv: ops.causal_attention(*qkv.unbind(2)), qkv)
    versus(ours, both_ways(peer, qkv))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_layer_norm_against_layer_norm(versus, dtype):
    x, residual = torch.randn(2, 4096, 768, dtype=dtype)
    weight, bias = torch.ones(768, dtype=dtype), torch.zeros(768, dtype=dtype)

    def peer(x, residual, weight, bias):
        return F.layer_norm(x + residual, (768,), weight, bias)

    inputs = (x, residual, weight, bias)
    versus(both_ways(ops.residual_layer_norm, *inputs), both_ways(peer, *inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_mlp_against_linear_and_gelu(versus, dtype):
    x = torch.randn(2048, 768, dtype=dtype)
    w_fc, w_proj = (torch.randn(s, dtype=dtype) * 0.02 for s in [(768, 3072), (3072, 768)])
    b_fc, b_proj = torch.zeros(3072, dtype=dtype), torch.zeros(768, dtype=dtype)

    def peer(x, w_fc, b_fc, w_proj, b_proj):
        return F.gelu(torch.addmm(b_fc, x, w_fc), approximate="tanh") @ w_proj + b_proj

    inputs = (x, w_fc, b_fc, w_proj, b_proj)
    versus(both_ways(ops.gelu_mlp, *inputs), both_ways(peer, *inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy_against_linear_and_cross_entropy(versus, dtype):
    hidden = torch.randn(1024, 768, dtype=dtype)
    weight = torch.randn(50257, 768, dtype=dtype) * 0.02
    targets = torch.randint(50257, (1024,))

    def peer(hidden, weight):
        return F.cross_entropy((hidden @ weight.t()).float(), targets)

    ours = both_ways(lambda h, w: ops.linear_cross_entropy(h, w, targets), hidden, weight)
    versus(ours, both_ways(peer, hidden, weight), rounds=5)


def test_fused_adamw_against_torch_optim(versus):
    params = [torch.randn(768, 3072, requires_grad=True) for _ in range(8)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    ours = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    moments = [[torch.zeros_like(p) for p in ours] for _ in range(2)]
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    versus(lambda: ops.fused_adamw(ours, grads, *moments, step=1, **settings), optimizer.step)


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
