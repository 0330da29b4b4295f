"""Caches of transformers, tuples and ours: the same texts, kept in the form that was given."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

from differential import with_random_weights
from gpt2fast import GPT2Config
from gpt2fast.errors import ArgumentError, GenerationError
from gpt2fast.nn.kv_cache import KVCache
from gpt2fast.ops.backend import record_calls
from model_pairs import DTYPES, assert_same_gradients, directions, leaf_of, models
from tolerance import assert_close

SMALL = GPT2Config(
    vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, dropout=0.0, eos_token_id=60
)
FORMS = ["ours", "made by use_cache", "DynamicCache", "DynamicCache of a config", "tuple"]
PIECES = ((0, 6), (6, 7), (7, 8), (8, 13))
PADDING = ["none", "left", "right", "holes"]


def empty_cache(form, model, config, rows):
    if form == "ours":
        return model.new_cache(rows)
    if form == "made by use_cache":
        return None
    if form == "DynamicCache":
        return DynamicCache()
    if form == "DynamicCache of a config":
        return DynamicCache(config=config)
    empty = torch.zeros(rows, model.config.n_head, 0, model.config.head_dim, dtype=model.dtype)
    return tuple((empty, empty) for _ in range(model.config.n_layer))


def padded(kind, rows, time):
    mask = torch.ones(rows, time, dtype=torch.int64)
    if kind == "left":
        mask[0, :4] = 0
    elif kind == "right":
        mask[0, 2:6] = 0  # of the prompt
    elif kind == "holes":
        mask[0, :2] = 0
        mask[1, 3:5] = 0
        mask[1, 9] = 0
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("form", FORMS)
def test_a_text_in_pieces_equals_transformers(form, padding, dtype):
    found = models(8, dtype, n_positions=40)
    config = found[0].config
    ids = torch.randint(config.vocab_size, (3, 13))
    mask = padded(padding, 3, 13)
    places = None if padding == "none" else (mask.cumsum(1) - 1).clamp(min=0)
    caches = [empty_cache(form, found[0], found[1].config, 3), None, None]
    given = caches[0]
    for begin, end in PIECES:
        with torch.no_grad():
            outputs = [
                model(
                    ids[:, begin:end],
                    past_key_values=cache,
                    attention_mask=None if padding == "none" else mask[:, :end],
                    position_ids=None if places is None else places[:, begin:end],
                    use_cache=True,
                )
                for model, cache in zip(found, caches, strict=True)
            ]
        real = mask[:, begin:end].bool()
        assert_close(*([each.logits[real]] for each in outputs), times=3.0)
        caches = [each.past_key_values for each in outputs]
        assert outputs[0].cache is caches[0]
    if form == "tuple":
        pairs = caches[0]
        assert isinstance(pairs, tuple)
    elif "DynamicCache" in form:
        assert caches[0] is given
        pairs = [(layer.keys, layer.values) for layer in given.layers]
    else:
        assert isinstance(caches[0], KVCache) and (given is None or caches[0] is given)
        assert caches[0].lengths.tolist() == mask.sum(1).tolist()
        return
    real = mask.bool()
    mine = [x.transpose(1, 2)[real] for pair in pairs for x in pair]
    others = [
        [x.transpose(1, 2)[real] for layer in cache.layers for x in (layer.keys, layer.values)]
        for cache in caches[1:]
    ]
    assert_close(mine, *others, times=3.0)


@pytest.mark.parametrize("form", FORMS)
def test_positions_go_on_after_what_was_read(form):
    """As in transformers, padding or not: the number of columns before."""
    found = models(9, n_positions=40)
    config = found[0].config
    ids = torch.randint(config.vocab_size, (2, 9))
    mask = padded("left", 2, 9)
    caches = [empty_cache(form, found[0], found[1].config, 2), None, None]
    with torch.no_grad():
        for begin, end in ((0, 6), (6, 8), (8, 9)):
            outputs = [
                model(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    past_key_values=cache,
                    use_cache=True,
                )
                for model, cache in zip(found, caches, strict=True)
            ]
            caches = [each.past_key_values for each in outputs]
            real = mask[:, begin:end].bool()
            assert_close(*([each.logits[real]] for each in outputs), times=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["DynamicCache", "tuple"])
def test_gradients_flow_back_through_what_was_read(form, training, dtype):
    """Learned keys and values before a text (Li and Liang, 2021), and a text in two pieces."""
    found = [model.train(training) for model in models(10, dtype, n_positions=40)]
    config = found[0].config
    ids = torch.randint(config.vocab_size, (2, 9))
    shape = (2, config.n_head, 4, config.head_dim)
    prefix = [torch.randn(shape) for _ in range(2 * config.n_layer)]
    leaves, losses = [], []
    for model in found:
        own = [leaf_of(x, model) for x in prefix]
        past = tuple(zip(own[::2], own[1::2], strict=True))
        if form == "DynamicCache" or model is not found[0]:
            past = DynamicCache(past)
        first = model(ids[:, :5], past_key_values=past, use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values, labels=ids[:, 5:])
        way = directions([first.logits])[0].to(first.logits.dtype)
        losses.append(second.loss + (first.logits * way).mean())
        leaves.append(own)
    assert_close(*([loss.detach()] for loss in losses), times=3.0)
    for loss in losses:
        loss.backward()
    assert_same_gradients(found, leaves)


def test_a_tuple_is_left_as_it_is():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        dynamic = DynamicCache()
        model(ids[:, :4], past_key_values=dynamic)
        past = tuple(dynamic)  # (keys, values, None), as transformers lists them
        before = [x.clone() for layer in past for x in layer[:2]]
        output = model(ids[:, 4:], past_key_values=past)
        expected = model(ids).logits[:, 4:]
    assert torch.allclose(output.logits, expected, atol=1e-5)
    assert all(
        torch.equal(x, y) for x, y in zip(before, [x for p in past for x in p[:2]], strict=True)
    )
    assert [x.shape[2] for layer in output.past_key_values for x in layer] == [9] * 4
    assert list(output) == ["logits", "past_key_values"]


def test_use_cache_says_whether_a_cache_is_returned():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 5))
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=False).past_key_values is None
    cache = model.new_cache(2)
    assert model(ids, cache=cache, use_cache=False).past_key_values is None
    assert cache.lengths.tolist() == [5, 5]
    assert model(ids, cache=cache).past_key_values is cache
    output = model(ids, use_cache=True, labels=ids)
    assert list(output) == ["loss", "logits", "past_key_values"]
    assert isinstance(output[2], KVCache)
    assert torch.allclose(output.loss, model(ids, labels=ids).loss)
    output.loss.backward()
    model.train().gradient_checkpointing = True
    with pytest.warns(UserWarning, match="gradient checkpointing"):
        assert model(ids, use_cache=True).past_key_values is None


@pytest.mark.parametrize("form", ["cache", "past_key_values"])
def test_generation_of_ones_own_as_in_transformers(form):
    found = models(11, n_positions=40)
    prompt = torch.randint(found[0].config.vocab_size, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    texts = []
    for model in found[:2]:
        name = form if model is found[0] else "past_key_values"
        ids, seen, cache, new = prompt, mask, DynamicCache(), prompt
        for _ in range(6):
            places = (seen.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            with torch.no_grad():
                output = model(
                    new, attention_mask=seen, position_ids=places, use_cache=True, **{name: cache}
                )
            new = output.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
            seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.int64)], 1)
            cache = getattr(output, form if model is found[0] else "past_key_values")
        texts.append(ids.tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["wte", "h.0", "h.0.attn", "h.0.attn.c_attn", "ln_f"])
def test_hooks_see_and_change_what_they_do_in_transformers(name):
    found = models(12, n_positions=40)
    ids = torch.randint(found[0].config.vocab_size, (2, 9))
    mask = padded("left", 2, 9)
    seen = [[], [], []]
    for model, calls in zip(found, seen, strict=True):

        def hook(module, inputs, output, calls=calls):
            value = output[0] if isinstance(output, tuple) else output
            calls.append(value)
            changed = value * 1.2 + 0.1
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        getattr(model, "transformer", model).get_submodule(name).register_forward_hook(hook)
    caches = [DynamicCache(), DynamicCache(), DynamicCache()]
    with torch.no_grad():
        for begin, end in ((0, 6), (6, 8), (8, 9)):
            real = mask[:, begin:end].bool()
            outputs = [
                model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
                for model, cache in zip(found, caches, strict=True)
            ]
            assert_close(*([each.logits[real]] for each in outputs), times=3.0)
            assert_close(*([calls[-1][real]] for calls in seen), times=3.0)
    assert [len(calls) for calls in seen] == [3, 3, 3]


def test_kernels_attend_where_nothing_asks_for_more():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 6))
    cache = DynamicCache()
    with torch.no_grad(), record_calls() as calls:
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    ops = [call.op for call in calls]
    assert ops.count("causal_attention") == ops.count("attention_with_cache") == 2


def test_a_cache_of_fixed_size_is_filled():
    found = models(13, n_positions=40)
    ids = torch.randint(found[0].config.vocab_size, (2, 8))
    cache = StaticCache(config=found[1].config, max_cache_len=12)
    with torch.no_grad():
        whole = [model(ids).logits for model in found]
        parts = [
            found[0](ids[:, begin:end], past_key_values=cache).logits
            for begin, end in ((0, 5), (5, 6), (6, 8))
        ]
    assert_close([torch.cat(parts, 1)], [whole[1]], [whole[2]], times=3.0)


def test_what_does_not_fit_is_named():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 3))
    cache = DynamicCache()
    output = model(ids, past_key_values=cache)
    with pytest.raises(ArgumentError, match="are one argument"):
        model(ids, cache=model.new_cache(2), past_key_values=cache)
    with pytest.raises(ArgumentError, match="is a Tensor; give a KVCache of"):
        model(ids, past_key_values=ids)
    with pytest.raises(ArgumentError, match=r"\(2, 3, 3, 8\) and this call needs \(1, 3, 3, 8\)"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ArgumentError, match=r"needs \(1, 3, 3, 8\)"):
        model(ids[:1], past_key_values=tuple(cache))
    with pytest.raises(ArgumentError, match="1 layers and this model has 2"):
        model(ids, past_key_values=tuple(cache)[:1])
    with pytest.raises(ArgumentError, match="0 layers and this model has 2"):
        model(ids, past_key_values=())
    with pytest.raises(ArgumentError, match=r"is not \(keys, values\)"):
        model(ids, past_key_values=(None, None))
    with pytest.raises(GenerationError, match=r"after 3 tokens of past_key_values, \(2, 6\)"):
        model(ids, attention_mask=torch.ones(2, 3), past_key_values=cache)
    with pytest.raises(ArgumentError, match=r"hold torch.float32 .*computes in torch.float64"):
        with_random_weights(SMALL, 0).double()(ids, past_key_values=tuple(cache))
    with pytest.raises(GenerationError, match="33 tokens exceed|position 32 is outside"):
        model(torch.zeros(2, 30, dtype=torch.long), past_key_values=cache)
    assert output.past_key_values is cache and cache.get_seq_length() == 3
    ours = model(ids, torch.tensor([[0, 1, 1], [1, 1, 1]]), use_cache=True).cache
    with pytest.raises(GenerationError, match=r"\[3, 3\] tokens before .* cache has \[2, 3\]"):
        model(ids, torch.ones(2, 6), cache=ours)


def test_packed_models_refuse_what_they_do_not_compute():
    packed = with_random_weights(SMALL, 0)
    if not packed.can_be_packed():
        pytest.skip("there are no kernels here that read packed weights")
    packed = packed.pack()
    ids = torch.randint(61, (2, 3))
    for name, value in {
        "inputs_embeds": torch.zeros(2, 3, 24),
        "token_type_ids": ids,
        "past_key_values": DynamicCache(),
        "use_cache": True,
        "output_hidden_states": True,
        "output_attentions": True,
    }.items():
        with pytest.raises(ArgumentError, match=f"a PackedGPT2 takes no {name}"):
            packed(None if name == "inputs_embeds" else ids, **{name: value})
    with pytest.raises(ArgumentError, match="takes a KVCache.*not a DynamicCache"):
        packed(ids, cache=DynamicCache())
    with pytest.raises(ArgumentError, match="no argument output_attention; did you mean"):
        packed(ids, output_attention=True)
    with pytest.raises(ArgumentError, match="reads input_ids"):
        packed()
    assert packed(ids, use_cache=False, output_attentions=None).logits.shape == (2, 3, 61)


def test_transformers_is_not_imported():
    code = (
        "import sys, torch; from gpt2fast import GPT2, GPT2Config;"
        "m = GPT2(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1));"
        "i = torch.zeros(1, 2, dtype=torch.long);"
        "e = torch.zeros(1, 1, 0, 8);"
        "o = m(i, past_key_values=((e, e),), use_cache=True, output_attentions=True);"
        "m(i, past_key_values=o.past_key_values);"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
