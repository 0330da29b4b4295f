"""fuse: GPT-2 models of transformers on fused ops, and what people do with them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config
from transformers.models.gpt2 import modeling_gpt2 as plain

import gpt2fast
from gpt2fast.errors import ArgumentError
from gpt2fast.hf import VersionError, doctor, fuse, gpt2, unfuse, versions
from gpt2fast.ops.backend import record_calls
from tolerance import assert_close, assert_equal, step_of

SIZES: dict[str, Any] = {
    "vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "GPT2Model": {},
    "GPT2LMHeadModel": {},
    "GPT2DoubleHeadsModel": {},
    "GPT2ForSequenceClassification": {"num_labels": 3},
    "GPT2ForTokenClassification": {"num_labels": 3},
    "GPT2ForQuestionAnswering": {},
}


def build(kind: str = "GPT2LMHeadModel", **options: Any) -> Any:
    """A model of transformers in float64, with random biases and norms too, in evaluation mode."""
    torch.manual_seed(5)
    model = getattr(transformers, kind)(GPT2Config(**{**SIZES, **options})).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def three(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Fused, plain, and the model itself, which is in float64."""
    other = copy.deepcopy(model).to(dtype)
    return fuse(copy.deepcopy(other)), other, model


def tensors(output: Any, real: Tensor | None = None) -> list[Tensor]:
    """All numbers of an output, zeros at padding."""
    found = [x for x in output.values() if isinstance(x, Tensor)]
    if real is None:
        return found
    return [
        x.masked_fill(real[..., None] == 0, 0) if x.shape[:2] == real.shape and x.dim() == 3 else x
        for x in found
    ]


def labels_of(kind: str, tokens: Tensor) -> dict[str, Tensor]:
    """What a model of this kind learns from."""
    if kind == "GPT2Model":
        return {}
    if kind == "GPT2ForSequenceClassification":
        return {"labels": torch.tensor([0, 2, 1])}
    if kind == "GPT2ForTokenClassification":
        return {"labels": tokens % 3}
    if kind == "GPT2ForQuestionAnswering":
        places = torch.tensor([1, 0, 3])
        return {"start_positions": places, "end_positions": places + 2}
    if kind == "GPT2DoubleHeadsModel":
        return {"labels": tokens}
    return {"labels": tokens.masked_fill(tokens % 7 == 0, -100)}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("learns", [False, True])
