"""Masks of four dimensions, and several texts in a row, as transformers' models take them."""

from __future__ import annotations

import pytest
import torch
import transformers

from gpt2fast import nn as parts
from gpt2fast.errors import ArgumentError, GenerationError
from model_pairs import DTYPES, assert_same_gradients, models
from small_generators import small_model
from tolerance import assert_close, assert_equal


def scores_mask(kind, batch, heads, time, keys, seed=0):
    """(batch, 1 or heads, time, keys), in which every row sees something, later keys too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads if "heads" in kind else 1, time, keys)
    seen = torch.rand(shape, generator=generator) < 0.6
    seen[..., 0] = True
    if "one row" in kind:
        seen = seen[:1]
    if "bool" in kind:
        return seen
    return torch.randn(seen.shape, generator=generator).masked_fill(~seen, -1e9)


def pairs(seed, dtype=torch.float32, **changes):
    found = models(seed, dtype, **changes)
    for model in found[1:]:
        model.set_attn_implementation("sdpa")  # takes bool as well
    return found


def given_to(model, mask):
    """transformers wants a mask in the dtype of its model."""
    return mask if mask.dtype == torch.bool else mask.to(model.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "bool, heads", "bool, one row", "added", "added, heads"])
@pytest.mark.parametrize("seed", range(4))
def test_logits_loss_and_gradients_equal_transformers(seed, kind, dtype):
    found = pairs(seed, dtype)
    config = found[0].config
    ids = torch.randint(config.vocab_size, (3, 9))
    mask = scores_mask(kind, 3, config.n_head, 9, 9, seed)
    outputs = [
        model(ids, attention_mask=given_to(model, mask), labels=ids, output_hidden_states=True)
        for model in found
    ]
    assert_close(*([each.logits.detach()] for each in outputs), times=3.0)
    states = ([x.detach() for x in each.hidden_states] for each in outputs)
    assert_close(*states, times=3.0)
    for each in outputs:
        each.loss.backward()
    assert_same_gradients(found)
    # It is the mask that says what is seen: the first token's result depends on the last token.
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % config.vocab_size
    changed = found[0](other, attention_mask=mask).logits[:, 0]
    assert not torch.equal(changed, outputs[0].logits[:, 0])


@pytest.mark.parametrize("kind", ["bool", "added, heads"])
def test_attention_weights_are_those_of_the_mask(kind):
    ours = models(2)[0]
    config = ours.config
    ids = torch.randint(config.vocab_size, (2, 7))
    mask = scores_mask(kind, 2, config.n_head, 7, 7)
    plain = ours(ids, attention_mask=mask)
    output = ours(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(output.logits, plain.logits, rtol=1e-4, atol=1e-5)
    hidden = (~mask if kind == "bool" else mask < -1e8).expand(output.attentions[0].shape)
    for weights in output.attentions:
        assert (weights[hidden] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_text_in_pieces_equals_transformers(kind):
    found = pairs(1, n_positions=30)
    config = found[0].config
    ids = torch.randint(config.vocab_size, (2, 12))
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        if begin == 0:
            caches = [transformers.DynamicCache() for _ in found]
        mask = scores_mask(kind, 2, config.n_head, end - begin, end, end)
        with torch.no_grad():
            outputs = [
                model(
                    ids[:, begin:end],
                    attention_mask=given_to(model, mask),
                    past_key_values=cache,
                    use_cache=True,
                )
                for model, cache in zip(found, caches, strict=True)
            ]
        assert_close(*([each.logits] for each in outputs), times=3.0)


def test_a_causal_mask_is_the_usual_mask():
    model = small_model().eval()
    ids = torch.randint(61, (2, 9))
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    plain = model(ids).logits
    torch.testing.assert_close(model(ids, causal).logits, plain, rtol=1e-4, atol=1e-5)
    cache = model.new_cache(2)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids[:, :6], causal[..., :6, :6], cache=cache).logits, plain[:, :6],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        torch.testing.assert_close(
            model(ids[:, 6:], cache=cache).logits, plain[:, 6:], rtol=1e-4, atol=1e-5
        )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, causal).logits, plain, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing = True
    model.train()
    torch.testing.assert_close(model(ids, causal).loss or plain, plain)


def test_self_attention_takes_one_too():
    torch.manual_seed(0)
    module = parts.SelfAttention(24, 4, causal=False, key_heads=2)
    x = torch.randn(2, 5, 24)
    window = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
    found = module(x, window[None, None])
    for place in range(5):
        near = slice(max(0, place - 1), place + 2)
        alone = module(x[:, near])[:, place - near.start]
        if place in (0, 4):  # of two neighbors, each sees both
            torch.testing.assert_close(found[:, place], alone, rtol=1e-4, atol=1e-5)
    full = module(x, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    torch.testing.assert_close(full, module(x), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named():
    model = small_model()
    ids = torch.randint(61, (2, 5))
    for shape in [(2, 1, 5, 4), (3, 1, 5, 5), (2, 2, 5, 5), (2, 1, 1, 5)]:
        with pytest.raises(GenerationError, match=r"must be \(2, 1, 5, 5\).*3 heads"):
            model(ids, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(GenerationError, match=r"dtype torch.int64: give bool"):
        model(ids, torch.ones(2, 1, 5, 5, dtype=torch.int64))
    cache = model.new_cache(2)
    with torch.no_grad():
        model(ids, cache=cache)
    with pytest.raises(GenerationError, match="KVCache with tokens in it.*DynamicCache"):
        model(ids, torch.ones(2, 1, 5, 10, dtype=torch.bool), cache=cache)
    with pytest.raises(ArgumentError, match="padding alone"):
        model.pack()(ids, torch.ones(2, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="KVCache that holds tokens"):
        model.h[0](torch.zeros(2, 1, 24), torch.ones(2, 1, 1, 6) > 0, cache.layer(0))


@pytest.mark.parametrize("training", [False, True])
def test_several_texts_in_a_row_each_see_themselves(training):
    found = [model.train(training) for model in pairs(3)]
    vocab = found[0].config.vocab_size
    ids = torch.randint(vocab, (2, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    options = {"position_ids": positions, "use_cache": False}
    outputs = [model(ids, labels=ids, **options) for model in found]
    assert_close(*([each.logits.detach()] for each in outputs), times=3.0)
    for each in outputs:
        each.loss.backward()
    assert_same_gradients(found)
    model = found[0].eval()
    whole = model(ids, **options).logits
    for row, begin, end in ((0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 0, 9)):
        alone = model(ids[row : row + 1, begin:end]).logits
        torch.testing.assert_close(whole[row : row + 1, begin:end], alone, rtol=1e-4, atol=1e-5)
    one = model(ids, position_ids=positions[0], use_cache=False).logits
    assert_equal(one[0], whole[0])


def test_compiled_programs_see_several_texts_too():
    model = small_model().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(61, (1, 7))
    for positions in ([[0, 1, 2, 3, 0, 1, 2]], [[0, 1, 2, 3, 4, 5, 6]]):
        options = {"position_ids": torch.tensor(positions), "use_cache": False}
        found = [each(ids, **options).logits for each in (compiled, model)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_with_a_mask_or_a_cache_they_are_one_text():
    ours, theirs, _ = models(3)
    ids = torch.randint(ours.config.vocab_size, (1, 7))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    for options in ({}, {"attention_mask": torch.ones_like(ids), "use_cache": False}):
        found = [model(ids, position_ids=positions, **options).logits for model in (ours, theirs)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_packed_model_takes_a_mask_of_all_tokens_so_far():
    model = small_model().eval()
    packed = model.pack()
    ids = torch.randint(61, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(ids, mask).logits
        cache = packed.new_cache(2)
        parts = [
            packed(ids[:, begin:end], mask[:, :end], cache=cache).logits
            for begin, end in ((0, 5), (5, 6), (6, 8))
        ]
    real = mask.bool()
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    wrong = torch.ones(2, 9, dtype=torch.int64)
    with pytest.raises(GenerationError, match="before the new ones and the cache has"):
        packed(ids[:, :1], wrong, cache=cache)
