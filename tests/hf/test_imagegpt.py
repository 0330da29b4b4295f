"""fuse: ImageGPT of transformers, whose attention and projections are GPT-2's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, ImageGPTConfig

from gpt2fast.errors import ArgumentError
from gpt2fast.hf import doctor, fuse, unfuse
from gpt2fast.ops.backend import record_calls
from tolerance import assert_close, assert_equal, step_of

SIZES: dict[str, Any] = {
    "vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64,
    "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
HEADS = ("ImageGPTModel", "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification")


def build(kind: str = "ImageGPTForCausalImageModeling", **options: Any) -> Any:
    """A model of transformers in float64, with random biases and norms too, in evaluation mode."""
    torch.manual_seed(5)
    model = getattr(transformers, kind)(ImageGPTConfig(**{**SIZES, **options})).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def three(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Fused, plain, and the model itself, which is in float64."""
    other = copy.deepcopy(model).to(dtype)
    return fuse(copy.deepcopy(other)), other, model


def learned(model: Any, kind: str, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """First results and the loss, and all gradients."""
    torch.manual_seed(1)
    tokens = torch.randint(96, (3, 13))
    labels = {"ImageGPTModel": {}, "ImageGPTForImageClassification": {"labels": tokens[:, 0] % 2}}
    output = model(tokens, **labels.get(kind, {"labels": tokens}), **options)
    first = output.last_hidden_state if kind == "ImageGPTModel" else output.logits
    loss = first.sin().sum() if kind == "ImageGPTModel" else output.loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [first.detach(), loss.detach()], gradients


@pytest.mark.parametrize("way", ["eval", "train", "checkpointing"])
@pytest.mark.parametrize("kind", HEADS)
def test_outputs_and_gradients(kind, way):
    results, gradients, called = [], [], []
    for model in three(build(kind)):
        model.train(way != "eval")
        if way == "checkpointing":
            model.gradient_checkpointing_enable()
        with record_calls() as calls:
            found, learnt = learned(model, kind, use_cache=False)
        results.append(found)
        gradients.append(learnt)
        called.append({call.op for call in calls})
    assert {"causal_attention", "projection"} <= called[0] and not called[1]
    assert_close(*results, times=3.0)
    assert_close(*gradients, times=3.0)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_function": "gelu_new"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"n_inner": 40},
        {"layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_configurations(options):
    kind = "ImageGPTForCausalImageModeling"
    results = []
    for model in three(build(**options)):
        with record_calls() as calls:
            found, gradients = learned(model, kind)
        if not results:
            fuses = options.get("activation_function") == "gelu_new"
            assert ("gelu_mlp" in {call.op for call in calls}) == fuses
        results.append([*found, *gradients])
    assert_close(*results, times=3.0)


@pytest.mark.parametrize("padded", [False, True])
def test_steps_with_a_cache(padded):
    tokens = torch.randint(96, (3, 17))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :4] = 0
    results = []
    for model in three(build()):
        cache, found = DynamicCache(), []
        for begin, end in [(0, 9), (9, 13), (13, 14), (14, 17)]:
            options = {"attention_mask": mask[:, :end]} if padded else {}
            with torch.no_grad(), record_calls() as calls:
                output = model(
                    tokens[:, begin:end], past_key_values=cache, use_cache=True, **options
                )
            if not results and not begin:
                assert ("causal_attention" in {call.op for call in calls}) != padded
            assert output.past_key_values is cache and cache.get_seq_length() == end
            found.append(output.logits)
        found[0] = found[0].masked_fill(mask[:, :9, None] == 0, 0.0)
        results.append([torch.cat(found, 1)])
    assert_close(*results, times=3.0)


def test_generation_writes_the_same_tokens():
    ours, other, _ = three(build())
    tokens = torch.randint(96, (2, 9))
    options = {"max_new_tokens": 12, "do_sample": False}
    assert_equal(ours.generate(tokens, **options), other.generate(tokens, **options))


def test_attentions_cross_attention_and_embeddings():
    tokens, states = torch.randint(96, (2, 9)), torch.randn(2, 5, 48)
    results = []
    for model in three(build(add_cross_attention=True)):
        dtype = model.lm_head.weight.dtype
        with torch.no_grad():
            output = model(
                inputs_embeds=model.transformer.wte(tokens),
                encoder_hidden_states=states.to(dtype),
                output_attentions=True,
                use_cache=False,
            )
        assert len(output.attentions) == len(output.cross_attentions) == 2
        results.append([output.logits, *output.attentions, *output.cross_attentions])
    assert_close(*results, times=3.0)


def test_bfloat16_and_autocast():
    tokens = torch.randint(96, (2, 33))
    with torch.no_grad():
        results = [[model(tokens).logits] for model in three(build(), torch.bfloat16)]
    assert_close(*results, times=3.0)
    ours, other, exact = three(build())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = [[model(tokens).logits] for model in (ours, other)]
    right = [exact(tokens).logits.detach()]
    assert_close(*found, right, times=3.0, least=step_of(torch.bfloat16))


def test_dropout_of_attention_is_drawn_and_scaled():
    attention = fuse(build(attn_pdrop=0.5).float()).transformer.h[0].attn
    x = torch.randn(1, 48, 48)
    with torch.no_grad():
        right = attention(x)[0]
        attention.train()
        found = torch.stack([attention(x)[0] for _ in range(400)])
    assert not torch.equal(found[0], found[1])
    assert float((found.mean(0) - right).norm() / right.norm()) < 0.1


def test_doctor_names_what_stays():
    model = fuse(build().float())
    parts = {part.name: part for part in doctor(model)}
    assert parts["transformer.h.0.attn"].fused and parts["transformer.h.0.attn.c_attn"].fused
    assert "does not subtract the mean" in str(parts["transformer.h.0.ln_1"].reason)
    assert "its activation is QuickGELU" in str(parts["transformer.h.0.mlp"].reason)
    reasons = {part.name: part.reason for part in doctor(fuse(build()))}
    assert reasons["transformer.h.0.attn"] == "transformers attends, since it computes in float64"
    model.transformer.h[1].attn.attn_dropout.register_forward_hook(lambda *_: None)
    reasons = {part.name: part.reason for part in doctor(model)}
    assert reasons["transformer.h.1.attn"] == "attn_dropout is watched or replaced"


def test_unfuse_and_generate():
    model = build().float()
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in unfuse(fuse(model)).modules()] == kinds
    with pytest.raises(ArgumentError, match="no GPT2LMHeadModel that could generate"):
        fuse(model, generate=True)
    assert [type(module) for module in model.modules()] == kinds
