"""Several processes train the models of docs/modules.md: torchrun module_processes.py FILE.

FILE gets the weights of each after three steps, by the model's name and the engine's.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from module_examples import EXAMPLES, Example, loss_of, reset

ENGINES = ("ddp", "fsdp")
ROWS, LENGTH, STEPS, RATE = 4, 17, 3, 0.1
_WHOLE = StateDictOptions(full_state_dict=True)


def prepared(example: Example, engine: str) -> nn.Module:
    """A model whose weights the processes share, with dropout off."""
    torch.manual_seed(1)
    plain = example.build().eval()
    if engine == "ddp":
        return DistributedDataParallel(plain)
    with torch.device("meta"):
        model = example.build().eval()
    for part in model.modules():
        if isinstance(part, example.block):
            fully_shard(part)
    fully_shard(model)
    model.to_empty(device="cpu")
    reset(model)
    drawn: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    assert all(weight.isfinite().all() for weight in drawn.values())
    set_model_state_dict(model, plain.state_dict(), options=_WHOLE)
    return model


def train(model: nn.Module, example: Example, rank: int, processes: int) -> None:
    """Some steps of SGD on this process's rows of each batch."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        batch = example.batch(ROWS, LENGTH)
        loss_of(model, tuple(x[rank::processes] for x in batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(file: str) -> None:
    """Run as one of the processes."""
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name, example in EXAMPLES.items():
        for engine in ENGINES:
            model = prepared(example, engine)
            train(model, example, dist.get_rank(), dist.get_world_size())
            results[f"{name} {engine}"] = get_model_state_dict(model, options=_WHOLE)
    if dist.get_rank() == 0:
        torch.save(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
