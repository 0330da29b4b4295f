"""Runs that train adapters or a part of the parameters: settings, preparation, resumption."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from gpt2fast import GPT2, Error
from gpt2fast.errors import ConfigError
from gpt2fast.lora import load_adapter, merge, save_adapter
from gpt2fast.training import TrainConfig
from gpt2fast.training.start.adapters import (
    adapter_state,
    describe_training,
    prepare_model,
    restore_adapters,
)
from small_adapters import ALL, random_model, tokens


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_rank": 8}, "--init-from"),
        ({"lora_rank": 0, "init_from": "x"}, "lora_rank is 0"),
        ({"lora_alpha": 16}, "without lora_rank"),
        ({"lora_targets": "c_fc"}, "without lora_rank"),
        ({"lora_rank": 8, "init_from": "x", "lora_dropout": 1}, "lora_dropout is 1"),
        ({"lora_rank": 8, "init_from": "x", "lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_rank": 8, "init_from": "x", "lora_targets": " "}, "lora_targets is ' '"),
        ({"lora_rank": 8, "init_from": "x", "freeze": "wte"}, "null with lora_rank=8"),
        ({"lora_rank": 8, "init_from": "x", "optimizer": "muon"}, "adamw with lora_rank=8"),
        ({"freeze": ""}, "freeze is ''"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(fields, words):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**fields)
    assert words in str(error.value)


def test_a_run_is_prepared_as_it_is_told():
    whole = prepare_model(TrainConfig(), random_model())
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert describe_training(whole) is None
    frozen = prepare_model(TrainConfig(freeze="wte,h.0"), random_model())
    assert not frozen.wte.weight.requires_grad
    assert "the frozen token embedding is the output projection, too" in describe_training(frozen)
    config = TrainConfig(
        init_from="x", lora_rank=2, lora_alpha=5, lora_dropout=0.1, lora_targets="c_fc"
    )
    model = prepare_model(config, random_model())
    projection = model.h[2].mlp.c_fc
    assert (projection.rank, projection.alpha, projection.dropout) == (2, 5.0, 0.1)
    trained = 3 * 2 * (20 + 52)
    assert describe_training(model).startswith(f"training {trained} of ")
    assert "adapters of rank 2 beside 3 projections" in describe_training(model)


def test_a_run_resumed_from_a_merged_model_goes_on_bit_for_bit(tmp_path):
    config = TrainConfig(init_from="base", lora_rank=3, lora_targets=ALL, lora_dropout=0.1)

    def steps(model: GPT2, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(tokens(), labels=tokens()).loss.backward()
            optimizer.step()

    def adamw(model: GPT2) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model = prepare_model(config, random_model()).train()
    optimizer = adamw(model)
    steps(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    save_adapter(model, tmp_path / "adapter", config.init_from)
    state = {"adapters": adapter_state(model), "optimizer": optimizer.state_dict()}
    torch.save({**state, "random": torch.get_rng_state()}, tmp_path / "state.pt")
    steps(model, optimizer, 3)

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = prepare_model(config, GPT2.from_pretrained(tmp_path)).train()
    restore_adapters(resumed, state["adapters"])
    optimizer = adamw(resumed)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    steps(resumed, optimizer, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    base = random_model()
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(
        merge(base)(tokens()).logits, GPT2.from_pretrained(tmp_path)(tokens()).logits
    )
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "base"
    )


def test_a_run_is_not_resumed_with_other_adapters():
    config = TrainConfig(init_from="base", lora_rank=3)
    state = adapter_state(prepare_model(config, random_model()))
    for other in (replace(config, lora_rank=2), replace(config, lora_targets=ALL)):
        with pytest.raises(Error, match="cannot resume: h.0"):
            restore_adapters(prepare_model(other, random_model()), state)
    plain = random_model()
    assert adapter_state(plain) == {}
    restore_adapters(plain, {})
