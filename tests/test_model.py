"""The model against transformers' GPT2LMHeadModel with the same weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from differential import (
    random_config,
    random_mask,
    tokens_away_from_kinks,
    transformers_twin,
    with_random_weights,
)
from gpt2fast import GPT2, PRESETS, GPT2Config, backend
from gpt2fast.config import ACTIVATIONS
from gpt2fast.errors import ArgumentError, ConfigError, GenerationError
from gpt2fast.ops import activations
from gpt2fast.ops.backend import record_calls
from tolerance import assert_close

SMALL = GPT2Config(
    vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, dropout=0.0, eos_token_id=60
)


@pytest.mark.parametrize("seed", range(60))
def test_logits_loss_and_gradients_equal_transformers(seed):
    config = random_config(seed)
    ours = with_random_weights(config, seed)
    theirs = transformers_twin(ours)
    exact = transformers_twin(ours).double()
    batch, time = 1 + seed % 3, 2 + seed % 21
    mask = None if seed % 4 == 0 else random_mask(seed, batch, time)
    ids = tokens_away_from_kinks(exact, batch, time, mask)
    labels = ids.clone()
    if mask is None:
        real = torch.ones_like(ids).bool()
        labels[0, : time // 3] = -100
    else:
        # A masked position's own logits are unspecified, so nothing is to be predicted there.
        real = mask.bool()
        labels[:, 1:][~real[:, :-1]] = -100
        labels[~real] = -100
        if not (labels[:, 1:] != -100).any():
            labels = None
    models = (ours, theirs, exact)
    found = [model(ids, attention_mask=mask, labels=labels) for model in models]
    assert_close(*([each.logits.detach()[real]] for each in found), times=3.0)
    if labels is None:
        return
    assert_close(*([each.loss.detach()] for each in found), times=3.0)
    for each in found:
        each.loss.backward()
    names = [name for name, _ in ours.named_parameters()]
    gradients = []
    for model in models:
        parameters = {n.removeprefix("transformer."): p for n, p in model.named_parameters()}
        gradients.append([parameters[name].grad for name in names])
    assert_close(*gradients, times=3.0)


@pytest.mark.parametrize("name", PRESETS)
def test_the_four_real_sizes_build_and_match(name):
    config = GPT2Config.preset(name)
    model = GPT2(config, device="meta").to_empty(device="cpu").eval()
    counts = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    assert sum(p.numel() for p in model.parameters()) == counts[name] == config.parameter_count
    # Drawing 1.5 billion normal values takes longer than the test: repeat a million of them.
    values = torch.randn((1 << 20) + 7) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), values.numel()):
                part = flat[start : start + values.numel()]
                part.copy_(values[: part.numel()])
        ids = torch.randint(config.vocab_size, (2, 6))
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
        mine = model(ids, attention_mask=mask).logits
        other = transformers_twin(model)(ids, attention_mask=mask).logits
    assert (mine - other)[mask.bool()].abs().max() < 1e-4


def test_bfloat16_is_as_accurate_as_transformers():
    config = random_config(5, n_layer=4, activation_function="gelu_new")
    exact_model = with_random_weights(config, 5)
    with torch.no_grad():
        for parameter in exact_model.parameters():
            parameter.copy_(parameter.bfloat16())
    exact_model.double()
    ids = torch.randint(config.vocab_size, (4, 20))
    with torch.no_grad():
        exact = exact_model(ids).logits
        model = exact_model.bfloat16()
        ours, theirs = model(ids).logits, transformers_twin(model)(ids).logits
    assert_close([ours], [theirs], [exact], times=3.0)


@pytest.mark.parametrize("seed", range(12))
def test_a_cache_changes_nothing(seed):
    config = random_config(seed)
    model = with_random_weights(config, seed)
    ids = torch.randint(config.vocab_size, (3, 20))
    mask = random_mask(seed, 3, 20)
    mask[:, 15:] = 1
    cache = model.new_cache(3, 20)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        parts = [model(ids[:, :9], attention_mask=mask[:, :9], cache=cache).logits]
        parts.append(model(ids[:, 9:17], attention_mask=mask[:, 9:17], cache=cache).logits)
        for step in range(17, 20):
            parts.append(model.decode_step(ids[:, step], cache)[:, None])
    assert (torch.cat(parts, 1) - whole)[mask.bool()].abs().max() < 2e-5
    assert cache.lengths.tolist() == mask.sum(1).tolist()


def test_initial_weights_have_transformers_statistics():
    config = GPT2Config(vocab_size=512, n_positions=256, n_embd=128, n_layer=8, n_head=4)
    model = GPT2(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            scaled = name.endswith("c_proj.weight")
            expected = 0.02 / (2 * config.n_layer) ** 0.5 if scaled else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.03, name


def test_dropout_acts_in_training_only_and_at_each_of_its_places():
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        chances = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, field: 0.5}
        model = GPT2(dataclasses.replace(SMALL, dropout=None, **chances))
        ids = torch.randint(61, (2, 8))
        torch.manual_seed(1)
        first = model(ids).logits
        torch.manual_seed(1)
        assert torch.equal(first, model(ids).logits)
        assert not torch.equal(first, model(ids).logits), field
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_gradient_checkpointing_changes_no_gradient():
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=3, n_head=3, dropout=0.2)
    model = GPT2(config)
    ids = torch.randint(61, (2, 16))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        loss = model(ids, labels=ids).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_targets_are_labels_already_shifted():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 9))
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.allclose(model(ids, labels=ids).loss, model(ids, targets=shifted).loss)
    with pytest.raises(ValueError, match="not both"):
        model(ids, labels=ids, targets=ids)


def test_logits_read_late_are_those_of_the_forward_pass():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 9))
    expected = model(ids).logits
    with torch.inference_mode():
        out = model(ids, labels=ids)
    assert torch.allclose(out.logits, expected, atol=1e-6) and not out.logits.requires_grad
    with torch.no_grad():
        out = model(ids, labels=ids)
    assert torch.allclose(out.logits, expected, atol=1e-6) and not out.logits.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        out, at_once = model(ids, labels=ids), model(ids).logits
    assert out.logits.dtype == torch.bfloat16 and torch.equal(out.logits, at_once)
    out = model(ids, labels=ids)
    with torch.no_grad():
        model.wte.weight.mul_(2.0)
    with pytest.raises(ArgumentError, match="before the optimizer"):
        _ = out.logits


def test_a_step_takes_more_rows_than_the_model_has_positions():
    model = with_random_weights(SMALL, 0)
    tokens = torch.randint(61, (40, 2))
    cache = model.new_cache(40, 4)
    with torch.no_grad():
        model(tokens[:, :1], cache=cache)
        step = model.decode_step(tokens[:, 1], cache)
        assert torch.allclose(step, model(tokens).logits[:, 1], atol=1e-5)


def test_a_step_leaves_no_graph_behind():
    model = with_random_weights(SMALL, 0)
    cache = model.new_cache(2)
    assert not model.decode_step(torch.tensor([1, 2]), cache).requires_grad
    assert not cache.k.requires_grad and not cache.v.requires_grad


def test_hooks_see_what_goes_through_a_block_and_its_projections():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 9))
    expected = model(ids).logits
    seen = {}
    for name in ("h.0", "h.1", "h.1.mlp.c_fc", "h.1.mlp.c_proj", "h.0.attn.c_attn"):

        def hook(module, inputs, output, name=name):
            seen[name] = (inputs[0].shape, output.shape)

        model.get_submodule(name).register_forward_hook(hook)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert seen["h.0"] == seen["h.1"] == ((2, 9, 24), (2, 9, 24))
    assert seen["h.1.mlp.c_fc"] == ((2, 9, 24), (2, 9, 96)) and len(seen) == 5


def test_logits_to_keep_takes_a_count_or_positions():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 9))
    logits = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=2).logits, logits[:, -2:], atol=1e-6)
    positions = torch.tensor([0, 4])
    kept = model(ids, logits_to_keep=positions).logits
    assert torch.allclose(kept, logits[:, positions], atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_model_runs_on_our_ops(activation):
    config = dataclasses.replace(SMALL, activation_function=activation, dropout=None)
    model = with_random_weights(config, 0)
    ids = torch.randint(61, (2, 9))
    with backend("torch"), record_calls() as calls:
        model(ids, labels=ids).loss.backward()
        cache = model.new_cache(2)
        model(ids, cache=cache)
        model.decode_step(ids[:, 0], cache)
    expected = {
        "causal_attention", "causal_attention_backward", "residual_layer_norm",
        "residual_layer_norm_backward", "linear_cross_entropy", "embedding", "embedding_backward",
        "append_to_cache", "attention_with_cache", "decode_step",
    }  # fmt: skip
    if activation == "gelu_new":
        expected |= {"gelu_mlp", "gelu_mlp_backward", "bias_gelu", "bias_gelu_backward"}
    assert expected <= {call.op for call in calls}


def test_reference_and_torch_backends_agree():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 9))
    with backend("reference"):
        reference = model(ids, labels=ids)
    with backend("torch"):
        other = model(ids, labels=ids)
    assert torch.allclose(reference.logits, other.logits, atol=1e-5)
    assert torch.allclose(reference.loss, other.loss, atol=1e-6)


def test_compiles_into_one_graph():
    model = with_random_weights(SMALL, 0)
    ids = torch.randint(61, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=ids).loss
    assert torch.allclose(loss, model(ids, labels=ids).loss)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-6)


def test_bad_input_is_named():
    model = with_random_weights(SMALL, 0)
    with pytest.raises(GenerationError, match=r"33 tokens exceed.*n_positions=32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(GenerationError, match=r"token id 61 .*0 \.\. 60"):
        model(torch.tensor([[61]]))
    with pytest.raises(GenerationError, match=r"token id -1 "):
        model(torch.tensor([[-1]]))
    with pytest.raises(GenerationError, match="at least one token"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(GenerationError, match="attention_mask"):
        model(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 4))
    with pytest.raises(GenerationError, match="position 40 .*n_positions=32"):
        model(torch.zeros(1, 1, dtype=torch.long), position_ids=torch.tensor([[40]]))
    with pytest.raises(GenerationError, match="position -1"):
        model(torch.zeros(1, 1, dtype=torch.long), position_ids=torch.tensor([[-1]]))
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ArgumentError, match=r"labels \(2, 2\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ArgumentError, match="targets hold 61"):
        model(ids, targets=ids + 61)
    with pytest.raises(GenerationError, match="cache has the shape"):
        model(ids, cache=model.new_cache(3))
    with pytest.raises(GenerationError, match="token id 99"):
        model.decode_step(torch.tensor([99]), model.new_cache(1))
    with pytest.raises(ConfigError, match="not dict"):
        GPT2({})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n_layer": "12"}, "n_layer='12'"),
        ({"n_layer": True}, "n_layer=True"),
        ({"n_embd": 0}, "n_embd=0"),
        ({"n_embd": 10**12}, "n_embd=1000000000000"),
        ({"n_embd": 100, "n_head": 7}, "n_head=7"),
        ({"n_inner": 1.5}, "n_inner=1.5"),
        ({"activation_function": "mish"}, "activation_function='mish'"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"resid_pdrop": 1.0}, "resid_pdrop=1.0"),
        ({"resid_pdrop": -0.1}, "resid_pdrop=-0.1"),
        ({"attn_pdrop": float("nan")}, "attn_pdrop=nan"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon=0.0"),
        ({"initializer_range": "small"}, "initializer_range='small'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
        ({"eos_token_id": "end"}, "eos_token_id='end'"),
        ({"model_type": "llama"}, "model_type='llama'"),
    ],
)
def test_bad_configurations_are_named(values, named):
    with pytest.raises(ConfigError) as error:
        GPT2Config.from_dict(values, source="folder/config.json")
    assert str(error.value).startswith("folder/config.json: ") and named in str(error.value)


def test_configurations_round_trip_and_ignore_other_fields():
    config = random_config(3)
    assert GPT2Config.from_dict(config.to_dict() | {"torch_dtype": "float32"}) == config
    assert GPT2Config(dropout=0.3) == GPT2Config(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    with pytest.raises(ConfigError, match="resid_pdrop=1.5"):
        GPT2Config(dropout=1.5)
    with pytest.raises(ConfigError, match="gpt2-xl"):
        GPT2Config.preset("gpt3")


def test_ops_have_the_activations_that_a_configuration_may_name():
    assert tuple(activations.ACTIVATIONS) == ACTIVATIONS
