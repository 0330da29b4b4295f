"""Overhead of a call of an op, measured where its kernel has next to nothing to compute.

    python benchmarks/dispatch.py                      microseconds, of this checkout
    python benchmarks/dispatch.py --against CHECKOUT   and of another one, processes in turns

Figures are CPU time of the calling thread, the least of many rounds, since other programs slow a
round and never quicken it; the ratio is the median of those of neighboring processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent


def least(function: Callable[[], object], calls: int, rounds: int) -> float:
    """Microseconds of one call."""
    function()
    found = []
    for _ in range(rounds):
        start = time.thread_time_ns()
        for _ in range(calls):
            function()
        found.append(time.thread_time_ns() - start)
    return min(found) / calls / 1000


def measure() -> dict[str, float]:
    """Microseconds by name."""
    import torch

    from gpt2fast import GPT2, GPT2Config, ops

    torch.set_num_threads(1)
    torch.manual_seed(0)
    norm: list[Any] = [torch.randn(1, 64), torch.randn(1, 64), torch.randn(64), torch.randn(64)]
    heads: list[Any] = [torch.randn(1, 8, 2, 32) for _ in "qkv"]
    model = GPT2(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    params = list(model.parameters())
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    tokens = torch.randint(256, (1, 16))

    def differentiate(op: Callable, inputs: list[torch.Tensor]) -> Callable[[], object]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        grad = torch.ones_like(inputs[0])

        def run() -> None:
            out = op(*leaves)
            torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, grad)

        return run

    def step() -> None:
        loss = model(tokens, targets=tokens).loss
        assert loss is not None
        loss.backward()
        with torch.no_grad():
            ops.fused_adamw(
                params, [p.grad for p in params if p.grad is not None], *moments,
                step=1, lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            )  # fmt: skip
        model.zero_grad(set_to_none=True)

    return {
        "residual_layer_norm (1, 64)": least(partial(ops.residual_layer_norm, *norm), 100, 100),
        "with backward": least(differentiate(ops.residual_layer_norm, norm), 50, 60),
        "causal_attention (1, 8, 2, 32)": least(partial(ops.causal_attention, *heads), 100, 100),
        "with backward ": least(differentiate(ops.causal_attention, heads), 50, 60),
        "training step, 2 layers of 64": least(step, 1, 100),
    }


def measured(checkout: Path) -> dict[str, float]:
    """`measure` in a process of its own, with the package of `checkout`."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, "--json"]
    return json.loads(subprocess.check_output(command, env=environment, text=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--pairs", type=int, default=5, help="processes of each")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json:
        print(json.dumps(measure()))
        return
    pairs = []
    for _ in range(options.pairs):
        other = measured(options.against.resolve()) if options.against else None
        pairs.append((measured(HERE), other))
    for name in pairs[0][0]:
        row = f"{name:32} {min(ours[name] for ours, _ in pairs):8.1f}"
        if options.against:
            ratio = statistics.median(ours[name] / other[name] for ours, other in pairs if other)
            row += f" {min(other[name] for _, other in pairs if other):8.1f} {ratio:6.2f}"
        print(row)


if __name__ == "__main__":
    main()
