"""The `lm_head` of a tied model: a module without a weight of its own that stands where
transformers' does. The right values are transformers'."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from gpt2fast import GPT2
from gpt2fast.errors import ArgumentError, WeightsError

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2]])


@pytest.fixture
def pair(tmp_path) -> tuple[GPT2, GPT2LMHeadModel]:
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    return GPT2.from_pretrained(tmp_path / "model").eval(), theirs


def same_tokens(ours: GPT2, theirs: Any) -> bool:
    expected = theirs.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return torch.equal(ours.generate(IDS, max_new_tokens=6), expected)


def negate_last(module, inputs, output):
    output = output.clone()
    output[:, -1] *= -1
    return output


def forbid(module, inputs, output):
    output = output.clone()
    output[:, :, :5] = -1e9
    return output


@pytest.mark.parametrize("hook", [negate_last, forbid])
def test_a_hook_sees_the_logits_in_transformers_shape_while_generating(pair, hook):
    ours, theirs = pair
    shapes: tuple[list, list] = [], []
    for head, seen in ((ours.lm_head, shapes[0]), (theirs.lm_head, shapes[1])):
        head.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.shape))
        head.register_forward_hook(hook)
    assert same_tokens(ours, theirs)
    assert shapes[0] == shapes[1]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_what_is_done_to_the_embedding_is_not_done_to_the_head(pair, how):
    for wte in (pair[0].wte, pair[1].transformer.wte):
        if how == "parametrized":
            parametrize.register_parametrization(wte, "weight", Doubled())
        else:
            mask = torch.ones(50, 16)
            mask[5] = 0
            prune.custom_from_mask(wte, "weight", mask)
    ours, theirs = pair
    assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-5)
    assert same_tokens(ours, theirs)
    ours(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    ours_grad, theirs_grad = (
        next(p.grad for n, p in wte.named_parameters() if "orig" in n)
        for wte in (ours.wte, theirs.transformer.wte)
    )
    assert torch.allclose(ours_grad, theirs_grad, atol=1e-5)


def test_a_head_of_another_model_computes_as_that_and_is_not_saved(pair, tmp_path):
    ours, _ = pair
    other = GPT2(ours.config).eval()
    ours.lm_head = other.lm_head
    expected = ours.lm_head(ours.hidden_states(IDS))
    assert torch.equal(ours(IDS).logits, expected)
    tokens = IDS
    for _ in range(3):
        following = other.project(ours.hidden_states(tokens))[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], 1)
    assert torch.equal(ours.generate(IDS, max_new_tokens=3), tokens)
    with pytest.raises(ArgumentError, match="lm_head is tied to another model"):
        ours.save_pretrained(tmp_path / "no")


def test_copies_are_tied_to_themselves_and_a_head_alone_has_a_weight(pair):
    ours, _ = pair
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.lm_head.model is twin
        assert torch.equal(twin(IDS).logits, ours(IDS).logits)
        assert list(twin.state_dict()) == list(ours.state_dict())
    x = torch.randn(3, 16)
    alone = copy.deepcopy(ours.lm_head)
    expected = ours.lm_head(x)
    with torch.no_grad():
        ours.wte.weight.zero_()
    assert torch.equal(alone(x), expected) and not ours.lm_head(x).any()


def test_transformers_state_dict_is_loaded_with_both_names_or_refused(pair):
    ours, theirs = pair
    state = {name.removeprefix("transformer."): t for name, t in theirs.state_dict().items()}
    assert "lm_head.weight" in state
    fresh = GPT2(ours.config).eval()
    assert not any(fresh.load_state_dict(state))
    assert torch.equal(fresh(IDS).logits, ours(IDS).logits)
    state["lm_head.weight"] = torch.zeros(50, 16)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"lm_head\.weight is not wte\.weight"):
            fresh.load_state_dict(state, strict=strict)


@pytest.mark.parametrize(
    "names",
    [
        ["lm_head.base_layer.weight", "lm_head.lora_A.default.weight"],
        ["lm_head.parametrizations.weight.original"],
        ["lm_head.weight_g", "lm_head.weight_v"],
        ["lm_head.weight", "lm_head.scale"],
    ],
)
def test_what_changes_a_stored_head_is_refused(pair, tmp_path, names):
    state = {name: t for name, t in pair[1].state_dict().items() if name != "lm_head.weight"}
    state |= {name: torch.ones(50, 16) for name in names}
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(
        WeightsError, match=r"lm_head\..* (changes the|has the shape of an) output proj"
    ):
        GPT2.from_pretrained(tmp_path / "model")


def test_a_head_that_differs_in_its_dtype_alone_is_tied(pair, tmp_path):
    state = pair[1].state_dict()
    state["lm_head.weight"] = state["lm_head.weight"].half()
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert GPT2.from_pretrained(tmp_path / "model").config.tie_word_embeddings
