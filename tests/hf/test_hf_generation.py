"""transformers' generate on our steps: what it writes, and what stays with transformers."""

from __future__ import annotations

import copy
import functools
import logging
import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GPT2Config, LogitsProcessor, StoppingCriteria

import gpt2fast
from comparison import needs_native
from gpt2fast import GPT2
from gpt2fast.errors import ArgumentError
from gpt2fast.hf import from_hf, fuse, generation, to_hf, unfuse
from gpt2fast.ops.backend import record_calls
from tolerance import assert_allclose, assert_equal

SIZES: dict[str, Any] = {
    "vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


def build(**options: Any) -> Any:
    """A model of transformers with random biases and norms too, in evaluation mode."""
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(GPT2Config(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def prompts(rows: int = 3, length: int = 9, padded: bool = True) -> dict[str, Tensor]:
    """Token ids and a mask; later rows have more padding on the left."""
    tokens, mask = torch.randint(3, 97, (rows, length)), torch.ones(rows, length).long()
    for row in range(rows if padded else 0):
        mask[row, : 2 * row] = 0
        tokens[row, : 2 * row] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def ops_of(model: Any, **options: Any) -> tuple[Any, set[str]]:
    """What a model writes with one seed, and the ops that ran."""
    torch.manual_seed(11)
    with record_calls() as calls:
        found = model.generate(**options)
    return found, {call.op for call in calls}


def random_request(draw: random.Random) -> dict[str, Any]:
    """Options of a request of any kind."""
    options: dict[str, Any] = {"max_new_tokens": draw.randint(1, 14)}
    if draw.random() < 0.4:
        options |= {"num_beams": draw.choice([2, 3, 4])}
        options |= draw.choice([{}, {"length_penalty": 0.3}, {"early_stopping": True}])
        options |= draw.choice([{}, {"num_return_sequences": 2}])
        options["do_sample"] = draw.random() < 0.3
    else:
        options["do_sample"] = draw.random() < 0.6
        if options["do_sample"]:
            options["num_return_sequences"] = draw.choice([1, 2])
    if options["do_sample"]:
        options |= draw.choice(
            [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1},
             {"typical_p": 0.7}, {"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.01}]
        )  # fmt: skip
    for _ in range(draw.randint(0, 2)):
        options |= draw.choice(
            [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4},
             {"bad_words_ids": [[5], [7, 9]]}, {"suppress_tokens": [4, 6]},
             {"sequence_bias": [[[8], 3.0]]}, {"forced_eos_token_id": 2},
             {"exponential_decay_length_penalty": (3, 1.5)}, {"renormalize_logits": True},
             {"eos_token_id": [2, 11, 23, 40, 41, 42]}, {"remove_invalid_values": True}]
        )  # fmt: skip
    return options


@needs_native
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("part", range(4))
def test_requests_of_all_kinds_get_the_same_tokens(padded, part):
    model = build()
    ours, draw = fuse(copy.deepcopy(model), generate=True), random.Random(part)
    ran = 0
    for _ in range(25):
        options = {**prompts(draw.randint(1, 3), 9, padded), **random_request(draw)}
        found, called = ops_of(ours, **options)
        ran += "packed_step" in called or "packed_next" in called
        assert_equal(found, ops_of(model, **options)[0])
        torch.manual_seed(11)
        assert_equal(found, model.generate(**options, custom_generate=gpt2fast.generate))
    assert ran == 25


@needs_native
@pytest.mark.parametrize("beams", [1, 3])
def test_scores_logits_and_the_cache_are_returned(beams):
    model = build()
    ours = fuse(copy.deepcopy(model), generate=True)
    options = {
        **prompts(padded=False), "max_new_tokens": 6, "num_beams": beams, "do_sample": False,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    (found, called), (right, _) = ops_of(ours, **options), ops_of(model, **options)
    assert "packed_step" in called and type(found) is type(right)
    assert found.keys() == right.keys()
    assert_equal(found.sequences, right.sequences)
    for name in ("scores", "logits"):
        for ours_, theirs_ in zip(getattr(found, name), getattr(right, name), strict=True):
            assert_allclose(ours_, theirs_, rtol=1e-4, atol=1e-4)
    if beams > 1:
        assert_allclose(found.sequences_scores, right.sequences_scores, rtol=1e-4)
    cache, other = found.past_key_values, right.past_key_values
    assert type(cache) is DynamicCache and cache.get_seq_length() == other.get_seq_length()
    for layer, same in zip(cache.layers, other.layers, strict=True):
        assert_allclose(layer.keys, same.keys, rtol=1e-4, atol=1e-4)
        assert_allclose(layer.values, same.values, rtol=1e-4, atol=1e-4)


@needs_native
def test_a_conversation_goes_on_from_the_cache():
    model = build()
    ours = fuse(copy.deepcopy(model), generate=True)
    tokens = prompts(1, padded=False)["input_ids"]
    found = []
    for each in (ours, model):
        cache = DynamicCache()
        first = each.generate(tokens, past_key_values=cache, max_new_tokens=5, do_sample=False)
        longer = torch.cat([first, tokens[:, :4]], 1)
        found.append(
            each.generate(longer, past_key_values=cache, max_new_tokens=5, do_sample=False)
        )
    assert_equal(*found)


class _Favor(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, (input_ids[:, -1].max() + 1) % 97] += 5.0
        return scores


class _Stop(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return input_ids[:, -1] % 5 == 0


class _Streamer:
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.pieces.append([])


@needs_native
def test_processors_criteria_and_streamers_of_the_users_own():
    model = build()
    ours = fuse(copy.deepcopy(model), generate=True)
    found, given = [], prompts(1, padded=False)
    for each in (ours, model):
        streamer = _Streamer()
        tokens = each.generate(
            **given, max_new_tokens=20, logits_processor=[_Favor()],
            stopping_criteria=[_Stop()], streamer=streamer, do_sample=False,
        )  # fmt: skip
        found.append((tokens.tolist(), streamer.pieces))
    assert found[0] == found[1] and found[0][1][-1] == []


@needs_native
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 60}, "may grow beyond 64"),
        ({"use_cache": False}, "another cache"),
        ({"cache_implementation": "static"}, "another cache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden_states"),
        ({"token_type_ids": torch.ones(2, 9).long()}, "has token_type_ids"),
        ({"position_ids": torch.arange(9)[None].expand(2, 9) + 3}, "positions"),
        ({"attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] + [1] * 4])}, "padding"),
        ({"prompt_lookup_num_tokens": 2}, "_assisted_decoding"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_our_steps_do_not_answer_runs_on_the_model(options, says, caplog):
    model = build()
    ours = fuse(copy.deepcopy(model), generate=True)
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    given = {
        "input_ids": prompts(rows, padded=False)["input_ids"], "max_new_tokens": 6,
        "do_sample": False, **options,
    }  # fmt: skip
    if given["max_new_tokens"] == 60:
        given["max_length"] = None
        given["stopping_criteria"] = [_Stop()]
    caplog.set_level(logging.DEBUG, "gpt2fast.hf.generation")
    try:
        right = model.generate(**given)
    except IndexError:  # beyond the positions
        with pytest.raises(IndexError):
            ours.generate(**given)
    else:
        found = ours.generate(**given)
        sequences = [x if isinstance(x, Tensor) else x.sequences for x in (found, right)]
        assert_equal(*sequences)
    if says != "_assisted_decoding":  # that is no loop of ours
        assert says in caplog.text


@needs_native
@pytest.mark.parametrize("change", ["hook", "training", "bfloat16", "another module"])
def test_models_that_our_steps_are_not_exact_for(change):
    model = fuse(build(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), generate=True)
    if change == "hook":
        model.transformer.h[1].mlp.register_forward_hook(lambda m, args, out: 2 * out)
    elif change == "training":
        model.train()
    elif change == "bfloat16":
        model.bfloat16()
    else:
        model.transformer.ln_f = torch.nn.Identity()
    options = {**prompts(), "max_new_tokens": 6, "do_sample": False}
    found, called = ops_of(model, **options)
    assert "packed_step" not in called
    assert_equal(found, ops_of(unfuse(model), **options)[0])


def _replace_act(model: Any) -> None:
    model.transformer.h[0].mlp.act = torch.nn.Threshold(1.0, 5.0)


def _replace_eps(model: Any) -> None:
    model.transformer.h[1].ln_2.eps = 1.0


def _replace_scaling(model: Any) -> None:
    model.transformer.h[1].attn.scaling *= 3.0


def _swap_blocks(model: Any) -> None:
    blocks = model.transformer.h
    blocks[0], blocks[1] = blocks[1], blocks[0]


def _drop(model: Any) -> None:
    model.transformer.drop.train().p = 0.5


def _learn_a_prompt(model: Any) -> None:
    inner = model.prepare_inputs_for_generation

    @functools.wraps(inner)
    def prepare(*args: Any, **options: Any) -> Any:
        found = inner(*args, **options)
        found["position_ids"] = found["position_ids"] + 5
        return found

    model.prepare_inputs_for_generation = prepare


@needs_native
@pytest.mark.parametrize(
    "change",
    [_replace_act, _replace_eps, _replace_scaling, _swap_blocks, _drop, _learn_a_prompt],
)
@pytest.mark.parametrize("way", ["generate=True", "custom_generate"])
def test_what_a_model_became_after_its_config_is_generated_with(change, way):
    model = build()
    if way == "generate=True":
        fuse(model, generate=True)
    options = {**prompts(), "max_new_tokens": 8, "do_sample": False}
    before, _ = ops_of(model, **options)
    change(model)
    if way == "custom_generate":
        options["custom_generate"] = gpt2fast.generate
    found, called = ops_of(model, **options)
    assert "packed_step" not in called or change is _swap_blocks
    options.pop("custom_generate", None)
    right, _ = ops_of(unfuse(model), **options)
    assert_equal(found, right)
    assert not torch.equal(found, before)


@needs_native
def test_autocast_is_the_models():
    model, options = build(), {**prompts(), "max_new_tokens": 8, "do_sample": True}
    ours = fuse(copy.deepcopy(model), generate=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, called = ops_of(ours, **options)
        right, _ = ops_of(model, **options)
    assert "packed_step" not in called
    assert found.shape[0] == right.shape[0]


@needs_native
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_masks_of_every_dtype(dtype):
    model = build()
    ours = fuse(copy.deepcopy(model), generate=True)
    for holes in (False, True):
        options = {**prompts(), "max_new_tokens": 8, "do_sample": False}
        mask = options["attention_mask"].clone()
        if holes:
            mask[:, 6] = 0
        options["attention_mask"] = mask.to(dtype)
        found, called = ops_of(ours, **options)
        assert ("packed_step" in called) == (not holes)
        assert_equal(found, ops_of(model, **options)[0])


@needs_native
def test_asking_for_hidden_states_once_costs_no_later_request():
    model = fuse(build(), generate=True)
    tokens = prompts(padded=False)["input_ids"]
    assert len(model(tokens, output_hidden_states=True).hidden_states) == 3
    _, called = ops_of(model, input_ids=tokens, max_new_tokens=4, do_sample=False)
    assert "packed_step" in called
    assert len(model(tokens, output_hidden_states=True).hidden_states) == 3


@needs_native
@pytest.mark.parametrize("beams", [1, 3])
def test_caches_grow_with_the_text(beams, monkeypatch):
    monkeypatch.setattr(generation, "_ROOM", 2)
    model = build(eos_token_id=None)
    ours = fuse(copy.deepcopy(model), generate=True)
    options = {**prompts(), "max_new_tokens": 50, "do_sample": False, "num_beams": beams}
    found, called = ops_of(ours, **options)
    assert "packed_step" in called and found.shape[1] == 59
    assert_equal(found, ops_of(model, **options)[0])


@needs_native
@pytest.mark.parametrize("way", ["optimizer", "data", "assignment", "resize"])
def test_weights_that_change_are_packed_again(way):
    model = fuse(build(), generate=True)
    options = {**prompts(), "max_new_tokens": 8, "do_sample": False}
    before, _ = ops_of(model, **options)
    weight = model.transformer.h[0].mlp.c_fc.weight
    with torch.no_grad():
        if way == "optimizer":
            weight.add_(torch.randn_like(weight))
        elif way == "data":
            weight.data.mul_(-1.0)
        elif way == "assignment":
            model.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(torch.randn_like(weight))
        else:
            model.resize_token_embeddings(120)
            model.transformer.wte.weight[97:].mul_(30.0)
    found, called = ops_of(model, **options)
    assert "packed_step" in called
    assert not torch.equal(found, before)
    assert_equal(found, ops_of(unfuse(model), **options)[0])


def test_generating_needs_a_language_model():
    model = transformers.GPT2Model(GPT2Config(**SIZES))
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ArgumentError, match="no GPT2LMHeadModel that could generate"):
        fuse(model, generate=True)
    assert kinds == [type(m) for m in model.modules()]


@pytest.mark.parametrize("tied", [True, False])
def test_models_share_parameters_both_ways(tied):
    model = build(tie_word_embeddings=tied)
    tokens = prompts(padded=False)["input_ids"]
    ours = GPT2.from_hf(model)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in model.parameters()}
    assert ours.config.tie_word_embeddings == tied and not ours.training
    assert_allclose(ours(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    back = ours.to_hf()
    assert type(back) is transformers.GPT2LMHeadModel
    assert {id(p) for p in back.parameters()} == {id(p) for p in model.parameters()}
    assert (back.lm_head.weight is back.transformer.wte.weight) == tied
    assert_equal(back(tokens).logits, model(tokens).logits)
    model(tokens, labels=tokens).loss.backward()
    assert ours.wte.weight.grad is not None
    assert back.config.eos_token_id == 2


def test_texts_end_where_the_generation_config_says():
    model, tokens = build(), prompts(padded=False)["input_ids"]
    free = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None)
    ends = sorted({int(free[0, 11]), int(free[1, 13])})
    model.generation_config.eos_token_id = ends
    right = model.generate(tokens, max_new_tokens=12, do_sample=False)
    assert not torch.equal(right, free)
    ours = GPT2.from_hf(model)
    assert_equal(ours.generate(tokens, max_new_tokens=12, pad_token_id=0), right)
    assert ours.to_hf().generation_config.eos_token_id == ends


def test_outputs_are_read_alike():
    model, tokens = build(), prompts(padded=False)["input_ids"]
    ours = GPT2.from_hf(model)
    for options in ({}, {"labels": tokens}):
        found, right = ours(tokens, **options), model(tokens, use_cache=False, **options)
        assert list(found.keys()) == list(right.keys()) == list(found) and len(found) == len(right)
        for read in (
            lambda output: output[0],
            lambda output: output[-1],
            lambda output: output[:2][-1],
            lambda output: output["logits"],
            lambda output: output.to_tuple()[-1],
            lambda output: dict(output)["logits"],
            lambda output: {**output}["logits"],
        ):
            assert_allclose(read(found), read(right), rtol=1e-4, atol=1e-4)
        assert ("loss" in found) == ("loss" in right)
        with pytest.raises(KeyError):
            found["loss" if not options else "hidden_states"]
        with pytest.raises(IndexError):
            found[2]
    output = ours(tokens, labels=tokens)
    assert output[0] is output["loss"] is output.loss and output._logits is None


def test_what_cannot_be_shared_is_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        build(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with pytest.raises(ArgumentError, match="c_attn is watched, or is no part of GPT-2"):
        from_hf(adapted.base_model.model)
    for change in (_replace_act, _replace_eps, _replace_scaling):
        changed = build()
        change(changed)
        with pytest.raises(ArgumentError, match="what its config says"):
            from_hf(changed)
    with pytest.raises(ArgumentError, match="cross-attention"):
        from_hf(build(add_cross_attention=True))
    with pytest.raises(ArgumentError, match="takes a GPT-2 of transformers.*Linear"):
        from_hf(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert to_hf(GPT2(gpt2fast.GPT2Config(n_layer=1, n_head=2, n_embd=8))) is not None
