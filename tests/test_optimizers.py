"""Optimizers, learning rates and batch sizes over a run, against torch's own and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import ArgumentError, ConfigError
from gpt2fast.training import TrainConfig
from gpt2fast.training.config import field_help
from gpt2fast.training.optimizers import OPTIMIZERS, AdamW, ModelOptimizer
from gpt2fast.training.schedule import learning_rate

SHAPE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "vocab_size": 31,
    "n_positions": 12,
}


def model(seed: int = 0) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(GPT2Config(**SHAPE, dropout=0.0, bos_token_id=None, eos_token_id=None))


def give_gradients(*models: GPT2, seed: int) -> None:
    """The same made-up gradients to every model."""
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*(m.parameters() for m in models), strict=True):
        grad = torch.randn(params[0].shape, generator=generator)
        for param in params:
            param.grad = grad.to(param.dtype, copy=True)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    ours, theirs = model(), model()
    settings = TrainConfig(optimizer="muon", weight_decay=0.1, momentum=0.9)
    optimizers = ModelOptimizer(ours.named_parameters(), settings)
    named = dict(theirs.named_parameters())
    hidden = [n for n, p in named.items() if n.startswith("h.") and p.dim() == 2]
    assert len(hidden) == 4 * SHAPE["n_layer"]
    rest = [n for n in named if n not in hidden]
    reference = [
        torch.optim.Muon(
            [named[n] for n in hidden], lr=1e-2, momentum=0.9, weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": [named[n] for n in rest if named[n].dim() == 2], "weight_decay": 0.1},
                {"params": [named[n] for n in rest if named[n].dim() < 2], "weight_decay": 0.0},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]  # fmt: skip
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        optimizers.step(1e-2)
        for optimizer in reference:
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_goes_on_where_it_was(optimizer):
    settings = TrainConfig(optimizer=optimizer, weight_decay=0.1)
    straight, resumed = model(), model()
    first = ModelOptimizer(straight.named_parameters(), settings)
    for step in range(2):
        give_gradients(straight, seed=step)
        first.step(1e-2)
    resumed.load_state_dict(straight.state_dict())
    second = ModelOptimizer(resumed.named_parameters(), settings)
    saved = first.tensors()
    assert len(saved) == {"adamw": 2 * 28, "muon": 2 * 28 - 8}[optimizer]
    assert first.state_bytes() == sum(tensor.nbytes for tensor in saved.values())
    for name, tensor in second.tensors().items():
        assert not tensor.any()
        tensor.copy_(saved[name])
    second.resume_after(first.updates)
    give_gradients(straight, resumed, seed=9)
    first.step(1e-3)
    second.step(1e-3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_without_gradients_are_left_alone():
    frozen = model()
    frozen.wte.weight.requires_grad_(False)
    before = frozen.wte.weight.clone()
    optimizers = ModelOptimizer(frozen.named_parameters(), TrainConfig(weight_decay=0.5))
    give_gradients(frozen, seed=0)
    optimizers.step(0.1)
    assert torch.equal(frozen.wte.weight, before)
    assert not any("wte" in name for name in optimizers.tensors())


def test_adamw_is_an_optimizer_of_torch():
    ours = model()
    optimizer = AdamW(ours.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    give_gradients(ours, seed=0)
    optimizer.step()
    schedule.step()
    other = model()
    again = AdamW(other.parameters(), lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 5e-3 and again.param_groups[0]["step"] == 1


def rate(step: int, schedule: str, **changes: float) -> float:
    values: dict[str, Any] = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, "steps": 110, **changes}
    return learning_rate(step, schedule=schedule, **values)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_warm_up_alike(schedule):
    assert [rate(s, schedule) for s in (0, 9)] == [pytest.approx(1 / 11), pytest.approx(10 / 11)]


def test_schedules_have_their_shapes():
    assert rate(60, "linear") == pytest.approx(0.55)
    assert rate(60, "cosine") == pytest.approx(0.55)
    assert rate(35, "cosine") > rate(35, "linear") == pytest.approx(0.775)
    assert rate(109, "constant") == rate(10, "constant") == 1.0
    assert rate(87, "wsd") == 1.0 and rate(88, "wsd") == 1.0
    assert rate(99, "wsd") == pytest.approx(0.55) and rate(110, "wsd") == pytest.approx(0.1)
    assert rate(60, "wsd", decay_share=1.0) == pytest.approx(rate(60, "linear"))


def test_the_batch_grows_to_its_size():
    config = TrainConfig(grad_accumulation=8, batch_warmup_steps=4)
    assert [config.micro_batches(step) for step in range(6)] == [1, 2, 4, 6, 8, 8]


@pytest.mark.parametrize("warmup", [0, 4, 7])
def test_a_length_in_tokens_is_reached_and_not_by_a_step_too_many(warmup):
    config = TrainConfig(
        grad_accumulation=8, batch_warmup_steps=warmup, batch_size=2, block_size=16,
        max_tokens=5_000,
    )  # fmt: skip
    steps = config.steps(train_tokens=10**9)
    tokens = [32 * config.micro_batches(step) for step in range(steps)]
    assert sum(tokens) >= 5_000 > sum(tokens[:-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_a_setting_with_help_and_a_page(name):
    assert TrainConfig(optimizer=name).optimizer == name
    assert f"{name}: {OPTIMIZERS[name].help}" in field_help()["optimizer"]
    page = Path(__file__).parent.parent / "docs" / "training.md"
    assert f"`--optimizer {name}`" in page.read_text()


def test_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match=f"'sgd', but must be one of {', '.join(OPTIMIZERS)}"):
        TrainConfig(optimizer="sgd")


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_model_learns_as_much_with_moments_in_bfloat16(autocast):
    ids = torch.randint(31, (8, 13), generator=torch.Generator().manual_seed(5))

    def losses(moments: str) -> list[float]:
        learner = model()
        settings = TrainConfig(moments=moments)  # type: ignore[arg-type]
        optimizers = ModelOptimizer(learner.named_parameters(), settings)
        found = []
        for _ in range(120):
            optimizers.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = learner(ids[:, :-1], targets=ids[:, 1:]).loss
            loss.backward()
            optimizers.step(3e-3)
            found.append(loss.item())
        dtypes = {tensor.dtype for tensor in optimizers.tensors().values()}
        assert dtypes == {getattr(torch, moments)}
        return found

    wide, narrow = losses("float32"), losses("bfloat16")
    assert wide[-1] < 0.5 * wide[0]
    assert narrow != wide
    # In nats, of a loss that falls from 3.4 to 0.35.
    for end in range(20, 121, 20):
        means = [sum(each[end - 20 : end]) / 20 for each in (wide, narrow)]
        assert means[1] == pytest.approx(means[0], abs=0.02)


def test_narrow_moments_take_half_the_memory_and_are_kept_by_a_state():
    ours = model()
    optimizer = AdamW(ours.parameters(), lr=1e-2, betas=(0.9, 0.95), moments=torch.bfloat16)
    give_gradients(ours, seed=0)
    optimizer.step()
    again = AdamW(model().parameters(), betas=(0.9, 0.95), moments=torch.bfloat16)
    again.load_state_dict(optimizer.state_dict())
    pairs = zip(optimizer.state.values(), again.state.values(), strict=True)
    for before, after in pairs:
        for name in ("exp_avg", "exp_avg_sq"):
            assert after[name].dtype == torch.bfloat16
            assert torch.equal(before[name], after[name])
    settings = TrainConfig(moments="bfloat16"), TrainConfig()
    narrow, wide = (ModelOptimizer(ours.named_parameters(), each) for each in settings)
    assert 2 * narrow.state_bytes() == wide.state_bytes()
    assert narrow.state_bytes() == sum(tensor.nbytes for tensor in narrow.tensors().values())


def test_a_model_may_change_its_dtype_between_optimizer_and_first_step():
    ours, theirs = model(), model().to(torch.bfloat16)
    optimizer = AdamW(ours.parameters(), lr=1e-2)
    ours.to(torch.bfloat16)
    expected = AdamW(theirs.parameters(), lr=1e-2)
    for each, steps in ((ours, optimizer), (theirs, expected)):
        give_gradients(each, seed=0)
        steps.step()
        assert {x.dtype for state in steps.state.values() for x in state.values()} == {
            torch.bfloat16
        }
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_averages_that_bfloat16_would_not_follow_are_refused():
    with pytest.raises(ArgumentError, match=r"0\.99 at most"):
        AdamW(model().parameters(), betas=(0.9, 0.999), moments=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"beta2 is 0\.999, but must be at most 0\.99"):
        TrainConfig(moments="bfloat16", beta2=0.999)
