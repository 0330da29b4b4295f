"""Ends of runs, errors for numbers that are not finite, and memory."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.training import TrainConfig, TrainingError, stopping, train
from gpt2fast.training.checkpoints.folder import find_checkpoint
from gpt2fast.training.checkpoints.state import load_state
from gpt2fast.training.failures import ALL_FINITE, broken_weights, first_not_finite
from gpt2fast.training.logs import summary
from gpt2fast.training.logs.log import read_rows
from gpt2fast.training.machine import memory
from gpt2fast.training.machine.precision import LossScale
from run_hooks import after_updates, changed_losses
from small_runs import TINY, write_text

changed = dataclasses.replace


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    text = write_text(tmp_path / "story.txt")
    return TrainConfig(data=str(text), out=str(tmp_path / "run"), **{**TINY, "max_steps": 12})


@pytest.fixture
def told(caplog):
    """Messages that the library logs."""
    with caplog.at_level(logging.INFO, "gpt2fast"):
        yield caplog


def assert_stopped(config: TrainConfig, result, told, flag: str) -> None:
    """Early, saying why, with a checkpoint of the last step and a model."""
    assert 0 < result.steps < 12
    assert flag in told.text
    newest = find_checkpoint(Path(config.out))
    assert newest.name == f"step-{result.steps:08d}"
    assert GPT2.from_pretrained(config.out).config.n_layer == 1


def test_the_clock_ends_a_run_that_can_go_on(config, told):
    config = changed(config, max_hours=1e-9)
    assert_stopped(config, train(config), told, "--max-hours")
    assert train(changed(config, max_hours=None), resume=config.out).steps == 12


def test_a_low_enough_loss_ends_a_run(config, told):
    config = changed(config, target_loss=100.0)
    assert_stopped(config, train(config), told, "--target-loss")


def test_losses_that_do_not_fall_end_a_run(config, told):
    config = changed(config, early_stopping=2, eval_interval=1, lr=1.0, min_lr=1.0)
    result = train(config)
    assert_stopped(config, result, told, "--early-stopping")
    losses = [row["val_loss"] for row in read_rows(Path(config.out) / "log.csv")][1:]
    assert losses.index(min(losses)) == len(losses) - 3


def test_tokens_end_a_run(config):
    result = train(changed(config, max_steps=None, max_tokens=70))
    assert result.steps == 3 and result.tokens == 96


def test_validations_are_reported_and_may_end_the_run(config):
    seen = []

    class Enough(Exception):
        pass

    def report(step: int, loss: float) -> None:
        seen.append((step, loss))
        if step == 4:
            raise Enough

    with pytest.raises(Enough):
        train(config, on_validation=report)
    assert [step for step, _ in seen] == [0, 2, 4]
    rows = {row["step"]: row["val_loss"] for row in read_rows(Path(config.out) / "log.csv")}
    assert seen[1][1] == pytest.approx(rows[2], rel=1e-5)


def test_checkpointed_activations_change_nothing_but_memory(config, tmp_path):
    train(config)
    train(changed(config, checkpoint_activations=True, out=str(tmp_path / "again")))
    weights = GPT2.from_pretrained(config.out).state_dict()
    for name, weight in GPT2.from_pretrained(tmp_path / "again").state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=1e-6, rtol=0)


# -- numbers that break ---------------------------------------------------------------------------


def small(seed: int = 0, **changes) -> GPT2:
    torch.manual_seed(seed)
    shape = {"vocab_size": 31, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2(
        GPT2Config(**{**shape, **changes}, dropout=0.0, bos_token_id=None, eos_token_id=None)
    )


def test_the_first_broken_weight_layer_or_gradient_is_named():
    model = small()
    ids = torch.arange(10)[None]
    run = lambda: model(ids, targets=ids)  # noqa: E731
    run().loss.backward()
    assert first_not_finite(model, run) == ALL_FINITE
    model.h[1].mlp.c_fc.weight.grad[3, 3] = math.inf
    assert first_not_finite(model, run) == "the gradient of h.1.mlp.c_fc.weight is not finite"
    with torch.no_grad():
        model.h[1].attn.c_attn.weight.fill_(1e38)
    assert first_not_finite(model, run) == (
        "the first values that are not finite come out of h.1.attn.c_attn"
    )
    with torch.no_grad():
        model.h[0].ln_2.bias[0] = math.nan
    assert first_not_finite(model, run) == "the weights h.0.ln_2.bias are not finite"
    assert broken_weights(model) == "h.0.ln_2.bias"


def test_weights_that_broke_are_not_saved(config):
    def break_weights(updates, optimizer):
        if updates == 3:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][-1][0, 0] = math.inf

    told = r"h\.0\.mlp\.c_proj\.weight are not finite.*00000003"
    with after_updates(break_weights), pytest.raises(TrainingError, match=told):
        train(changed(config, checkpoint_interval=1, eval_interval=100))
    for path in (Path(config.out) / "checkpoints").iterdir():
        assert broken_weights(GPT2.from_pretrained(path)) is None


def test_the_loss_scale_follows_overflows():
    scale = LossScale(enabled=True)
    loss = torch.tensor(2.0)
    assert scale.scaled(loss) == 2.0 * 2**16
    grads = [torch.tensor([2.0**16, 2.0**15])]
    scale.unscale(grads)
    assert grads[0].tolist() == [1.0, 0.5]
    assert scale.overflowed() and scale.value == 2**15 and scale.skipped == 1
    for _ in range(LossScale.growth_interval):
        scale.succeeded()
    assert scale.value == 2**16
    again = LossScale(enabled=True)
    again.load_state_dict(scale.state_dict())
    assert again.state_dict() == scale.state_dict()
    scale.value = LossScale.smallest
    assert not scale.overflowed()
    off = LossScale(enabled=False)
    assert off.scaled(loss) is loss and not off.overflowed()


def test_a_float16_run_leaves_out_steps_that_overflow(config):
    def overflow(number, loss):
        if number in (1, 2):
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    with changed_losses(overflow):
        train(changed(config, dtype="float16", max_steps=4))
    rows = {row["step"]: row for row in read_rows(Path(config.out) / "log.csv")}
    assert rows[1]["loss_scale"] == 2**16 and rows[4]["loss_scale"] == 2**14
    state = load_state(Path(config.out) / "checkpoints" / "step-00000004")
    assert state["updates"] == 2 and state["scale"]["skipped"] == 2


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_predicted_activations_are_what_the_forward_pass_keeps(dtype, checkpointed):
    model = small(n_embd=64, n_layer=4, n_positions=128, vocab_size=101)
    model.train()
    model.gradient_checkpointing = checkpointed
    owned = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(101, (8, 128))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(ids, targets=ids).loss
    predicted = memory.predict(
        model.config, ids.numel(), dtype=dtype, checkpoint_activations=checkpointed
    )
    block = 48 if checkpointed else 0  # of the one that is computed again, later
    expected = sum(kept.values()) + block * ids.numel() * 64
    assert predicted.activations == pytest.approx(expected, rel=0.25)
    assert loss.isfinite()


def test_state_is_weights_gradients_and_averages():
    shape = GPT2Config()
    count = shape.parameter_count
    assert memory.predict(shape, 1024).state == 16 * count
    sharded = memory.predict(shape, 1024, parallel="zero", processes=4)
    assert sharded.state == 8 * count + 2 * count
    assert memory.predict(shape, 1024, parallel="fsdp", processes=4).state == 4 * count
    assert memory.predict(shape, 1024, optimizer_state=4 * count).state == 12 * count


def test_a_run_that_will_not_fit_is_warned_of(config, monkeypatch, told):
    # Stands for a machine with less memory than the smallest run takes.
    monkeypatch.setattr(summary, "available", lambda device: 1000)
    train(changed(config, max_steps=1))
    assert "warning: that may not fit. Lower --batch-size (now 4" in told.text


def test_a_second_signal_is_the_same_wish_for_a_second(monkeypatch):
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with stopping.SignalWatch() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        now += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
