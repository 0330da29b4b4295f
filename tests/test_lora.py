"""Low-rank adapters and frozen parameters: what they compute, train, leave alone, and store."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2fast import GPT2, Error, Generator, GPT2Config, backend
from gpt2fast.checkpoints.tensor_files import read_tensors, write_safetensors
from gpt2fast.cli.generate import main as generate
from gpt2fast.errors import ArgumentError, ConfigError, WeightsError
from gpt2fast.lora import add_adapters, is_adapted, load_adapter, merge, save_adapter
from gpt2fast.lora.adapters import adapted
from gpt2fast.tokenizer import BPETokenizer
from gpt2fast.training import TrainConfig
from gpt2fast.training.freezing import freeze
from gpt2fast.training.start.adapters import (
    adapter_state,
    describe_training,
    prepare_model,
    restore_adapters,
)
from tolerance import assert_close

# No two sizes alike, so that a tensor's shape says what it is.
CONFIG = GPT2Config(
    vocab_size=61, n_positions=24, n_embd=20, n_layer=3, n_head=2, n_inner=52, dropout=0.0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
ALL = "c_attn,c_proj,c_fc"


def random_model(config: GPT2Config = CONFIG) -> GPT2:
    """No parameter at its initial zero or one: a swapped or lost one shows."""
    generator = torch.Generator().manual_seed(0)
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapted_model(targets: str = "c_attn", **options) -> GPT2:
    """With adapters that have an effect."""
    model = random_model()
    torch.manual_seed(2)
    add_adapters(model, rank=3, alpha=6, targets=targets, **options)
    with torch.no_grad():
        for projection in adapted(model).values():
            projection.lora_B.normal_(std=0.2)
    return model


def tokens(rows: int = 2, time: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (rows, time), generator=generator)


@pytest.fixture
def adapter(tmp_path):
    """A stored adapter of `adapted_model(ALL)`."""
    save_adapter(adapted_model(ALL), tmp_path / "adapter")
    return tmp_path / "adapter"


# -- what they compute -----------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["c_attn", "attn.c_proj", "attn.*"])
def test_new_adapters_of_attention_change_no_bit(targets):
    model = random_model()
    before = model(tokens()).logits
    add_adapters(model, targets=targets)
    assert torch.equal(model(tokens()).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["c_fc", "mlp.c_proj", ALL])
def test_new_adapters_of_the_mlp_change_nothing_but_rounding(targets):
    model = random_model()
    with backend("reference"):
        theirs = model(tokens()).logits
    exact = copy.deepcopy(model).double()(tokens()).logits
    add_adapters(model, targets=targets)
    assert_close([model(tokens()).logits], [theirs], [exact], times=3)


def test_an_adapter_is_its_formula():
    model = adapted_model("c_attn", dropout=0.4).train()
    projection = model.h[1].attn.c_attn
    x = torch.randn(4, 7, 20)
    torch.manual_seed(5)
    ours = projection(x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    added = 6 / 3 * dropped @ projection.lora_A.t() @ projection.lora_B.t()
    assert torch.allclose(ours, x @ projection.weight + projection.bias + added, atol=1e-5)
    assert not torch.equal(ours, projection(x)), "dropout draws anew"
    projection.eval()
    assert torch.equal(projection(x), projection(x))


@pytest.mark.parametrize("targets", ["c_attn", ALL])
def test_gradients_of_adapters_equal_those_of_a_dense_computation(targets):
    model = adapted_model(targets)

    def dense(dtype: torch.dtype) -> list[torch.Tensor]:
        merged = merge(copy.deepcopy(model).to(dtype))
        merged(tokens(), labels=tokens()).loss.backward()
        gradients = []
        for name, projection in adapted(model).items():
            of_weight = merged.get_parameter(f"{name}.weight").grad  # (in, out)
            assert of_weight is not None
            a, b = (f.detach().to(dtype) for f in (projection.lora_A, projection.lora_B))
            gradients += [2 * (of_weight @ b).t(), 2 * of_weight.t() @ a.t()]
        return gradients

    with backend("reference"):
        theirs, exact = dense(torch.float32), dense(torch.float64)
    model(tokens(), labels=tokens()).loss.backward()
    ours = [g for p in adapted(model).values() for g in (p.lora_A.grad, p.lora_B.grad)]
    assert_close(ours, theirs, exact, times=3)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(".lora_" in name for name in trained)
    assert len(trained) == len(ours)


def test_gradients_are_the_same_when_activations_are_computed_again():
    gradients = []
    for again in (False, True):
        model = adapted_model(ALL, dropout=0.3).train()
        model.gradient_checkpointing = again
        torch.manual_seed(3)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


@torch.no_grad()
@pytest.mark.parametrize("targets", ["c_attn", ALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_unmerged_models_agree(targets, dtype):
    model = adapted_model(targets)
    exact = copy.deepcopy(model).double()(tokens()).logits
    model = model.to(dtype)
    with backend("reference"):
        theirs = model(tokens()).logits
    merged = merge(model)
    assert not is_adapted(merged)
    assert is_adapted(model)
    assert merged.dtype == dtype
    assert_close([merged(tokens()).logits], [theirs], [exact], times=3)


def test_merging_shares_what_no_adapter_changes_and_leaves_the_model_alone():
    model = adapted_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merge(model)
    assert merged.wte.weight.data_ptr() == model.wte.weight.data_ptr()
    with torch.no_grad():
        merged.h[0].attn.c_attn.weight.zero_()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in merged.parameters())


# -- training --------------------------------------------------------------------------------


def test_training_adapters_lowers_the_loss_and_no_frozen_weight_moves():
    model = GPT2(replace(CONFIG, initializer_range=0.2)).train()
    names = add_adapters(model, rank=4, targets=ALL)
    assert len(names) == 4 * CONFIG.n_layer
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = (torch.arange(24) % 7).expand(4, 24), []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert len(frozen) == len(random_model().state_dict())
    assert all(torch.equal(model.get_parameter(n), before) for n, before in frozen.items())


class Shapes(TorchDispatchMode):
    """The shapes of all that is computed meanwhile."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" not in str(function) and not getattr(function, "is_view", False):
            self.seen |= {
                tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)
            }
        return result


