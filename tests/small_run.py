"""Every op once with its CUDA kernels, at small odd shapes, for compute-sanitizer to watch:

compute-sanitizer --tool racecheck python tests/small_run.py
python tests/small_run.py --simulator          # the same on a CPU, in the simulator
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from comparison import backend
from gpt2fast import GPT2, GPT2Config, ops
from gpt2fast.ops.backend import record_calls

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gradients(function: Callable[..., Any], *leaves: Tensor) -> None:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    out = function(*leaves)
    torch.autograd.grad(out, leaves, torch.randn_like(out))


def attention(dtype: torch.dtype) -> None:
    for time, size in [(1, 64), (65, 64), (100, 40), (33, 128)]:
        qkv = torch.randn(2, time, 3, 2, size).to(dtype)
        mask = torch.rand(2, time) > 0.2
        options: dict[str, Any] = {"mask": mask, "dropout_p": 0.1, "seed": torch.tensor([7])}
        gradients(lambda qkv: ops.causal_attention(*qkv.unbind(2)), qkv)
        gradients(
            lambda qkv, options=options: ops.causal_attention(*qkv.unbind(2), **options),
            qkv,
        )


def layer_norm(dtype: torch.dtype) -> None:
    for rows, columns in [(1, 768), (33, 1600), (17, 35)]:
        x, residual = torch.randn(2, rows, columns).to(dtype)
        weight, bias = torch.randn(2, columns).to(dtype)
        gradients(lambda *inputs: sum(ops.residual_layer_norm(*inputs)), x, residual, weight, bias)


def mlp(dtype: torch.dtype) -> None:
    gradients(ops.bias_gelu, torch.randn(65, 35).to(dtype), torch.randn(35).to(dtype))
    shapes = [(17, 64), (64, 256), (256,), (256, 64), (64,)]
    gradients(ops.gelu_mlp, *(torch.randn(shape).to(dtype) for shape in shapes))


def cross_entropy(dtype: torch.dtype) -> None:
    targets = torch.randint(131, (17,))
    targets[3] = -100
    gradients(
        lambda hidden, weight: ops.linear_cross_entropy(hidden, weight, targets),
        torch.randn(17, 64).to(dtype),
        torch.randn(131, 64).to(dtype),
    )


def embedding(dtype: torch.dtype) -> None:
    tokens, positions = torch.randint(5, (3, 70)), torch.arange(70)
    tables = torch.randn(131, 40).to(dtype), torch.randn(70, 40).to(dtype)
    gradients(lambda wte, wpe: ops.embedding(tokens, positions, wte, wpe), *tables)


def adamw(dtype: torch.dtype) -> None:
    lists = [[torch.rand(n).to(dtype) for n in (1, 1023, 16384)] for _ in range(4)]
    ops.fused_adamw(
        *lists, step=2, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1
    )  # fmt: skip


def cache(dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.zeros(2, 3, 33, 2, 64).to(dtype)
    lengths = torch.tensor([0, 17, 30])
    q, k, v = torch.randn(3, 3, 2, 2, 64).to(dtype)
    ops.append_to_cache(k, v, k_cache, v_cache, lengths)
    ops.attention_with_cache(q, k_cache, v_cache, lengths)
    ops.reorder_cache(k_cache, v_cache, torch.tensor([2, 0, 2]))
    ops.release_rows(lengths, torch.tensor([1]))


def generation(dtype: torch.dtype) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=128, vocab_size=211, n_positions=64)
    model = GPT2(config).to(dtype).eval()
    drawn: dict[str, Any] = {"do_sample": True, "seed": 1, "top_k": 9, "top_p": 0.9}
    for chosen in ({}, drawn):
        model.generate(torch.randint(211, (3, 5)), max_new_tokens=24, **chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulator", action="store_true")
    name = "simulator" if parser.parse_args().simulator else "cuda"
    torch.manual_seed(0)
    # Elsewhere, inputs would be created on the CPU.
    torch.set_default_device("cpu" if name == "simulator" else "cuda")
    parts = (attention, layer_norm, mlp, cross_entropy, embedding, adamw, cache, generation)
    with backend(name), record_calls() as calls:
        for part in parts:
            for dtype in DTYPES:
                part(dtype)
    if name != "simulator":
        torch.cuda.synchronize()
    print(f"{len(calls)} calls of {len({call.op for call in calls})} ops")


if __name__ == "__main__":
    main()
