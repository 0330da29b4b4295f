"""Embeddings in place of ids, and token types, as transformers' GPT2LMHeadModel takes them."""

from __future__ import annotations

import pytest
import torch

from differential import random_mask, with_random_weights
from gpt2fast import GPT2Config
from gpt2fast.errors import ArgumentError, GenerationError
from model_pairs import DTYPES, assert_same_gradients, leaf_of, models
from tolerance import assert_close

SMALL = GPT2Config(
    vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, dropout=0.0, eos_token_id=60
)
KINDS = ["embeddings", "ids and types", "embeddings and types"]


def given(kind, seed, batch, time, width, vocab):
    """Keyword arguments as functions of a model, which has its own copy of the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (batch, time), generator=generator)
    types = torch.randint(vocab, (batch, time), generator=generator)
    embeds = torch.randn(batch, time, width, generator=generator) * 0.3

    def of(model):
        values = {}
        if "embeddings" in kind:
            values["inputs_embeds"] = leaf_of(embeds, model)
        else:
            values["input_ids"] = ids
        if "types" in kind:
            values["token_type_ids"] = types
        return values

    return of, ids


def predictable(ids, mask):
    """Labels at which nothing is predicted from a masked position."""
    labels = ids.clone()
    if mask is not None:
        labels[mask == 0] = -100
        labels[:, 1:][mask[:, :-1] == 0] = -100
        if not (labels[:, 1:] != -100).any():
            return None
    return labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_logits_loss_and_gradients_equal_transformers(seed, kind, dtype):
    found = models(seed, dtype)
    config = found[0].config
    batch, time = 1 + seed % 3, [1, 17, 5, 24][seed % 4]
    mask = random_mask(seed, batch, time) if seed % 2 else None
    real = torch.ones(batch, time).bool() if mask is None else mask.bool()
    positions = (real.long().cumsum(1) - 1).clamp(min=0) if seed % 3 else None
    of, ids = given(kind, seed, batch, time, config.n_embd, config.vocab_size)
    arguments = [of(model) for model in found]
    labels = predictable(ids, mask) if time > 1 else None
    common = {"attention_mask": mask, "position_ids": positions, "labels": labels}
    outputs = [model(**values, **common) for model, values in zip(found, arguments, strict=True)]
    assert_close(*([each.logits.detach()[real]] for each in outputs), times=3.0)
    if labels is None:
        losses = [each.logits[real].square().mean() for each in outputs]
    else:
        losses = [each.loss for each in outputs]
        assert_close(*([loss.detach()] for loss in losses), times=3.0)
    for loss in losses:
        loss.backward()
    leaves = [
        [values["inputs_embeds"]] if "inputs_embeds" in values else [] for values in arguments
    ]
    assert_same_gradients(found, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind):
    found = models(3)
    config = found[0].config
    of, ids = given(kind, 3, 2, 9, config.n_embd, config.vocab_size)
    compiled = torch.compile(found[0], fullgraph=True, backend="aot_eager")
    arguments = [of(model) for model in found]
    outputs = [
        model(**values, labels=ids)
        for model, values in zip((compiled, *found[1:]), arguments, strict=True)
    ]
    assert_close(*([each.loss.detach()] for each in outputs), times=3.0)
    for each in outputs:
        each.loss.backward()
    leaves = [[x for x in values.values() if x.is_floating_point()] for values in arguments]
    assert_same_gradients(found, leaves)
    with torch.no_grad():
        logits = [
            model(**values).logits
            for model, values in zip((compiled, *found[1:]), arguments, strict=True)
        ]
    assert_close(*([each] for each in logits), times=3.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["wte", "wpe", "drop", "h.0", "h.0.mlp", "ln_f"])
def test_hooks_see_and_change_what_they_do_in_transformers(name, kind):
    found = models(5)
    config = found[0].config
    of, ids = given(kind, 5, 2, 7, config.n_embd, config.vocab_size)
    seen = [[], [], []]
    for model, calls in zip(found, seen, strict=True):
        module = getattr(model, "transformer", model).get_submodule(name)

        def hook(module, inputs, output, calls=calls):
            calls.append(output.detach())
            return output * 1.3 + 0.1

        module.register_forward_hook(hook)
    outputs = [model(**of(model), labels=ids) for model in found]
    assert len(seen[0]) == len(seen[1])
    for calls in zip(*seen, strict=True):
        assert_close(*([each.expand_as(calls[1])] for each in calls), times=3.0)
    assert_close(*([each.logits.detach()] for each in outputs), times=3.0)
    for each in outputs:
        each.loss.backward()
    assert_same_gradients(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing(kind):
    found = models(2, n_positions=40)
    config = found[0].config
    of, _ = given(kind, 2, 3, 19, config.n_embd, config.vocab_size)
    mask = torch.ones(3, 19, dtype=torch.int64)
    mask[0, :4] = 0
    mask[1, 2:5] = 0
    with torch.no_grad():
        whole = [model(**of(model), attention_mask=mask).logits for model in found]
        cache, parts = found[0].new_cache(3, 19), []
        for begin, end in ((0, 8), (8, 9), (9, 19)):
            values = {name: x[:, begin:end] for name, x in of(found[0]).items()}
            parts.append(found[0](**values, attention_mask=mask[:, begin:end], cache=cache).logits)
    real = mask.bool()
    assert_close(*([x[real]] for x in (torch.cat(parts, 1), *whole[1:])), times=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = with_random_weights(SMALL, 0).train()
    of, ids = given(kind, 0, 2, 9, 24, 61)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        loss = model(**of(model), labels=ids).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_positions_of_one_row_serve_all():
    found = models(1)
    ids = torch.randint(found[0].config.vocab_size, (3, 6))
    positions = torch.tensor([[3, 4, 5, 7, 8, 9]])
    logits = [model(ids, position_ids=positions).logits.detach() for model in found]
    assert_close(*([each] for each in logits), times=3.0)


def test_embeddings_of_the_ids_are_the_ids():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 9))
    assert_close(
        [model(inputs_embeds=model.wte(ids)).logits.detach()],
        [model(ids).logits.detach()],
        [model.double()(ids).logits.detach()],
        times=3.0,
    )


def test_autocast_takes_embeddings_in_its_dtype():
    model = with_random_weights(SMALL, 0)
    embeds = torch.randn(2, 5, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs_embeds=embeds).logits
    with torch.no_grad():
        exact = model.double()(inputs_embeds=embeds.double()).logits
    assert (logits - exact).norm() < 0.05 * exact.norm()
    with pytest.raises(ArgumentError, match=r"bfloat16 .*model's embeddings torch.float64"):
        model(inputs_embeds=embeds)


def test_what_does_not_fit_is_named():
    model = with_random_weights(SMALL, 0)
    ids, embeds = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 24)
    with pytest.raises(ArgumentError, match="one of input_ids and inputs_embeds, not both"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ArgumentError, match="one of input_ids and inputs_embeds, not neither"):
        model(attention_mask=torch.ones(2, 3))
    with pytest.raises(ArgumentError, match=r"width=24.*not \(2, 3, 23\)"):
        model(inputs_embeds=embeds[..., :23])
    with pytest.raises(ArgumentError, match=r"width=24.*not \(3, 24\)"):
        model(inputs_embeds=embeds[0])
    with pytest.raises(ArgumentError, match=r"token_type_ids \(2, 2\).*inputs_embeds \(2, 3\)"):
        model(inputs_embeds=embeds, token_type_ids=ids[:, :2])
    with pytest.raises(GenerationError, match="token id 61"):
        model(ids, token_type_ids=ids + 61)
    with pytest.raises(GenerationError, match=r"\(2, 4\).*shape of inputs_embeds \(2, 3\)"):
        model(inputs_embeds=embeds, attention_mask=torch.ones(2, 4))
    with pytest.raises(GenerationError, match="33 tokens exceed"):
        model(inputs_embeds=torch.zeros(1, 33, 24))
    with pytest.raises(ArgumentError, match=r"labels \(2, 2\).*inputs_embeds"):
        model(inputs_embeds=embeds, labels=ids[:, 1:])


def test_masks_that_are_added_to_scores_are_refused():
    model = models(3)[0]
    ids = torch.randint(model.config.vocab_size, (1, 7))
    added = torch.zeros(1, 7).index_fill(1, torch.tensor([0]), float("-inf"))
    with pytest.raises(GenerationError, match="negative numbers"):
        model(ids, attention_mask=added)
    model(ids, attention_mask=(added == 0).float())