def test_no_gradient_of_a_frozen_projection_is_computed():
    model = adapted_model("attn.*").train()
    ids = tokens(2, 13)
    loss = model(ids, labels=ids).loss
    with Shapes() as shapes:
        loss.backward()
    assert (3, 20) in shapes.seen, "the adapters' gradients are"
    block = model.h[0]
    frozen = [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj, model.wte]
    for weight in (module.weight for module in frozen):
        assert not {tuple(weight.shape), tuple(weight.t().shape)} & shapes.seen


# -- what reads weights ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_generation_sees_adapters_also_after_they_change(name):
    model, ids = adapted_model(ALL), tokens()
    plain = random_model().generate(ids, max_new_tokens=8)
    with backend(name):
        first = model.generate(ids, max_new_tokens=8)
        assert torch.equal(first, merge(model).generate(ids, max_new_tokens=8))
        assert not torch.equal(first, plain)
        with torch.no_grad():
            for projection in adapted(model).values():
                projection.lora_B.zero_()
        assert torch.equal(model.generate(ids, max_new_tokens=8), plain)


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_decoding_step_sees_adapters(name):
    model, ids = adapted_model(ALL), tokens()
    with backend(name):
        cache = model.new_cache(2)
        model(ids[:, :-1], cache=cache)
        logits = model.decode_step(ids[:, -1], cache)
    assert torch.allclose(logits, model(ids).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("release", [False, True])
def test_packed_and_quantized_copies_hold_adapters(release):
    expected = adapted_model(ALL)(tokens()).logits
    merged = merge(adapted_model(ALL))
    model = adapted_model(ALL)
    if model.can_be_packed():
        packed = model.pack(release=release)
        assert torch.allclose(packed(tokens()).logits, expected, atol=1e-5)
        quantized = adapted_model(ALL).quantize("int8", release=release)
        assert torch.equal(quantized(tokens()).logits, merged.quantize("int8")(tokens()).logits)
    assert (model.wte.weight.numel() == 0) == (release and model.can_be_packed())


def test_a_saved_model_is_the_merged_one(tmp_path):
    model = adapted_model(ALL)
    model.save_pretrained(tmp_path)
    loaded, merged = GPT2.from_pretrained(tmp_path), merge(model)
    assert loaded.state_dict().keys() == merged.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), merged.state_dict().values()))