def test_outputs_and_gradients(kind, padding, learns):
    tokens = torch.randint(3, 97, (3, 13))
    mask = torch.ones_like(tokens)
    if padding is not None:
        for row in (1, 2):
            hidden = slice(0, 3 * row) if padding == "left" else slice(13 - 3 * row, 13)
            mask[row, hidden] = 0
            tokens[row, hidden] = 0
    options = {} if padding is None else {"attention_mask": mask}
    if learns:
        options |= labels_of(kind, tokens)
        if kind in ("GPT2LMHeadModel", "GPT2DoubleHeadsModel"):
            options["labels"] = options["labels"].masked_fill(mask == 0, -100)
            # A position that sees nothing predicts the first token.
            first = mask.argmax(1)
            options["labels"][torch.arange(3), first] = -100
    results, gradients, called = [], [], []
    for model in three(build(kind, **HEADS[kind])):
        with record_calls() as calls:
            output = model(tokens, **options)
        found = tensors(output, mask)
        loss = output.loss if learns and kind != "GPT2Model" else found[0].sin().sum()
        loss.backward()
        results.append([x.detach() for x in found])
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        called.append({call.op for call in calls})
    expected = {"causal_attention", "residual_layer_norm", "gelu_mlp", "projection"}
    assert expected <= called[0] and not called[1]
    assert ("linear_cross_entropy" in called[0]) == (learns and kind == "GPT2LMHeadModel")
    assert_close(*results, times=3.0)
    assert_close(*gradients, times=3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    tokens = torch.randint(3, 97, (2, 33))
    with torch.no_grad():
        results = [[m(tokens).logits] for m in three(build(), dtype)]
    assert_close(*results, times=3.0)


def test_autocast():
    tokens = torch.randint(3, 97, (2, 33))
    ours, other, exact = three(build())
    with torch.autocast("cpu", torch.bfloat16):
        found = [model(tokens, labels=tokens) for model in (ours, other)]
    assert [each.logits.dtype for each in found] == [torch.bfloat16] * 2
    right = exact(tokens, labels=tokens)
    assert_close(*([x.logits.detach()] for x in (*found, right)), times=3.0)
    # A single number: the other's error may be nothing, by chance.
    losses = ([x.loss.detach()] for x in (*found, right))
    assert_close(*losses, times=3.0, least=step_of(torch.bfloat16))


def test_steps_with_a_cache():
    tokens = torch.randint(3, 97, (3, 17))
    results = []
    for model in three(build()):
        cache, found = DynamicCache(), []
        for begin, end in [(0, 9), (9, 13), (13, 14), (14, 17)]:
            with torch.no_grad():
                output = model(tokens[:, begin:end], past_key_values=cache, use_cache=True)
            assert output.past_key_values is cache
            found.append(output.logits)
        results.append([torch.cat(found, 1)])
    assert_close(*results, times=3.0)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu"},
        {"n_inner": 40},
        {"n_head": 1},
        {"tie_word_embeddings": False},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_configurations(options):
    tokens = torch.randint(3, 97, (2, 11))
    results, gradients = [], []
    for model in three(build(**options)):
        output = model(tokens, labels=tokens)
        output.loss.backward()
        results.append([output.loss.detach(), output.logits.detach()])
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_close(*results, times=3.0)
    assert_close(*gradients, times=3.0)


def test_cross_attention_within_an_encoder_decoder():
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    encoder = BertConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    decoder = GPT2Config(**SIZES, add_cross_attention=True, is_decoder=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = EncoderDecoderModel(config).double().eval()
    tokens = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    results = []
    for each in three(model):
        with torch.no_grad():
            output = each(input_ids=tokens, attention_mask=mask, labels=tokens)
        results.append([output.loss, output.logits])
    assert_close(*results, times=3.0)
    fused = fuse(copy.deepcopy(model).float())
    assert all(part.fused for part in doctor(fused) if part.kind in ("GPT2Block", "GPT2MLP"))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    assert_equal(fused.generate(tokens, **options), model.float().generate(tokens, **options))


def test_parameters_names_and_state_stay():
    model = build().float()
    before = dict(model.named_parameters())
    state = {name: x.clone() for name, x in model.state_dict().items()}
    assert fuse(model) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert state.keys() == model.state_dict().keys()
    assert isinstance(model, plain.GPT2LMHeadModel)
    assert {type(m).__name__ for m in model.modules()} == {
        type(m).__name__ for m in build().modules()
    }
    classes = [type(m) for m in model.modules()]
    assert fuse(fuse(model)) is model and classes == [type(m) for m in model.modules()]
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in build().modules()]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "save_pretrained"])
def test_copies(way, tmp_path):
    model, tokens = fuse(build().float()), torch.randint(3, 97, (2, 9))
    if way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        model.save_pretrained(tmp_path)
        assert "gpt2fast" not in (tmp_path / "config.json").read_text()
        other = fuse(transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())
        assert other.config.architectures == ["GPT2LMHeadModel"]
    with record_calls() as calls, torch.no_grad():
        found = other(tokens).logits
    assert "gelu_mlp" in {call.op for call in calls}
    assert_equal(found, model(tokens).logits.detach())


