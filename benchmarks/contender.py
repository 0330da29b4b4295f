"""One way to train GPT-2, in a process of its own, so that its memory can be told from others'.

    python benchmarks/contender.py nanogpt 124M-4x256 bfloat16

makes the model and an optimizer, takes a step, and says "ready". Then, for each line read, it takes
a step and answers with JSON: seconds, loss, and the most memory that the process has held so far.
nanoGPT is what GPT2FAST_NANOGPT names: a checkout's folder.

All start from the same weights, take the same batch and update by the same rule, so that equal
losses show equal work. Two choices of nanoGPT and transformers give way to that: the GELU is the
tanh of GPT-2's checkpoints, and AdamW is torch's fused one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
_FUSED_ADAMW = partial(torch.optim.AdamW, fused=True)


class Way(NamedTuple):
    """A way to train: its model and optimizer, and the loss of (inputs, targets)."""

    model: nn.Module
    optimizer: Callable[..., torch.optim.Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]


def _ours(shape: Shape) -> Way:
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
    return Way(model, AdamW, lambda inputs, targets: model(inputs, targets=targets).loss)


def _transformers(shape: Shape) -> Way:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.positions, n_embd=shape.width,
        n_layer=shape.layers, n_head=shape.heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return model(inputs, labels=targets, shift_labels=targets).loss

    return Way(model, _FUSED_ADAMW, loss)


def _nanogpt(shape: Shape, compiled: bool = False) -> Way:
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
    for block in model.transformer.h:
        block.mlp.gelu = nn.GELU(approximate="tanh")
    forward: Any = torch.compile(model) if compiled else model
    return Way(model, _FUSED_ADAMW, lambda inputs, targets: forward(inputs, targets)[1])


CONTENDERS: dict[str, Callable[[Shape], Way]] = {
    "ours": _ours,
    "nanogpt": _nanogpt,
    "nanogpt-compiled": lambda shape: _nanogpt(shape, compiled=True),
    "transformers": _transformers,
}


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Draw GPT-2's weights, the same for every contender: in the order of the parameters' names in
    its checkpoints, matrices as (in, out).

    Every parameter is drawn, biases and layer norms too, so that a gradient that goes astray is
    seen in the loss.
    """
    named = {name.removeprefix("transformer."): p for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for name, param in sorted(named.items()):
        linear = isinstance(model.get_submodule(_owner(model, name)), nn.Linear)
        turned = param.t() if linear and param.dim() == 2 else param
        center = 1.0 if re.search(r"ln_\w\.weight$", name) else 0.0
        turned.copy_(torch.empty(turned.shape).normal_(center, 0.02, generator=generator))


def _owner(model: nn.Module, name: str) -> str:
    """The module that holds the parameter of GPT-2's name."""
    prefix = "transformer." if hasattr(model, "transformer") else ""
    return (prefix + name).rpartition(".")[0]


def stepper(name: str, shape: Shape, dtype: str) -> Callable[[], float]:
    """A function that takes a step of a contender and returns its loss."""
    torch.manual_seed(0)
    tokens = torch.randint(shape.vocab, (shape.batch, shape.time + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model, make_optimizer, loss_of = CONTENDERS[name](shape)
    initialize(model)
    params = list(model.parameters())
    optimizer = make_optimizer(
        [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": _DECAY},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=_RATE,
        betas=_BETAS,
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss: Tensor = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, _CLIP)
        optimizer.step()
        return loss.item()

    return step


# Of a loss, between contenders: in bfloat16 they round at different places.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}


def check_equal_work(losses: dict[str, list[float]], dtype: str) -> None:
    """Fail where losses, one a step, are not those of the first contender, or none was learned."""
    (first, wanted), *others = losses.items()
    tolerance = _TOLERANCE[dtype]
    if not wanted[-1] < wanted[0] - 10 * tolerance:
        raise AssertionError(f"{first} learns nothing: {wanted}")
    for name, found in others:
        pairs = zip(found, wanted, strict=True)
        if not all(abs(theirs - ours) <= tolerance for theirs, ours in pairs):
            raise AssertionError(f"{name} does other work than {first}: {found} and {wanted}")


def main() -> None:
    name, shape, dtype = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    step = stepper(name, SHAPES[shape], dtype)
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
