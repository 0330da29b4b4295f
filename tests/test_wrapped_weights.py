"""GPT-2s with other heads, within other modules, in other dicts: found, or refused by name."""

from __future__ import annotations

import argparse
import logging
import random
from collections import OrderedDict, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gpt2fast import GPT2, GPT2Config
from gpt2fast.checkpoints.tensor_files import read_torch, write_safetensors
from gpt2fast.errors import WeightsError
from small_checkpoints import TINY, assert_same_parameters, random_model, tokens, write_config


@pytest.fixture
def left_out(caplog):
    """The tensors that loading left out, by its log; at most one message."""
    caplog.set_level(logging.WARNING, logger="gpt2fast")

    def said() -> str:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        assert len(messages) <= 1
        return messages[0].partition("left out what is not GPT-2's: ")[2] if messages else ""

    return said


def load_state(folder, state, suffix="pt", config=TINY) -> GPT2:
    # Never over a file that an earlier model is mapped from.
    path = folder / f"weights-{len(list(folder.iterdir()))}.{suffix}"
    if suffix == "safetensors":
        write_safetensors(path, {name: tensor.contiguous() for name, tensor in state.items()})
    else:
        torch.save(state, path)
    write_config(folder, config)
    return GPT2.from_pretrained(path)


def transformers_config(**changes):
    import transformers

    return transformers.GPT2Config(**{**TINY.to_dict(), "pad_token_id": 0, **changes})


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


HEADS = {
    "GPT2Model": [],
    "GPT2LMHeadModel": [],
    "GPT2DoubleHeadsModel": ["multiple_choice_head.summary.weight", "(1, 24)"],
    "GPT2ForSequenceClassification": ["score.weight (5, 24)"],
    "GPT2ForTokenClassification": ["classifier.weight (5, 24)", "classifier.bias (5,)"],
    "GPT2ForQuestionAnswering": ["qa_outputs.weight (2, 24)", "qa_outputs.bias (2,)"],
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("saved", ["save_pretrained", "torch.save"])
def test_the_body_of_every_class_of_transformers_loads(tmp_path, head, saved, left_out):
    import transformers

    config = transformers_config(num_labels=1 if "Double" in head else 5)
    if head == "GPT2ForQuestionAnswering":
        config.num_labels = 2
    theirs = randomize(getattr(transformers, head)(config))
    if saved == "save_pretrained":
        theirs.save_pretrained(tmp_path)
        model = GPT2.from_pretrained(tmp_path)
    else:
        model = load_state(tmp_path, theirs.state_dict())
    said = left_out()
    assert all(name in said for name in HEADS[head]) and bool(said) == bool(HEADS[head])
    body = theirs if head == "GPT2Model" else theirs.transformer
    with torch.no_grad():
        hidden = body(tokens()).last_hidden_state
        expected = F.linear(hidden, body.wte.weight)
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "transformer.", "policy.model.transformer."])
@pytest.mark.parametrize(
    "head", ["v_head.summary", "score", "classifier.dense", "value_head.0", "reward_head"]
)
def test_heads_beside_any_spelling_are_left_out_by_name(tmp_path, prefix, head, left_out):
    model = random_model()
    outer = prefix.removesuffix("transformer.")
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state |= {f"{outer}{head}.weight": torch.ones(1, 24), f"{outer}{head}.bias": torch.ones(1)}
    for suffix in ("pt", "safetensors"):
        assert_same_parameters(load_state(tmp_path, state, suffix), model)
        said = left_out()
        assert f"{outer}{head}.weight (1, 24)" in said and f"{outer}{head}.bias (1,)" in said


def test_what_may_change_the_body_is_refused(tmp_path):
    state = random_model().state_dict()
    for name in (
        "emb_ln.weight",
        "value_embeds.0",
        "transformer.wtte.weight",
        "h.1.attn.q_norm.weight",
        "h.2.x",
    ):
        prefixed = {f"transformer.{n.removeprefix('transformer.')}": t for n, t in state.items()}
        prefixed[f"transformer.{name.removeprefix('transformer.')}"] = torch.ones(24)
        with pytest.raises(WeightsError, match="1 unexpected"):
            load_state(tmp_path, prefixed)
        with pytest.raises(WeightsError, match="1 unexpected"):
            load_state(tmp_path, {**state, name.removeprefix("transformer."): torch.ones(24)})


