"""Hidden states and attention weights as transformers' GPT2LMHeadModel returns them."""

from __future__ import annotations

import pytest
import torch

from differential import random_mask, with_random_weights
from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import ArgumentError, ConfigError
from gpt2fast.ops.backend import record_calls
from model_pairs import DTYPES, assert_same_gradients, directions, models
from tolerance import assert_close

SMALL = GPT2Config(
    vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, dropout=0.0, eos_token_id=60
)
ASKED = {"output_hidden_states": True, "output_attentions": True}


def shown(output, real):
    """Hidden states and attention weights of tokens that are no padding."""
    states = [x[real] for x in output.hidden_states]
    return states + [x.transpose(1, 2)[real] for x in output.attentions]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_values_and_their_gradients_equal_transformers(seed, training, dtype):
    found = models(seed, dtype)
    config = found[0].config
    batch, time = 1 + seed % 3, [1, 17, 5, 24][seed % 4]
    mask = random_mask(seed, batch, time) if seed % 2 else None
    real = torch.ones(batch, time).bool() if mask is None else mask.bool()
    ids = torch.randint(config.vocab_size, (batch, time))
    labels = ids if seed % 4 >= 2 else None
    outputs = [
        model.train(training)(ids, attention_mask=mask, labels=labels, **ASKED) for model in found
    ]
    for each in outputs:
        assert len(each.hidden_states) == config.n_layer + 1
        assert [x.shape for x in each.attentions] == config.n_layer * [
            (batch, config.n_head, time, time)
        ]
    assert_close(*([each.logits.detach()[real]] for each in outputs), times=3.0)
    values = [shown(each, real) for each in outputs]
    states = config.n_layer + 1
    for part in (slice(states), slice(states, None)):  # of other sizes
        assert_close(*([x.detach() for x in each[part]] for each in values), times=3.0)
    ways = directions(values[0])
    for each in values:
        total = sum((x * way.to(x.dtype)).sum() for x, way in zip(each, ways, strict=True))
        total.backward()
    assert_same_gradients(found)


@pytest.mark.parametrize("training", [False, True])
def test_hidden_states_compile_into_one_graph(training):
    found = [model.train(training) for model in models(6)]
    ids = torch.randint(found[0].config.vocab_size, (2, 9))
    compiled = torch.compile(found[0], fullgraph=True, backend="aot_eager")
    outputs = [
        model(ids, labels=ids, output_hidden_states=True) for model in (compiled, *found[1:])
    ]
    assert_close(*([x.detach() for x in each.hidden_states] for each in outputs), times=3.0)
    ways = directions(outputs[0].hidden_states)
    for each in outputs:
        total = each.loss
        for x, way in zip(each.hidden_states, ways, strict=True):
            total = total + (x * way.to(x.dtype)).sum()
        total.backward()
    assert_same_gradients(found)
    with torch.no_grad():
        found = [model(ids, output_hidden_states=True) for model in (compiled, *found[1:])]
    assert_close(*(list(each.hidden_states) for each in found), times=3.0)


