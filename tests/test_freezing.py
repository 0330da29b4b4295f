"""Frozen parameters: which patterns mean which, and that they stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpt2fast.errors import ArgumentError
from gpt2fast.training.freezing import freeze
from small_adapters import CONFIG, random_model, tokens


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("wte", ["wte.weight"]),
        ("ln_f.bias", ["ln_f.bias"]),
        ("wte, wpe", ["wte.weight", "wpe.weight"]),
        (["h.1.ln_?"], [f"h.1.ln_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")]),
        (
            "h.[0-1].mlp.c_fc",
            [f"h.{n}.mlp.c_fc.{part}" for n in (0, 1) for part in ("weight", "bias")],
        ),
    ],
)
def test_patterns_freeze_what_they_mean(patterns, expected):
    model = random_model()
    assert freeze(model, patterns) == expected
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == expected


def test_a_block_is_frozen_whole_and_alone():
    model = random_model(replace(CONFIG, n_layer=11))
    for pattern in ("h.1", "h.1.*"):
        names = freeze(model, pattern)
        assert len(names) == 12
        assert all(name.startswith("h.1.") for name in names)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ("wtee", "'wtee' matches no parameter of the model; there is wte"),
        ("h.7.*", "'h.7.*' matches no"),
        ("wte,attn", "'attn' matches no"),
        ("", "'' matches no"),
        ("lm_head", "which 'wte' freezes"),
        ("*", "nothing is left to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_errors(patterns, words):
    model = random_model()
    with pytest.raises(ArgumentError) as error:
        freeze(model, patterns)
    assert words in str(error.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_parameters_stay_while_the_rest_learns():
    model = random_model().train()
    frozen = freeze(model, "wte,h.0,*.ln_1")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