# Wrappers


def random_name(generator: random.Random) -> str:
    return generator.choice(["_", ""]) + "".join(generator.choices("abdefgiklmnopqrstu", k=6))


@pytest.mark.parametrize("seed", range(12))
def test_wrappers_of_any_name_in_any_place(tmp_path, seed, left_out):
    """Modules that wrap the whole, the body, blocks, or single modules within; a head outside."""
    generator = random.Random(seed)
    name = lambda: random_name(generator)  # noqa: E731
    outer = "".join(f"{name()}." for _ in range(generator.randint(0, 4)))
    body = generator.choice(["", "transformer.", f"{name()}.{name()}."])
    block, inner, within = (generator.choice(["", f"{name()}."]) for _ in range(3))
    model = random_model(replace(TINY, tie_word_embeddings=False, dropout=None))
    state = {}
    for key, tensor in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "h":
            parts[1] += "." + block
            parts[2] += "." + inner
        place = outer if parts[0] == "lm_head" else outer + body
        key = place + ".".join(parts[:-1]) + "." + within + parts[-1]
        state[key.replace("..", ".")] = tensor
    if body:
        state[f"{outer}{name()}.weight"] = torch.ones(3, 24)
    assert_same_parameters(load_state(tmp_path, state, config=model.config), model)
    assert bool(left_out()) == bool(body)


class Trained(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.gpt = model
        self.loss = nn.Linear(3, 3)


def test_what_torch_wraps_around_a_model(tmp_path):
    from transformers import GPT2LMHeadModel

    theirs = randomize(GPT2LMHeadModel(transformers_config()))
    plain = load_state(tmp_path, theirs.state_dict())
    for wrapped in (
        nn.DataParallel(theirs),
        torch.compile(theirs),
        nn.DataParallel(torch.compile(Trained(theirs))),
        torch.optim.swa_utils.AveragedModel(theirs),
    ):
        assert_same_parameters(load_state(tmp_path, wrapped.state_dict()), plain)
    for block in theirs.transformer.h:
        block.attn = torch.compile(block.attn)
        block.mlp.c_fc = checkpoint_wrapper(block.mlp.c_fc)
    theirs.transformer.wte = nn.Sequential(theirs.transformer.wte)
    theirs.lm_head = nn.Sequential(theirs.lm_head)
    theirs.transformer.h[1] = nn.Sequential(theirs.transformer.h[1])
    state = theirs.state_dict()
    assert {"lm_head.0.weight", "transformer.h.1.0.ln_1.weight"} < state.keys()
    assert_same_parameters(load_state(tmp_path, state), plain)


def test_settings_beside_the_tensors_do_not_matter(tmp_path):
    model = random_model()
    content = {
        "args": argparse.Namespace(lr=1e-3, path=Path("/data/x"), nested=argparse.Namespace(a=1)),
        "again": {"path": Path("/data/x"), "size": torch.Size([2, 3])},
        "best": numpy.float64(1.5),
        "numbers": [numpy.float32(2), numpy.int64(-3), numpy.bool_(True), numpy.float64(1.5)],
        "random": (numpy.random.RandomState(0).get_state(), torch.get_rng_state()),
        "counts": defaultdict(list, {"x": [1]}),
        "model": model.state_dict(),
    }
    assert_same_parameters(load_state(tmp_path, content), model)
    torch.save(content, tmp_path / "x.pt")
    read = read_torch(tmp_path / "x.pt")
    assert (read["best"], read["numbers"]) == (1.5, [2.0, -3, True, 1.5])
    assert read["counts"] == {"x": [1]}


def test_a_checkpoint_as_deepspeed_writes_it(tmp_path):
    """The entries of mp_rank_00_model_states.pt (runtime/engine.py, _save_checkpoint)."""
    model = random_model()
    state = OrderedDict((f"transformer.{n}", t.half()) for n, t in model.state_dict().items())
    content = {
        "module": state,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in state.items())],
        "frozen_param_shapes": None,
        "shared_params": OrderedDict({"lm_head.weight": "transformer.wte.weight"}),
        "frozen_param_fragments": None,
        "lr_scheduler": {"last_batch_iteration": 9, "max_lr": [1e-3]},
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": {"transformer.wte"},
        "skipped_steps": 0,
        "global_steps": 10,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}},
        "ds_version": "0.15.4",
        "epoch": numpy.int64(3),
    }
    loaded = load_state(tmp_path, content)
    assert_same_parameters(loaded, model.half())