def test_hidden_states_and_attentions():
    tokens = torch.randint(3, 97, (2, 9))
    ours, other, exact = three(build())
    found = [m(tokens, output_hidden_states=True, labels=tokens) for m in (ours, other, exact)]
    assert len(found[0].hidden_states) == 3
    assert_close(*([x.detach() for x in each.hidden_states] for each in found), times=3.0)
    for model in (ours, other, exact):
        model.set_attn_implementation("eager")
    found = [m(tokens, output_attentions=True) for m in (ours, other, exact)]
    assert_close(*([x.detach() for x in each.attentions] for each in found), times=3.0)


def test_hooks_see_what_they_saw():
    tokens = torch.randint(3, 97, (2, 9))
    seen: dict[int, list[Tensor]] = {}
    models = three(build())
    for number, model in enumerate(models):
        seen[number] = []
        for name, module in model.named_modules():
            if name.startswith("transformer.h.1"):
                module.register_forward_hook(
                    lambda m, args, out, to=seen[number]: to.append(
                        (out[0] if isinstance(out, tuple) else out).detach()
                    )
                )
    with torch.no_grad():
        for model in models:
            model(tokens)
    assert len(seen[0]) == len(seen[1]) == 12
    assert_close(*seen.values(), times=3.0)
    reasons = {part.name: part.reason for part in doctor(models[0])}
    assert reasons["transformer.h.1.mlp"] == "c_fc has a hook"
    assert reasons["transformer.h.0.mlp"] is None


def test_logits_come_when_they_are_read():
    model, tokens = fuse(build().float()), torch.randint(3, 97, (2, 9))
    plainly = unfuse(copy.deepcopy(model))
    right = plainly(tokens, labels=tokens)
    for read in (
        lambda x: x.logits,
        lambda x: x["logits"],
        lambda x: x[1],
        lambda x: x[:2][1],
        lambda x: x.to_tuple()[1],
        lambda x: dict(x)["logits"],
        lambda x: {**x}["logits"],
        lambda x: list(x.values())[1],
        lambda x: dict(x.items())["logits"],
        lambda x: x.get("logits"),
        lambda x: pickle.loads(pickle.dumps(x)).logits,
        lambda x: copy.copy(x).logits,
        lambda x: next(v for k, v in x.items() if k == "logits"),
    ):
        output = model(tokens, labels=tokens)
        assert output["loss"] is output.loss is output[0]
        assert list(output.keys()) == list(right.keys())
        assert "_source" in output.__dict__
        torch.testing.assert_close(read(output), right.logits)
        assert output.logits is output.logits
    output = model(tokens, labels=tokens)
    (output.loss + output.logits.sin().mean()).backward()
    (right.loss + right.logits.sin().mean()).backward()
    for ours, other in zip(model.parameters(), plainly.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)
    for change in (
        lambda weight: weight.detach().add_(1),
        lambda weight: weight.data.mul_(0.5),
        lambda weight: setattr(weight, "data", weight.data.bfloat16()),
    ):
        output = model(tokens, labels=tokens)
        change(model.lm_head.weight)
        for _ in range(2):
            with pytest.raises(ArgumentError, match="weights were changed"):
                output.logits  # noqa: B018


def test_logits_that_are_set_stay():
    model, tokens = fuse(build().float()), torch.randint(3, 97, (2, 9))
    for put in (
        lambda output, logits: setattr(output, "logits", logits),
        lambda output, logits: output.__setitem__("logits", logits),
    ):
        output, mine = model(tokens, labels=tokens), torch.zeros(2, 9, 97)
        put(output, mine)
        assert output.logits is mine is output["logits"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 5},
        {"num_items_in_batch": [11]},
        {"ignore_index": 7},
        {"shift_labels": [list(range(10, 19)), [-100, *range(30, 38)]]},
        {"return_dict": False},
        {"logits_to_keep": 9},
    ],
    ids=str,
)
def test_options_of_the_loss(options):
    tokens = torch.randint(3, 97, (2, 9))
    results = []
    is_tuple = options == {"return_dict": False}
    options = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in options.items()}
    for model in three(build()):
        output = model(tokens, labels=tokens, **options)
        assert isinstance(output, tuple) == is_tuple
        results.append([output[0].detach(), output[1].detach()])
    assert_close(*results, times=3.0)