def test_attention_weights_compile_into_one_graph():
    found = models(6)
    ids = torch.randint(found[0].config.vocab_size, (2, 9))
    compiled = torch.compile(found[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        outputs = [model(ids, **ASKED) for model in (compiled, *found[1:])]
    assert_close(*(list(each.attentions) for each in outputs), times=3.0)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_values_beside_a_cache_equal_transformers(padding, watched):
    found = models(4, n_positions=40, n_layer=3)
    config = found[0].config
    ids = torch.randint(config.vocab_size, (3, 17))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, :4] = 0
    if padding == "holes":
        mask[1, 2:5] = 0
        mask[1, 9] = 0
        mask[2, 12] = 0
    if watched:
        for model in found:
            stack = getattr(model, "transformer", model)
            stack.h[1].register_forward_hook(lambda module, inputs, output: output * 1.1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [None, None, None]
    for begin, end in ((0, 6), (6, 7), (7, 13), (13, 17)):
        with torch.no_grad():
            outputs = [
                model(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                    use_cache=True,
                    **ASKED,
                )
                for model, cache in zip(found, caches, strict=True)
            ]
        caches = [each.past_key_values for each in outputs]
        real = mask[:, begin:end].bool()
        assert outputs[0].attentions[0].shape == (3, config.n_head, end - begin, end)
        values = [shown(each, real) for each in outputs]
        for part in (slice(config.n_layer + 1), slice(config.n_layer + 1, None)):
            assert_close(*(each[part] for each in values), times=3.0)


@pytest.mark.parametrize("name", ["wte", "drop", "h.1", "h.1.attn", "h.1.mlp.c_proj", "ln_f"])
def test_hooks_change_what_they_change_in_transformers(name):
    found = models(7, n_layer=3)
    ids = torch.randint(found[0].config.vocab_size, (2, 7))
    for model in found:
        module = getattr(model, "transformer", model).get_submodule(name)

        def hook(module, inputs, output):
            if isinstance(output, tuple):  # transformers' attention returns its weights as well
                return (output[0] * 1.3 + 0.1, *output[1:])
            return output * 1.3 + 0.1

        module.register_forward_hook(hook)
    with torch.no_grad():
        outputs = [model(ids, **ASKED) for model in found]
    real = torch.ones(2, 7).bool()
    assert_close(*(shown(each, real) for each in outputs), times=3.0)


def test_weights_are_those_after_dropout():
    config = GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.4,
    )  # fmt: skip
    model = with_random_weights(config, 0)
    ids = torch.randint(61, (2, 20))
    expected = model(ids, output_attentions=True).attentions[0]
    dropped = model.train()(ids, output_attentions=True).attentions[0]
    kept = dropped != 0
    lower = torch.ones(20, 20).tril().bool().expand_as(kept)
    assert 0.5 < kept[lower].float().mean() < 0.7
    assert torch.allclose(dropped[kept], expected[kept] / 0.6, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_neither_values_nor_gradients(dropout):
    config = GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=3, n_head=3, dropout=dropout
    )
    model = with_random_weights(config, 0).train()
    ids = torch.randint(61, (2, 9))
    found = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        output = model(ids, labels=ids, **ASKED)
        values = [*output.hidden_states, *output.attentions]
        total = output.loss
        for x, way in zip(values, directions(values), strict=True):
            total = total + (x * way.to(x.dtype)).sum()
        found.append([*values, *torch.autograd.grad(total, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_what_is_asked_for_is_returned():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 5))
    output = model(ids, labels=ids, **ASKED)
    assert output.keys() == ["loss", "logits", "hidden_states", "attentions"] == list(output)
    assert output[2] is output["hidden_states"] is output.hidden_states
    assert output.to_tuple()[3] is output.attentions is output.values()[3] is output[-1]
    assert dict(output).keys() == dict(output.items()).keys() and len(output) == 4
    assert output.get("past_key_values") is None and output.get("cache", 7) == 7
    assert output.past_key_values is None is output.cache
    with pytest.raises(KeyError):
        output["past_key_values"]
    output = model(ids, output_hidden_states=False, output_attentions=False)
    assert output.keys() == ["logits"]
    assert output.hidden_states is None and output.attentions is None
    output = model(ids, use_cache=True, output_attentions=True)
    assert output.keys() == ["logits", "past_key_values", "attentions"]


@pytest.mark.parametrize("asked", [2, -1, [0, 2], [-3], [1, 1], (0, -1), []])
@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_by_index_are_those_of_transformers(asked, padded):
    found = models(6, n_layer=2)
    ids = torch.randint(found[0].config.vocab_size, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, : 2 * padded] = 0
    options = {"attention_mask": mask, "use_cache": padded, "output_hidden_states": asked}
    with torch.no_grad():
        outputs = [model(ids, **options) for model in found]
        whole = found[0](ids, **{**options, "output_hidden_states": True}).hidden_states
    states = [each.hidden_states for each in outputs]
    if not asked:
        assert states[:2] == [None, None]
        return
    assert [x is None for x in states[0]] == [x is None for x in states[1]]
    indices = {asked} if isinstance(asked, int) else {*asked}
    assert sum(x is not None for x in states[0]) == len(indices)
    real = mask.bool()
    assert_close(*([x[real] for x in each if x is not None] for each in states), times=3.0)
    pairs = [(x, y) for x, y in zip(states[0], whole, strict=True) if x is not None]
    for x, y in pairs:
        torch.testing.assert_close(x[real], y[real], rtol=1e-4, atol=1e-5)


def test_the_config_says_what_a_call_does_not():
    shape = {**SMALL.to_dict(), "output_hidden_states": True, "output_attentions": True}
    asking = GPT2Config.from_dict(shape)
    model = with_random_weights(asking, 0).eval()
    ids = torch.randint(61, (2, 5))
    assert model(ids).keys() == ["logits", "hidden_states", "attentions"]
    assert model(ids, output_attentions=False).keys() == ["logits", "hidden_states"]
    assert model(ids, output_hidden_states=[-1]).hidden_states[0] is None
    theirs = model.to_hf().eval()
    theirs.set_attn_implementation("eager")
    assert [*theirs(ids, use_cache=False)] == [*model(ids), "cross_attentions"]
    assert GPT2.from_hf(theirs).config == asking
    some = GPT2Config.from_dict({**SMALL.to_dict(), "output_hidden_states": [1, -1]})
    assert some.to_dict()["output_hidden_states"] == [1, -1] and hash(some)
    states = with_random_weights(some, 0)(ids).hidden_states
    assert [x is None for x in states] == [True, False, False]
    assert not {"output_hidden_states", "output_attentions"} & SMALL.to_dict().keys()
    none = GPT2Config.from_dict({"output_hidden_states": None, "output_attentions": None})
    assert none == GPT2Config()
    for name, wrong in (("output_hidden_states", "yes"), ("output_attentions", 2)):
        with pytest.raises(ConfigError, match=f"{name}=.* must be true"):
            GPT2Config.from_dict({name: wrong})


def test_what_reads_logits_asks_for_no_more_whatever_the_config_says():
    """Ragged rows in a cache have no attention weights by column: generation must not ask."""
    shape = {**SMALL.to_dict(), "output_hidden_states": True, "output_attentions": True}
    model = with_random_weights(GPT2Config.from_dict(shape), 0).eval()
    plain = with_random_weights(SMALL, 0).eval()
    ids, mask = torch.randint(60, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for each in (model, plain):
        each.register_forward_hook(lambda *call: None)
    texts = [each.generate(ids, mask, max_new_tokens=5) for each in (model, plain)]
    assert texts[0].tolist() == texts[1].tolist()


def test_return_dict_false_is_a_tuple():
    model = with_random_weights(SMALL, 0).eval()
    theirs = model.to_hf().eval()
    ids = torch.randint(61, (2, 5))
    for options in ({}, {"labels": ids}, {"output_hidden_states": True, "labels": ids}):
        found = model(ids, return_dict=False, **options)
        expected = theirs(ids, return_dict=False, use_cache=False, **options)
        assert type(found) is type(expected) is tuple and len(found) == len(expected)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        for value in (True, None):
            assert model(ids, return_dict=value, **options).keys() == model(ids, **options).keys()
    # A tuple goes where an object of ours does not.
    exported = torch.export.export(model, (ids,), {"return_dict": False}).module()
    torch.testing.assert_close(exported(ids, return_dict=False)[0], model(ids).logits)
    packed = model.pack()
    logits = packed(ids, return_dict=False)
    assert type(logits) is tuple and torch.equal(logits[0], packed(ids).logits)


def test_attention_is_fused_unless_its_weights_are_asked_for():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 5))
    with record_calls() as calls:
        model(ids, output_hidden_states=True)
    assert sum(call.op == "causal_attention" for call in calls) == 2
    with record_calls() as calls:
        model(ids, output_attentions=True)
    assert not any(call.op == "causal_attention" for call in calls)


def test_what_cannot_be_given_is_named():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 5))
    with pytest.raises(ArgumentError, match=r"index 3; there are 3 of them.*give -3 to 2"):
        model(ids, output_hidden_states=[0, 3])
    with pytest.raises(ArgumentError, match=r"0 asks for nothing in transformers: give \[0\]"):
        model(ids, output_hidden_states=0)
    with pytest.raises(ArgumentError, match="output_hidden_states='all' is neither"):
        model(ids, output_hidden_states="all")
    with pytest.raises(ArgumentError, match=r"output_attentions=\[1\] is not True"):
        model(ids, output_attentions=[1])
    cache = model.new_cache(2)
    model(ids, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), cache=cache)
    with pytest.raises(ArgumentError, match="rows of the cache differ in length"):
        model(ids[:, :1], cache=cache, output_attentions=True)

    class Silent(torch.nn.Module):
        def forward(self, x, mask=None, cache=None, weights=None):
            return x

    model.h[1].attn = Silent()
    with pytest.raises(ArgumentError, match=r"attention of h\.1 told no weights"):
        model(ids, output_attentions=True)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 3