def test_adapters_that_are_not_merged_are_refused_and_merged_ones_load(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    theirs = randomize(GPT2LMHeadModel(transformers_config()))
    adapted = get_peft_model(
        theirs, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )
    with pytest.raises(WeightsError, match="merge_and_unload"):
        load_state(tmp_path, adapted.state_dict())
    adapted.merge_adapter()
    merged = {f"base_model.model.{n}": t for n, t in adapted.unload().state_dict().items()}
    with torch.no_grad():
        expected = theirs(tokens()).logits
    ours = load_state(tmp_path, merged)(tokens()).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "keys", [["state_dict"], ["module"], ["net"], ["app", "weights"], ["a", "b", "c"], []]
)
def test_dicts_of_any_name_around_the_tensors(tmp_path, keys, legacy, left_out):
    model = random_model()
    content = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    content |= {"module.criterion.weight": torch.ones(4)} if keys else {}
    for key in reversed(keys):
        moments = {f"module.{name}": tensor * 2 for name, tensor in model.state_dict().items()}
        content = {
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "by_name": moments},
            "optimizer_states": [{"state": {}}],
            "exp_avg": dict(moments),
            "epoch": 3,
            "best": torch.tensor(1.5),
            "rng": {"cpu": torch.zeros(8, dtype=torch.uint8)},
            key: content,
            "hyper_parameters": {"lr": 1e-3, "betas": (0.9, 0.95)},
        }
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=not legacy)
    write_config(tmp_path)
    if keys:  # beside a flat GPT-2's own modules this may be anything
        with pytest.raises(WeightsError, match="1 unexpected: criterion.weight"):
            GPT2.from_pretrained(tmp_path / "last.ckpt")
        return
    assert_same_parameters(GPT2.from_pretrained(tmp_path / "last.ckpt"), model)


def test_two_models_in_one_file_are_named(tmp_path, left_out):
    one, other = random_model().state_dict(), random_model().state_dict()
    other = {name: tensor + 1 for name, tensor in other.items()}

    def prefixed(state, prefix):
        return {prefix + name: tensor for name, tensor in state.items()}

    both = prefixed(one, "actor.transformer.") | prefixed(other, "critic.transformer.")
    for state in (both, {"model": one, "ema": other}, {"model": {"a": one}, "b": {"ema": other}}):
        with pytest.raises(WeightsError, match="holds 2 GPT-2s that differ") as caught:
            load_state(tmp_path, state)
        names = ("actor", "critic") if state is both else ("model.", "ema.")
        assert all(name in str(caught.value) for name in names)
    same = prefixed(one, "actor.transformer.") | prefixed(one, "ref.transformer.")
    for state in (same, {"model": one, "ema": dict(one)}):
        assert_same_parameters(load_state(tmp_path, state), random_model())
        assert not left_out()
    # Two that differ outside the blocks alone.
    for name in ("wpe.weight", "ln_f.bias"):
        with pytest.raises(WeightsError, match=f"both mean {name}"):
            load_state(tmp_path, {"model": one, "ema": {**one, name: one[name] + 1}})


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers_config(), transformers_config()
    )
    theirs = randomize(EncoderDecoderModel(config))
    with pytest.raises(WeightsError, match=r"2 GPT-2s that differ: 'encoder\..* 'decoder\."):
        load_state(tmp_path, theirs.state_dict())
    with pytest.raises(WeightsError, match="cross-attention"):
        load_state(tmp_path, theirs.decoder.state_dict())


# The output projection


@pytest.mark.parametrize(
    "name", ["lm_head", "lm_head.decoder", "transformer.lm_head", "lm_head.a.b", "lm_head.0"]
)
def test_the_output_projection_under_any_module(tmp_path, name, left_out):
    model = random_model(replace(TINY, tie_word_embeddings=False, dropout=None))
    body = {f"transformer.{n}": t for n, t in model.state_dict().items() if "lm_head" not in n}
    head = {f"{name}.weight": model.lm_head.weight.detach()}
    for config in (TINY, model.config):  # a stored one that differs counts, as in transformers
        assert_same_parameters(load_state(tmp_path, body | head, config=config), model)
    tied = {f"{name}.weight": body["transformer.wte.weight"].clone()}
    assert load_state(tmp_path, body | tied).config.tie_word_embeddings
    zeros = {f"{name}.bias": torch.zeros(61)}
    assert_same_parameters(load_state(tmp_path, body | head | zeros), model)
    with pytest.raises(WeightsError, match=f"{name}.bias .61,. is an output projection's bias"):
        load_state(tmp_path, body | head | {f"{name}.bias": torch.ones(61)})
    assert not left_out()


