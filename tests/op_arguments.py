"""Arguments that every public op takes, and the backends that run them on a CPU."""

from __future__ import annotations

import torch

from comparison import BACKENDS
from gpt2fast.ops.packed import MatrixFormat, ModelShape, PackedWeights

CPU_BACKENDS = [
    each
    for each in BACKENDS
    if not str(each if isinstance(each, str) else each.values[0]).startswith("cuda")
]
SHAPE = ModelShape(2, 32, 64, 40, 16, "gelu_new", 1e-5, (0.25, 0.25), True)


def arguments() -> dict[str, dict[str, object]]:
    """Valid arguments for every public op, made anew in each call."""
    x, w, b = torch.randn(3, 8), torch.randn(8, 8), torch.randn(8)
    heads = torch.randn(2, 3, 2, 8)
    cache = torch.zeros(2, 6, 2, 8)
    rows = torch.tensor([0, 1])
    weights = PackedWeights(SHAPE, dict.fromkeys(SHAPE.matrices(), MatrixFormat("float32")))
    caches = {"k_cache": torch.zeros(2, 2, 6, 2, 16), "v_cache": torch.zeros(2, 2, 6, 2, 16)}
    layer = [
        b, b, torch.randn(8, 24), torch.randn(24), w, b, b, b,
        torch.randn(8, 32), torch.randn(32), torch.randn(32, 8), b,
    ]  # fmt: skip
    choice = {
        "history": torch.tensor([[1, 2], [3, 4]]),
        "uniform": torch.tensor([0.25, 0.5]),
        "token_mask": torch.tensor([[0b101111011], [-2]], dtype=torch.int32),
        "temperature": 1.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 2,
    }
    return {
        "residual_layer_norm": {"x": x, "residual": x.clone(), "weight": b, "bias": b, "eps": 1e-5},
        "bias_gelu": {"x": x, "bias": b},
        "gelu_mlp": {"x": x, "w_fc": w, "b_fc": b, "w_proj": w, "b_proj": b},
        "projection": {"x": x, "weight": w, "bias": b},
        "embedding": {
            "tokens": torch.tensor([[1, 2], [3, 7]]),
            "positions": torch.tensor([0, 1]),
            "wte": w,
            "wpe": torch.randn(5, 8),
        },
        "causal_attention": {
            "q": heads,
            "k": heads.clone(),
            "v": heads.clone(),
            "scale": 0.5,
        },
        "attention": {
            "q": heads,
            "k": torch.randn(2, 3, 1, 8),
            "v": torch.randn(2, 3, 1, 8),
            "scale": 0.5,
        },
        "attention_with_cache": {
            "q": heads,
            "k_cache": cache,
            "v_cache": cache.clone(),
            "lengths": torch.tensor([0, 3]),
            "scale": 0.5,
        },
        "append_to_cache": {
            "k": heads,
            "v": heads.clone(),
            "k_cache": cache,
            "v_cache": cache.clone(),
            "lengths": torch.tensor([0, 3]),
            "counts": torch.tensor([2, 3]),
        },
        "reorder_cache": {"k_cache": cache, "v_cache": cache.clone(), "rows": rows},
        "release_rows": {"lengths": torch.tensor([4, 5]), "rows": rows},
        "sample": {"logits": torch.randn(2, 9), **choice},
        "linear_cross_entropy": {
            "hidden": x,
            "weight": w,
            "targets": torch.tensor([0, 7, -100]),
            "ignore_index": -100,
        },
        "fused_adamw": {
            "params": [x],
            "grads": [x.clone()],
            "exp_avgs": [torch.zeros(3, 8)],
            "exp_avg_sqs": [torch.zeros(3, 8)],
            "step": 1,
            "lr": 0.1,
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.1,
        },
        "decode_step": {
            "weights": [w, torch.randn(5, 8), *layer, b, b, w.clone()],
            "k_cache": cache[None],
            "v_cache": cache.clone()[None],
            "tokens": torch.tensor([1, 2]),
            "positions": torch.tensor([0, 1]),
            "lengths": torch.tensor([0, 1]),
            "n_head": 2,
            "attention_scales": [0.5],
            "activation": "gelu_new",
            "eps": 1e-5,
        }
        | {"k_cache": torch.zeros(1, 2, 6, 2, 4), "v_cache": torch.zeros(1, 2, 6, 2, 4)},
        "packed_step": {
            "weights": weights,
            **caches,
            "tokens": torch.tensor([1, 2, 3]),
            "positions": torch.tensor([0, 1, 0]),
            "starts": torch.tensor([0, 2, 3]),
            "rows": torch.tensor([1, 0]),
            "lengths": torch.tensor([0, 0]),
            "outputs": torch.tensor([1, 2]),
        },
        "packed_next": {
            "weights": weights,
            **{name: each.clone() for name, each in caches.items()},
            "tokens": torch.tensor([1, 2]),
            "positions": torch.tensor([0, 1]),
            "lengths": torch.tensor([0, 1]),
            **choice,
            "token_mask": torch.tensor([[-3, 255], [0, 254]], dtype=torch.int32),
        },
    }


# Single ops on the CPU that have no compiled kernel there, or no Triton one.
LACKS = {
    "native": {"decode_step"},
    "triton": {"projection", "packed_step", "packed_next"},
    "simulator": {"projection", "packed_step", "packed_next"},
}
