"""One way to train GPT-2, in a process of its own, so that its memory can be told from others'.

    python benchmarks/contender.py nanogpt 124M-4x256 bfloat16

makes the model and an optimizer, takes a step, and says "ready". Then, for each line read, it takes
a step and answers with JSON: seconds, loss, and the most memory that the process has held so far.
The batch is always the same. nanoGPT is what GPT2FAST_NANOGPT names: a checkout's folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    layers: int
    heads: int
    width: int
    vocab: int
    positions: int
    batch: int
    time: int


SHAPES = {
    "124M-4x256": Shape(12, 12, 768, 50257, 1024, 4, 256),
    "124M-1x1024": Shape(12, 12, 768, 50257, 1024, 1, 1024),
    "shakespeare_char": Shape(6, 8, 256, 65, 128, 64, 128),
}
_RATE, _BETAS, _DECAY, _CLIP = 3e-4, (0.9, 0.99), 0.1, 1.0


def _ours(shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer, Callable]:
    from gpt2fast import GPT2, GPT2Config
    from gpt2fast.training.machine.allocator import keep_freed_memory
    from gpt2fast.training.optimizers import AdamW

    keep_freed_memory()
    model = GPT2(
        GPT2Config(
            vocab_size=shape.vocab, n_positions=shape.positions, n_embd=shape.width,
            n_layer=shape.layers, n_head=shape.heads, dropout=0.0,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    optimizer = AdamW(model.parameters(), lr=_RATE, betas=_BETAS, weight_decay=_DECAY)
    return model, optimizer, lambda inputs, targets: model(inputs, targets=targets).loss


def _transformers(shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer, Callable]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.positions, n_embd=shape.width,
        n_layer=shape.layers, n_head=shape.heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, _BETAS, weight_decay=_DECAY)
    # Its labels are shifted inside: as many tokens, one target fewer a row.
    return model, optimizer, lambda inputs, targets: model(inputs, labels=inputs).loss


def _nanogpt(
    shape: Shape, compiled: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer, Callable]:
    file = Path(os.environ["GPT2FAST_NANOGPT"]) / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    model = module.GPT(
        module.GPTConfig(
            block_size=shape.positions, vocab_size=shape.vocab, n_layer=shape.layers,
            n_head=shape.heads, n_embd=shape.width, dropout=0.0, bias=True,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), _RATE, _BETAS, weight_decay=_DECAY, fused=True
    )
    forward: Any = torch.compile(model) if compiled else model
    return model, optimizer, lambda inputs, targets: forward(inputs, targets)[1]


CONTENDERS: dict[str, Callable] = {
    "ours": _ours,
    "nanogpt": _nanogpt,
    "nanogpt-compiled": lambda shape: _nanogpt(shape, compiled=True),
    "transformers": _transformers,
}


def _stepper(name: str, shape: Shape, dtype: str) -> Callable[[], float]:
    torch.manual_seed(0)
    tokens = torch.randint(shape.vocab, (shape.batch, shape.time + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model, optimizer, loss_of = CONTENDERS[name](shape)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss: Tensor = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    name, shape, dtype = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    step = _stepper(name, SHAPES[shape], dtype)
    step()
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": seconds, "loss": loss, "memory": memory}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