def test_what_may_be_an_output_projection_is_not_left_out(tmp_path, left_out):
    body = {f"transformer.{n}": t for n, t in random_model().state_dict().items()}
    embedding = body["transformer.wte.weight"]
    layers = {"lm_head.0.weight": torch.ones(24, 24), "lm_head.1.weight": torch.ones(24)}
    for name in ("output.weight", "lm_head.2.weight", "head.weight"):
        with pytest.raises(WeightsError, match=f"{name} .61, 24. has the shape of an output proj"):
            load_state(tmp_path, body | layers | {name: embedding + 1})
        load_state(tmp_path, body | layers | {name: embedding.clone()})
        assert name in left_out()
    # Where there is one, another matrix of its size is another head.
    tied = {"lm_head.weight": embedding}
    load_state(tmp_path, body | tied | {"aux.weight": embedding + 1})
    assert "aux.weight" in left_out()
    untied = replace(TINY, tie_word_embeddings=False, dropout=None)
    with pytest.raises(WeightsError, match="1 missing: lm_head.weight") as caught:
        load_state(tmp_path, body | {"score.weight": torch.ones(2, 24)}, config=untied)
    assert "1 left out as not GPT-2's: score.weight (2, 24)" in str(caught.value)
    assert "tie_word_embeddings to true" in str(caught.value)
    with pytest.raises(WeightsError, match="both mean lm_head.weight"):
        load_state(
            tmp_path,
            body | {"lm_head.weight": embedding, "transformer.lm_head.weight": embedding + 1},
        )
    # Nor is that of another module taken for this model's.
    for more, reason in (({}, "mtp.lm_head.weight .61, 24. has the shape"), (tied, None)):
        state = body | more | {"mtp.lm_head.weight": embedding + 1}
        if reason is None:
            assert_same_parameters(load_state(tmp_path, state), random_model())
            assert "mtp.lm_head.weight" in left_out()
        else:
            with pytest.raises(WeightsError, match=reason):
                load_state(tmp_path, state)


# Masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 24, 24), (1, 1, 2048, 2048), (5, 5), (1, 7, 7)])
@pytest.mark.parametrize("masked", [(), (1,), (1, 1)])
def test_masks_of_every_size_are_ignored(tmp_path, dtype, shape, masked, left_out):
    model = random_model()
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    for layer in range(TINY.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, dtype=dtype).expand(shape)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.full(masked, -1e4)
    state = {name: tensor.clone() for name, tensor in state.items()}
    assert_same_parameters(load_state(tmp_path, state), model)
    assert not left_out()


def test_layers_that_are_missing_or_too_many_are_named(tmp_path):
    state = random_model(replace(TINY, n_layer=3, dropout=None)).state_dict()
    with pytest.raises(WeightsError, match="12 unexpected: h.2."):
        load_state(tmp_path, {f"a.{name}": tensor for name, tensor in state.items()})
    for lost in (0, 1, 2):
        rest = {f"a.{n}": t for n, t in state.items() if not n.startswith(f"h.{lost}.")}
        config = GPT2Config(**{**state_config(), "n_layer": 3})
        with pytest.raises(WeightsError, match=f"12 missing: h.{lost}."):
            load_state(tmp_path, rest, config=config)
    empty = {name: torch.empty(0) for name in random_model().state_dict()}
    with pytest.raises(WeightsError, match="zero_to_fp32"):
        load_state(tmp_path, {"module": empty})


def state_config() -> dict:
    names = ("vocab_size", "n_positions", "n_embd", "n_head")
    return {name: getattr(TINY, name) for name in names}


def test_a_file_of_another_model_says_so(tmp_path):
    state = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    with pytest.raises(WeightsError, match=r"holds no GPT-2: .*model\.layers\.0\.self_attn"):
        load_state(tmp_path, state)
