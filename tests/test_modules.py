"""docs/modules.md: other people's models on our modules, and what they run under."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import gpt2fast
import plain_gpt
from module_examples import EXAMPLES, PAGE, loss_of, next_tokens, reset
from module_processes import ENGINES, train
from time_limits import patience
from tolerance import assert_close, assert_equal, step_of

PARTS: dict[str, Any] = PAGE["nanogpt_parts"]
CHOICES = {name: (name,) for name in PARTS} | {"all four": tuple(PARTS)}
SHAPE: dict[str, Any] = {
    "block_size": 32, "vocab_size": 65, "n_layer": 2, "n_head": 3, "n_embd": 48, "dropout": 0.0,
}  # fmt: skip


@pytest.fixture(params=["torch", "nanoGPT"])
def original(request: pytest.FixtureRequest) -> ModuleType:
    """model.py of nanoGPT, or the same of torch's modules."""
    return plain_gpt if request.param == "torch" else request.getfixturevalue("nanogpt")


def losses_of_training(model: nn.Module, steps: int = 30) -> Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    torch.manual_seed(1)
    text, losses = torch.arange(500) ** 2 % 7, []
    for _ in range(steps):
        begins = torch.randint(500 - 33, (4, 1))
        loss = loss_of(model, next_tokens(text[begins + torch.arange(33)]))
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("replaced", [*CHOICES, "GPT"])
def test_nanogpts_losses_stay(replaced, bias, original, monkeypatch):
    config = original.GPTConfig(**SHAPE, bias=bias)
    theirs = original.GPT(config)
    if replaced == "GPT":
        ours = PAGE["GPT"](vocabulary=65, length=32, width=48, layers=2, heads=3)
    else:
        for name in CHOICES[replaced]:
            monkeypatch.setattr(original, name, PARTS[name])
        ours = original.GPT(config)
        kinds = {type(module).__module__.partition(".")[0] for module in ours.modules()}
        assert "gpt2fast" in kinds
    PAGE["load_nanogpt"](ours, theirs.state_dict())
    mine, others = losses_of_training(ours), losses_of_training(theirs)
    assert others[-1] < others[0] - 0.5
    assert (mine - others).abs().max() < 1e-5


def test_another_models_weights_are_refused():
    ours = PAGE["GPT"](vocabulary=65, length=32, width=48, layers=3, heads=3)
    state = plain_gpt.GPT(plain_gpt.GPTConfig(**{**SHAPE, "n_layer": 4})).state_dict()
    with pytest.raises(ValueError, match=r"not a checkpoint of this model.*h\.3"):
        PAGE["load_nanogpt"](ours, state)


def gradients(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """The loss and the gradients of all weights; dropout draws the same each time."""
    torch.manual_seed(3)
    loss = loss_of(model, batch)
    loss.backward()
    found = [weight.grad for weight in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [loss.detach(), *(x for x in found if x is not None)]


def _autocast(model: nn.Module, batch: tuple[Tensor, ...], name: str) -> None:
    model.eval()  # the draws of dropout depend on the backend
    exact = copy.deepcopy(model).double()
    other = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(model, batch)
        with gpt2fast.backend("reference"):
            theirs = gradients(other, batch)
    doubled = tuple(x.double() if x.is_floating_point() else x for x in batch)
    right = gradients(exact, doubled)
    assert_close(mine, theirs, right, times=3.0, least=step_of(torch.bfloat16))


def _functional_call(model: nn.Module, batch: tuple[Tensor, ...], name: str) -> None:
    right = gradients(copy.deepcopy(model), batch)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.data.zero_()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        output = torch.func.functional_call(model, weights, batch)
        return output[1] if isinstance(output, tuple) else output

    torch.manual_seed(3)
    found, value = torch.func.grad_and_value(loss)(weights)
    for mine, other in zip([value, *found.values()], right, strict=True):
        torch.testing.assert_close(mine, other)


def _export(model: nn.Module, batch: tuple[Tensor, ...], name: str) -> None:
    model.eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    sizes: list[dict[int, Any]] = [{0: rows} for _ in batch[:-1]]
    if not batch[0].is_floating_point():
        sizes[0][1] = torch.export.Dim("length", min=2, max=60)
    with torch.no_grad():
        program = torch.export.export(model, batch[:-1], dynamic_shapes=tuple(sizes)).module()
        for count, length in ((2, 17), (5, 33)):
            inputs = EXAMPLES[name].batch(count, length)[:-1]
            mine, right = program(*inputs), model(*inputs)
            if isinstance(right, tuple):
                (mine, none), (right, _) = mine, right
                assert none is None
            torch.testing.assert_close(mine, right)


def _checkpointing(model: nn.Module, batch: tuple[Tensor, ...], name: str) -> None:
    right = gradients(copy.deepcopy(model), batch)
    block, calls = EXAMPLES[name].block, []
    for part in model.modules():
        if isinstance(part, block):
            part.register_forward_pre_hook(lambda *_: calls.append(1))
    apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, block))
    for mine, other in zip(gradients(model, batch), right, strict=True):
        torch.testing.assert_close(mine, other)
    assert len(calls) == 4  # two blocks, forward and again for the backward pass


