"""attn_implementation="gpt2fast" where attention is not causal: encoders, and across sequences."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    BartConfig,
    BertConfig,
    ModernBertConfig,
    T5Config,
    ViTConfig,
)

import gpt2fast.hf  # noqa: F401
from gpt2fast.ops.backend import record_calls
from tolerance import assert_close

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = BertConfig(
    **SIZES, max_position_embeddings=96, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
CONFIGS: dict[str, Any] = {
    "bert": BERT,
    "vit": ViTConfig(
        **SIZES, image_size=24, patch_size=6, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    # Two layers see all tokens, two the nearest.
    "modernbert": ModernBertConfig(
        **{**SIZES, "num_hidden_layers": 4}, local_attention=6, cls_token_id=1, sep_token_id=2,
        layer_types=["full_attention", "sliding_attention"] * 2,
    ),
    "bart": BartConfig(
        vocab_size=97, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, dropout=0.0,
        max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=None,
    ),
    "t5": T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=2,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def models(name: str, config: Any = None) -> tuple[Any, ...]:
    """Ours, SDPA's, and that in float64, all with the same weights."""
    torch.manual_seed(3)
    config = copy.deepcopy(CONFIGS[name] if config is None else config)
    exact = AutoModel.from_config(config, attn_implementation="sdpa").double().eval()
    for parameter in exact.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    other = copy.deepcopy(exact).float()
    ours = copy.deepcopy(other)
    ours.set_attn_implementation("gpt2fast")
    return ours, other, exact


def mask_of(lengths: list[int], longest: int) -> torch.Tensor:
    return (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


def check(name: str, inputs: dict[str, Any], real: Any = None, config: Any = None) -> list[Any]:
    """Outputs and gradients against SDPA's by the rule; the calls of attention that ours made."""
    results, made = [], []
    for model in models(name, config):
        given = {
            key: x.to(model.dtype) if torch.is_tensor(x) and x.is_floating_point() else x
            for key, x in inputs.items()
        }
        with record_calls() as calls:
            out = model(**given).last_hidden_state
        if real is not None:
            out = out.masked_fill(real[..., None] == 0, 0.0)
        out.sin().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((out.detach(), gradients))
        made.append([call for call in calls if call.op == "causal_attention"])
    (ours, our_gradients), (other, gradients), (exact, exact_gradients) = results
    assert_close([ours], [other], [exact], times=3.0)
    assert_close(our_gradients, gradients, exact_gradients, times=3.0)
    assert not made[1] and not made[2]
    return made[0]


@pytest.mark.parametrize("lengths", [None, [17, 17, 17], [17, 11, 5]], ids=str)
@pytest.mark.parametrize(("name", "fused"), [("bert", 2), ("modernbert", 2)])
def test_text_encoders(name, fused, lengths):
    tokens = torch.randint(3, 97, (3, 17))
    mask = None if lengths is None else mask_of(lengths, 17)
    calls = check(name, {"input_ids": tokens, "attention_mask": mask}, mask)
    assert len(calls) == fused


def test_an_encoder_of_images():
    calls = check("vit", {"pixel_values": torch.randn(2, 3, 24, 24)})
    assert len(calls) == 2


def test_a_mask_of_the_users_own_is_taken_as_it_is():
    tokens = torch.randint(3, 97, (2, 9))
    mask = (torch.rand(2, 1, 9, 9) < 0.7) | torch.eye(9, dtype=torch.bool)
    assert not check("bert", {"input_ids": tokens, "attention_mask": mask})


@pytest.mark.parametrize("source", [9, 13])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_to_another_sequence(source, padded):
    """Two layers encode, two decode; theirs to the source is ours where it is as long."""
    lengths = [source, source - 4] if padded else [source] * 2
    inputs = {
        "input_ids": torch.randint(3, 97, (2, source)),
        "attention_mask": mask_of(lengths, source),
        "decoder_input_ids": torch.randint(3, 97, (2, 9)),
        "use_cache": False,
    }
    calls = check("bart", inputs)
    assert len(calls) == (6 if source == 9 else 4)


def test_a_decoder_with_an_encoders_states():
    config = copy.deepcopy(BERT)
    config.is_decoder = config.add_cross_attention = True
    inputs = {
        "input_ids": torch.randint(3, 97, (2, 9)),
        "encoder_hidden_states": torch.randn(2, 12, 64),
        "encoder_attention_mask": mask_of([12, 7], 12),
        "use_cache": False,
    }
    assert len(check("bert", inputs, config=config)) == 2


def test_scores_with_a_bias_are_left_to_sdpa():
    inputs = {
        "input_ids": torch.randint(3, 97, (2, 9)),
        "attention_mask": mask_of([9, 5], 9),
        "decoder_input_ids": torch.randint(3, 97, (2, 9)),
        "use_cache": False,
    }
    check("t5", inputs)


@pytest.mark.parametrize("source", [5, 9])
def test_generation_from_a_source_writes_the_same_tokens(source):
    from transformers import BartForConditionalGeneration

    torch.manual_seed(3)
    other = BartForConditionalGeneration._from_config(CONFIGS["bart"], attn_implementation="sdpa")
    other = other.eval()
    for parameter in other.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ours = copy.deepcopy(other)
    ours.set_attn_implementation("gpt2fast")
    tokens = torch.randint(3, 97, (2, source))
    options = {
        "attention_mask": mask_of([source, source - 2], source),
        "max_new_tokens": 12,
        "do_sample": False,
    }
    assert torch.equal(ours.generate(tokens, **options), other.generate(tokens, **options))


def test_dropout_drops_and_is_seeded():
    config = copy.deepcopy(BERT)
    config.attention_probs_dropout_prob = 0.5
    model = AutoModel.from_config(config, attn_implementation="gpt2fast").train()
    tokens = torch.randint(3, 97, (2, 9))

    def hidden(seed):
        torch.manual_seed(seed)
        return model(tokens).last_hidden_state

    assert torch.equal(hidden(1), hidden(1)) and not torch.equal(hidden(1), hidden(2))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_compiled_encoders(name):
    given = torch.randint(3, 97, (2, 16)) if name == "bert" else torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        ours, other, exact = models(name)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        doubled = given.double() if given.is_floating_point() else given
        found, expected = compiled(given), other(given)
        assert_close(
            [found.last_hidden_state],
            [expected.last_hidden_state],
            [exact(doubled).last_hidden_state],
            times=3.0,
        )