# -- files -----------------------------------------------------------------------------------


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


# -- freezing --------------------------------------------------------------------------------


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


# -- runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_rank": 8}, "--init-from"),
        ({"lora_rank": 0, "init_from": "x"}, "lora_rank is 0"),
        ({"lora_alpha": 16}, "without lora_rank"),
        ({"lora_targets": "c_fc"}, "without lora_rank"),
        ({"lora_rank": 8, "init_from": "x", "lora_dropout": 1}, "lora_dropout is 1"),
        ({"lora_rank": 8, "init_from": "x", "lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_rank": 8, "init_from": "x", "lora_targets": " "}, "lora_targets is ' '"),
        ({"lora_rank": 8, "init_from": "x", "freeze": "wte"}, "null with lora_rank=8"),
        ({"lora_rank": 8, "init_from": "x", "optimizer": "muon"}, "adamw with lora_rank=8"),
        ({"freeze": ""}, "freeze is ''"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(fields, words):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**fields)
    assert words in str(error.value)


def test_a_run_is_prepared_as_it_is_told():
    whole = prepare_model(TrainConfig(), random_model())
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert describe_training(whole) is None
    frozen = prepare_model(TrainConfig(freeze="wte,h.0"), random_model())
    assert not frozen.wte.weight.requires_grad
    assert "the frozen token embedding is the output projection, too" in describe_training(frozen)
    config = TrainConfig(
        init_from="x", lora_rank=2, lora_alpha=5, lora_dropout=0.1, lora_targets="c_fc"
    )
    model = prepare_model(config, random_model())
    projection = model.h[2].mlp.c_fc
    assert (projection.rank, projection.alpha, projection.dropout) == (2, 5.0, 0.1)
    trained = 3 * 2 * (20 + 52)
    assert describe_training(model).startswith(f"training {trained} of ")
    assert "adapters of rank 2 beside 3 projections" in describe_training(model)


def test_a_run_resumed_from_a_merged_model_goes_on_bit_for_bit(tmp_path):
    config = TrainConfig(init_from="base", lora_rank=3, lora_targets=ALL, lora_dropout=0.1)

    def steps(model: GPT2, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(tokens(), labels=tokens()).loss.backward()
            optimizer.step()

    def adamw(model: GPT2) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model = prepare_model(config, random_model()).train()
    optimizer = adamw(model)
    steps(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    save_adapter(model, tmp_path / "adapter", config.init_from)
    state = {"adapters": adapter_state(model), "optimizer": optimizer.state_dict()}
    torch.save({**state, "random": torch.get_rng_state()}, tmp_path / "state.pt")
    steps(model, optimizer, 3)

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = prepare_model(config, GPT2.from_pretrained(tmp_path)).train()
    restore_adapters(resumed, state["adapters"])
    optimizer = adamw(resumed)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    steps(resumed, optimizer, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    base = random_model()
    load_adapter(base, tmp_path / "adapter")
    assert torch.equal(
        merge(base)(tokens()).logits, GPT2.from_pretrained(tmp_path)(tokens()).logits
    )
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "base"
    )


def test_a_run_is_not_resumed_with_other_adapters():
    config = TrainConfig(init_from="base", lora_rank=3)
    state = adapter_state(prepare_model(config, random_model()))
    for other in (replace(config, lora_rank=2), replace(config, lora_targets=ALL)):
        with pytest.raises(Error, match="cannot resume: h.0"):
            restore_adapters(prepare_model(other, random_model()), state)
    plain = random_model()
    assert adapter_state(plain) == {}
    restore_adapters(plain, {})