def test_no_label_counts():
    tokens = torch.randint(3, 97, (2, 9))
    for options in ({}, {"num_items_in_batch": 5}):
        found = []
        for model in three(build())[:2]:
            output = model(tokens, labels=torch.full_like(tokens, -100), **options)
            output.loss.backward()
            found.append([output.loss.detach(), model.transformer.wpe.weight.grad])
        for ours, other in zip(*found, strict=True):
            torch.testing.assert_close(ours, other, equal_nan=True)


def test_doctor_knows_what_does_not_run_fused():
    model = fuse(build())
    reasons = {part.name: part.reason for part in doctor(model)}
    assert reasons["transformer.h.0.attn"] == "SDPA attends, since it computes in float64"
    model = fuse(build().float())
    model.lm_head = nn.Linear(48, 97)
    assert {p.name: p.reason for p in doctor(model)}[""] == "lm_head has a bias"

    class Mine(transformers.GPT2LMHeadModel):
        pass

    model = fuse(Mine(GPT2Config(**SIZES)))
    assert {p.name: p.reason for p in doctor(model)}[""] == "its class is not transformers' own"
    with pytest.raises(ArgumentError, match="classes of your own keep their loops"):
        fuse(model, generate=True)


def test_a_loss_of_the_users_own_is_used():
    model, tokens = fuse(build().float()), torch.randint(3, 97, (2, 9))
    model.loss_function = lambda logits, labels, **options: logits.sum()
    output = model(tokens, labels=tokens)
    assert_equal(output.loss, output.logits.sum())
    reasons = {part.name: part.reason for part in doctor(model)}
    assert reasons[""] == "its loss function is another one"


def test_gradient_checkpointing():
    tokens = torch.randint(3, 97, (2, 9))
    results = []
    for model in three(build()):
        model.train().gradient_checkpointing_enable()
        output = model(tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert_close(*results, times=3.0)


@pytest.mark.parametrize("options", [{}, {"labels": True}], ids=str)
def test_compiled(options):
    tokens = torch.randint(3, 97, (2, 9))
    options = {"labels": tokens} if options else {}
    ours, other, exact = three(build())
    ours.loss_type = "ForCausalLM"  # torch.compile stops at transformers' remark that it is missing
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = [
        [x.detach() for x in tensors(model(tokens, **options))]
        for model in (compiled, other, exact)
    ]
    assert_close(*results, times=3.0)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def test_exported_for_every_length():
    ours, other, exact = three(build())
    lengths = {"tokens": {1: torch.export.Dim("length", min=2, max=60)}}
    with torch.no_grad():
        program = torch.export.export(
            _Logits(ours), (torch.randint(3, 97, (2, 9)),), dynamic_shapes=lengths
        )
    exported = program.module()
    for length in (2, 9, 33):
        tokens = torch.randint(3, 97, (2, length))
        found = [exported(tokens), other(tokens).logits, exact(tokens).logits]
        assert_close(*([each.detach()] for each in found), times=3.0)


def test_adapters_before_and_after():
    peft = pytest.importorskip("peft")
    tokens = torch.randint(3, 97, (2, 9))

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
        )
        return peft.get_peft_model(model, config)

    before = adapted(fuse(build().float()))
    after = fuse(adapted(build().float()))
    other, exact = adapted(build().float()), adapted(build().float()).double()
    results, gradients = [], []
    for model in (before, after, other, exact):
        output = model(tokens, labels=tokens)
        output.loss.backward()
        results.append([output.loss.detach(), output.logits.detach()])
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for found in (results, gradients):
        assert_close(found[0], found[2], found[3], times=3.0)
        assert_close(found[1], found[2], found[3], times=3.0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_writes_the_same_tokens(options, padded):
    ours, other, _ = three(build())
    tokens = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :4] = 0
        tokens[0, :4] = 0
    options = {"max_new_tokens": 12, "attention_mask": mask, **options}
    assert_equal(ours.generate(tokens, **options), other.generate(tokens, **options))