def _meta(model: nn.Module, batch: tuple[Tensor, ...], name: str) -> None:
    with torch.device("meta"):
        other = EXAMPLES[name].build()
    assert all(weight.is_meta for weight in other.parameters())
    other.to_empty(device="cpu")
    for weight in other.parameters():
        weight.data.fill_(torch.nan)
    reset(other)
    drawn = dict(other.named_parameters())
    for key, weight in model.named_parameters():
        assert drawn[key].isfinite().all(), key
        if weight.unique().numel() == 1:
            assert_equal(drawn[key].detach(), weight.detach())
        elif weight.numel() > 1000:
            spread = float(drawn[key].detach().std() / weight.detach().std())
            assert spread == pytest.approx(1, abs=0.1), key
    other.load_state_dict(model.state_dict())
    for mine, right in zip(gradients(other, batch), gradients(model, batch), strict=True):
        assert_equal(mine, right)


def _deepcopy(model: nn.Module, batch: tuple[Tensor, ...], name: str) -> None:
    _is_a_copy(copy.deepcopy(model), model, batch)


def _pickle(model: nn.Module, batch: tuple[Tensor, ...], name: str) -> None:
    _is_a_copy(pickle.loads(pickle.dumps(model)), model, batch)


def _is_a_copy(other: nn.Module, model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    right = gradients(model, batch)
    for mine, theirs in zip(gradients(other, batch), right, strict=True):
        assert_equal(mine, theirs)
    for weight in other.parameters():
        weight.data.zero_()
    model.zero_grad()
    assert_equal(gradients(model, batch)[0], right[0])


WAYS = {
    "autocast": _autocast,
    "functional_call": _functional_call,
    "export": _export,
    "checkpointing": _checkpointing,
    "meta": _meta,
    "deepcopy": _deepcopy,
    "pickle": _pickle,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_under(way, name):
    example = EXAMPLES[name]
    WAYS[way](example.build(), example.batch(4, 17), name)


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> dict[str, Any]:
    """Weights of all examples, trained in two processes."""
    file = tmp_path_factory.mktemp("processes") / "weights.pt"
    script = Path(__file__).with_name("module_processes.py")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(script), str(file),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_two_processes_train_examples_as_one(name, engine, trained_by_two):
    torch.manual_seed(1)
    model = EXAMPLES[name].build().eval()
    begin = {key: weight.clone() for key, weight in model.state_dict().items()}
    train(model, EXAMPLES[name], 0, 1)
    for key, weight in model.state_dict().items():
        assert not torch.equal(weight, begin[key]), key
        torch.testing.assert_close(trained_by_two[f"{name} {engine}"][key], weight)
