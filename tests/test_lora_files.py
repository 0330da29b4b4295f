"""Stored adapters: as PEFT writes them, damaged, of another model, and on the command line."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from gpt2fast import Generator
from gpt2fast.checkpoints.tensor_files import read_tensors, write_safetensors
from gpt2fast.cli.generate import main as generate
from gpt2fast.errors import ArgumentError, WeightsError
from gpt2fast.lora import add_adapters, is_adapted, load_adapter, merge, save_adapter
from gpt2fast.lora.adapters import adapted
from gpt2fast.tokenizer import BPETokenizer
from small_adapters import ALL, CONFIG, adapted_model, random_model, tokens
from tolerance import assert_close


@pytest.fixture
def adapter(tmp_path):
    """A stored adapter of `adapted_model(ALL)`."""
    save_adapter(adapted_model(ALL), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("targets", ["c_attn", ALL, "h.0.attn.c_attn,h.[12].mlp.*"])
def test_stored_adapters_come_back(tmp_path, targets):
    model = adapted_model(targets, dropout=0.25)
    save_adapter(model, tmp_path / "new" / "adapter")
    other = random_model()
    assert sorted(load_adapter(other, tmp_path / "new" / "adapter")) == sorted(adapted(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter)
        assert other.get_parameter(name).requires_grad == parameter.requires_grad
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)
    assert other.h[0].attn.c_attn.dropout == 0.25
    assert not other.h[0].attn.c_attn.training


def test_files_are_as_peft_writes_them(adapter):
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA"
    assert values["task_type"] == "CAUSAL_LM"
    assert (values["r"], values["lora_alpha"], values["bias"]) == (3, 6, "none")
    assert values["fan_in_fan_out"] is True
    assert set(values["target_modules"]) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    stored, _ = read_tensors(adapter / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    block = "base_model.model.transformer.h.2."
    assert shapes[f"{block}attn.c_attn.lora_A.weight"] == (3, 20)
    assert shapes[f"{block}attn.c_attn.lora_B.weight"] == (60, 3)
    assert shapes[f"{block}mlp.c_proj.lora_A.weight"] == (3, 52)
    assert shapes[f"{block}mlp.c_proj.lora_B.weight"] == (20, 3)
    assert len(shapes) == 2 * 4 * 3


def test_targets_of_some_layers_are_written_by_their_whole_names(tmp_path):
    save_adapter(adapted_model("h.[01].mlp.c_fc,c_attn"), tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["attn.c_attn", "h.0.mlp.c_fc", "h.1.mlp.c_fc"]


@pytest.fixture
def with_peft(tmp_path):
    """transformers' form of `random_model()`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    random_model().save_pretrained(tmp_path / "base")
    return transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "lora_alpha": 32},
        {"target_modules": r".*h\.[02]\.(attn|mlp)\.c_proj", "use_rslora": True},
    ],
)
def test_adapters_made_by_peft_load_here(with_peft, tmp_path, options):
    import peft

    theirs = peft.get_peft_model(with_peft, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    model = random_model()
    load_adapter(model, tmp_path / "adapter")
    assert not torch.allclose(model(tokens()).logits, random_model()(tokens()).logits, atol=1e-2)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(tokens()).logits
        assert_close([model(tokens()).logits], [theirs(tokens()).logits], [exact], times=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", ["c_attn", ALL, "h.[02].*.c_proj"])
def test_peft_loads_our_adapters(with_peft, tmp_path, targets):
    import peft

    model = adapted_model(targets)
    save_adapter(model, tmp_path / "adapter", "base")
    theirs = peft.PeftModel.from_pretrained(with_peft, tmp_path / "adapter").eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(tokens()).logits
        assert_close([model(tokens()).logits], [theirs(tokens()).logits], [exact], times=3)
    names = {n for n, module in theirs.named_modules() if hasattr(module, "base_layer")}
    assert names == {f"base_model.model.transformer.{name}" for name in adapted(model)}


def described(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    stored = {name: tensor.clone() for name, tensor in read_tensors(path)[0].items()}
    change(stored)
    write_safetensors(path, stored)


A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: described(f, r=4), "the rank r is 4"),
        (lambda f: described(f, r=10**12), "the rank r is 1000000000000"),
        (lambda f: described(f, r="3"), "r is '3'"),
        (lambda f: described(f, r=True), "r is True"),
        (lambda f: described(f, lora_alpha=0), "alpha is 0"),
        (lambda f: described(f, lora_alpha=[1]), "alpha is [1]"),
        (lambda f: described(f, lora_alpha=10**400), "adapter_config.json"),
        (lambda f: described(f, lora_dropout=1.5), "dropout is 1.5"),
        (lambda f: described(f, peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda f: described(f, use_dora=True), "use_dora is True"),
        (lambda f: described(f, bias="all"), "bias is 'all'"),
        (lambda f: described(f, rank_pattern={"c_attn": 9}), "rank_pattern"),
        (lambda f: described(f, of_next_year={"x": 1}), "of_next_year"),
        (lambda f: described(f, init_lora_weights="pissa"), "'pissa'"),
        (lambda f: described(f, init_lora_weights=["x"]), "init_lora_weights"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "expected a JSON object"),
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "safetensors"),
        (lambda f: tensors(f, lambda t: t.pop(A)), "has lora_B alone"),
        (lambda f: tensors(f, lambda t: t.clear()), "holds no tensors"),
        (lambda f: tensors(f, lambda t: t.update({A: t[A].to(torch.int8)})), "torch.int8"),
        (lambda f: tensors(f, lambda t: t.update({A: t[A][:, :5]})), "(3, 5), but must be (3, 20)"),
        (
            lambda f: tensors(f, lambda t: t.update({A.replace("h.0", "h.9"): t.pop(A)})),
            "lora_B alone",
        ),
        (
            lambda f: tensors(f, lambda t: t.update({A.replace("c_attn", "q_attn"): t[A]})),
            "lora_A alone",
        ),
        (
            lambda f: tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": t[A]})),
            "lm_head.weight",
        ),
    ],
)
def test_adapters_that_cannot_be_used_end_in_one_error(adapter, damage, words):
    damage(adapter)
    model = random_model()
    with pytest.raises(WeightsError) as error:
        load_adapter(model, adapter)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert not is_adapted(model), "nothing has been changed"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_of_another_model_say_whose_they_are(tmp_path):
    save_adapter(adapted_model(), tmp_path, "gpt2-large")
    for other in (replace(CONFIG, n_embd=24, n_inner=None), replace(CONFIG, n_layer=2)):
        with pytest.raises(WeightsError, match="it was made for 'gpt2-large'"):
            load_adapter(random_model(other), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "c_atn"}, "'c_atn' matches no projection of the model; there is c_attn"),
        ({"targets": "h.7.*"}, "'h.7.*' matches no"),
        ({"targets": "wte"}, "'wte' matches no"),
        ({"targets": []}, "names no projection"),
        ({"targets": "c_attn,"}, "'' matches no"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": 20}, "rank is 20, but must be below 20"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_mistakes_when_adding_adapters_name_the_way_out(options, words):
    model = random_model()
    with pytest.raises(ArgumentError) as error:
        add_adapters(model, **options)
    assert words in str(error.value)
    assert not is_adapted(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_are_not_added_twice_nor_to_packed_weights(adapter, tmp_path):
    model = adapted_model()
    with pytest.raises(ArgumentError, match="merge"):
        add_adapters(model)
    with pytest.raises(ArgumentError, match="merge"):
        load_adapter(model, adapter)
    with pytest.raises(ArgumentError, match="no adapters to save"):
        save_adapter(random_model(), tmp_path)
    if model.can_be_packed():
        with pytest.raises(ArgumentError, match="PackedGPT2 has no projections"):
            load_adapter(model.pack(), adapter)


def test_the_command_line_takes_adapters(tmp_path, capsys):
    tokenizer = BPETokenizer.train(["the cat sat on the mat " * 10], 280)
    model = random_model(replace(CONFIG, vocab_size=tokenizer.vocab_size))
    model.save_pretrained(tmp_path / "base", tokenizer)
    add_adapters(model, rank=3, targets=ALL)
    for projection in adapted(model).values():
        nn.init.normal_(projection.lora_B)
    save_adapter(model, tmp_path / "adapter")
    merge(model).save_pretrained(tmp_path / "merged", tokenizer)
    asked = ["--greedy", "--max-new-tokens", "9", "the cat"]

    def written(*arguments: str) -> str:
        assert generate([*arguments, *asked]) == 0
        return capsys.readouterr().out

    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    ours = written("--model", base, "--adapter", adapter)
    assert ours == written("--model", str(tmp_path / "merged"))
    assert ours != written("--model", base)
    assert generate(["--model", base, "--adapter", base, *asked]) == 1
    assert "no adapter_config.json" in capsys.readouterr().err
    generator = Generator.from_pretrained(base, adapter=adapter)
    assert str(generator("the cat", max_new_tokens=9, do_sample=False)) == ours.rstrip("\n")