def test_what_is_no_gpt2_is_left_alone():
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=3,
            intermediate_size=64,
        )
    )  # fmt: skip
    classes = [type(m) for m in llama.modules()]
    with pytest.raises(ArgumentError, match='no GPT-2.*attn_implementation="gpt2fast"'):
        fuse(llama)
    assert classes == [type(m) for m in llama.modules()]


@pytest.mark.parametrize("call", [fuse, unfuse, doctor])
def test_a_name_is_no_model(call):
    with pytest.raises(ArgumentError, match="'gpt2' is no model: load one"):
        call("gpt2")


def test_attention_that_was_asked_for_stays():
    config = GPT2Config(**SIZES)
    model = fuse(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
    reasons = {part.name: part.reason for part in doctor(model)}
    assert reasons["transformer.h.0.attn"] == "the model attends with 'eager'"
    assert unfuse(model).config._attn_implementation == "eager"


def test_unfuse_gives_back_the_attention_that_was_there():
    model = build()
    model.set_attn_implementation("gpt2fast")
    for _ in range(2):
        fuse(fuse(model))
        assert model.config._attn_implementation == "gpt2fast"
        unfuse(unfuse(model))
        assert model.config._attn_implementation == "gpt2fast"
        assert not any(type(module).__module__.startswith("gpt2fast") for module in model.modules())
    model.set_attn_implementation("sdpa")
    fuse(model)
    assert model.config._attn_implementation == "gpt2fast"
    unfuse(copy.deepcopy(model))
    assert model.config._attn_implementation == "gpt2fast"
    assert unfuse(model).config._attn_implementation == "sdpa"


def test_models_that_share_a_config_are_named(caplog):
    config = GPT2Config(**SIZES)
    one, other = transformers.GPT2LMHeadModel(config), transformers.GPT2Model(config)
    third = transformers.GPT2LMHeadModel(copy.deepcopy(config))
    with caplog.at_level("WARNING", logger="gpt2fast"):
        fuse(third)
    assert not caplog.records
    with caplog.at_level("WARNING", logger="gpt2fast"):
        fuse(one)
    (record,) = caplog.records
    assert "1 other model(s) share this one's config" in record.getMessage()
    assert other.config._attn_implementation == "gpt2fast"
    caplog.clear()
    with caplog.at_level("WARNING", logger="gpt2fast"):
        unfuse(one)
    assert "attend with 'sdpa' now" in caplog.text
    del other
    caplog.clear()
    with caplog.at_level("WARNING", logger="gpt2fast"):
        fuse(one)
    assert not caplog.records


def test_the_package_has_them():
    assert gpt2fast.fuse is fuse and gpt2fast.unfuse is unfuse
    assert gpt2fast.doctor(build()) == doctor(build())


@pytest.mark.parametrize("right", [True, False])
def test_versions_that_nobody_tried_are_looked_at_once(right, monkeypatch, caplog):
    versions.check_version.cache_clear()
    # Not the version of the module: transformers replaces itself while it is imported.
    monkeypatch.setattr(versions, "installed", lambda: "5.99")
    if not right:
        monkeypatch.setattr(gpt2.LayerNorm, "add", lambda self, x, residual: (x, x))
    model = build().float()
    kinds = [type(module) for module in model.modules()]
    if right:
        fuse(fuse(model))
        assert caplog.text.count("not tried with transformers 5.99") == 1
        assert type(model) is gpt2.GPT2LMHeadModel
    else:
        with pytest.raises(VersionError, match=r"transformers 5\.99 .*differ.*use one of 5\.20"):
            fuse(model)
        assert kinds == [type(module) for module in model.modules()]
    versions.check_version.cache_clear()
