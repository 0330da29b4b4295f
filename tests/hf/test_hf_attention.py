"""attn_implementation="gpt2fast" against transformers' own, on models of several families."""

from __future__ import annotations

import copy
import runpy
import warnings
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    CompileConfig,
    DynamicCache,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
    Qwen3Config,
    RoFormerConfig,
    StaticCache,
    XGLMConfig,
)

import gpt2fast.hf
from gpt2fast import ops
from gpt2fast.hf import attention
from gpt2fast.ops.backend import record_calls
from tolerance import assert_close, assert_near

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16}
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=96, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=24),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "gemma": GemmaConfig(**SIZES, head_dim=160),
    "gemma2": Gemma2Config(**GEMMA, sliding_window=7, attn_logit_softcapping=2.0),
    "gpt_neox": GPTNeoXConfig(**{**SIZES, "num_key_value_heads": 4}),
    "gpt_oss": GptOssConfig(
        **SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=7
    ),
}  # fmt: skip
OTHER = {"gemma2": "eager", "gpt_oss": "eager"}
"""The implementation to compare with, where it is not SDPA."""


def compare(name: str, results: list[list[Tensor]], unpadded: bool = True) -> None:
    """Ours against the other's, by the rule of tolerance where the exact model has numbers.

    transformers' eager attention takes the least float64 to float32, where it is infinite, and has
    no number for queries that see nothing.
    """
    if name in OTHER and not unpadded:
        for ours, other in zip(*results[:2], strict=True):
            assert_near(ours, other.double(), 1e-5, name)
    else:
        ours, others, exact = results
        assert_close(ours, others, exact, times=3.0)


FUSED = {"gpt2", "llama", "qwen2", "qwen3", "gemma", "gpt_neox"}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def models(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Ours, another implementation's, and that in float64, all with the same weights."""
    torch.manual_seed(3)
    config = copy.deepcopy(CONFIGS[name])
    config.initializer_range = 0.2
    config._experts_implementation = "eager"  # others have no float64
    exact = AutoModelForCausalLM.from_config(config, attn_implementation=OTHER.get(name, "sdpa"))
    exact = exact.double().eval()
    for parameter in exact.parameters():  # biases and norms as well
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    other = copy.deepcopy(exact).to(dtype)
    ours = copy.deepcopy(other)
    ours.set_attn_implementation("gpt2fast")
    return ours, other, exact


def padded(sides: tuple[str, ...], length: int = 17) -> Tensor:
    """A mask (rows, length) with 0, 3, 6, ... tokens of padding at the sides given."""
    mask = torch.ones(len(sides), length, dtype=torch.int64)
    for row, side in enumerate(sides):
        if side == "right":
            mask[row, length - 3 * row :] = 0
        elif side == "left":
            mask[row, : 3 * row] = 0
    return mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "sides",
    [None, ("none",) * 3, ("none", "right", "right"), ("left", "left", "right")],
    ids=str,
)
def test_logits_and_gradients(name, sides):
    tokens = torch.randint(3, 97, (3, 17))
    mask = None if sides is None else padded(sides)
    real = torch.ones_like(tokens) if mask is None else mask
    unpadded = sides is None or "left" not in sides
    results = []
    for model in models(name):
        with record_calls() as calls:
            logits = model(tokens, attention_mask=mask).logits
        logits = logits.masked_fill(real[..., None] == 0, 0.0)
        logits.sin().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((logits.detach(), gradients, {call.op for call in calls}))
    (ours, our_gradients, called), (other, gradients, _), (exact, exact_gradients, _) = results
    assert ("causal_attention" in called) == (name in FUSED)
    compare(name, [[ours], [other], [exact]], unpadded)
    compare(name, [our_gradients, gradients, exact_gradients], unpadded)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("sides", [None, ("none", "right", "left")], ids=str)
def test_keys_that_several_heads_share_are_not_repeated(name, sides, monkeypatch):
    found, attend = [], ops.attention

    def watched(q, k, v, *options):
        found.append((q.shape[2], k.shape[2], v.shape[2]))
        return attend(q, k, v, *options)

    monkeypatch.setattr(ops, "attention", watched)
    mask = None if sides is None else padded(sides)
    models(name)[0](torch.randint(3, 97, (3, 17)), attention_mask=mask)
    assert found == [(4, 2, 2)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    tokens = torch.randint(3, 97, (2, 33))
    with torch.no_grad():
        ours, other, exact = (m(tokens).logits for m in models("llama", dtype))
    assert_close([ours], [other], [exact], times=3.0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_steps_with_a_cache(name, static, side):
    """A prompt, several tokens at once, and one at a time."""
    tokens = torch.randint(3, 97, (3, 17))
    mask = None if side is None else padded((side,) * 3)
    results = []
    for model in models(name):
        config = model.config
        cache = StaticCache(config, max_cache_len=24) if static else DynamicCache(config=config)
        found = []
        for begin, end in [(0, 9), (9, 13), (13, 14), (14, 15), (15, 17)]:
            seen = None if mask is None else mask[:, :end]
            with torch.no_grad():
                found.append(
                    model(tokens[:, begin:end], attention_mask=seen, past_key_values=cache).logits
                )
        logits = torch.cat(found, 1)
        if mask is not None:
            logits = logits.masked_fill(mask[..., None] == 0, 0.0)
        results.append([logits])
    compare(name, results, mask is None)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_writes_the_same_tokens(name):
    tokens = torch.randint(3, 97, (3, 17))
    mask = padded(("none", "left", "left"))
    ours, other, _ = models(name)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(ours.generate(tokens, **options), other.generate(tokens, **options))


TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
THEIR_OWN = {
    "bloom": BloomConfig(**TINY, n_layer=2),
    "codegen": CodeGenConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "mpt": MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "xglm": XGLMConfig(
        vocab_size=97, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48,
        max_position_embeddings=64,
    ),
    "roformer": RoFormerConfig(
        **TINY, num_hidden_layers=2, intermediate_size=48, is_decoder=True, embedding_size=32
    ),
}  # fmt: skip
"""Models that know no attention but their own."""


@pytest.mark.parametrize("name", THEIR_OWN)
@pytest.mark.parametrize("side", [None, "left"])
def test_models_that_attend_by_themselves(name, side):
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(THEIR_OWN[name]).eval()
    for parameter in other.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    ours = AutoModelForCausalLM.from_config(THEIR_OWN[name], attn_implementation="gpt2fast").eval()
    ours.load_state_dict(other.state_dict())
    tokens = torch.randint(3, 97, (3, 9))
    mask = None if side is None else padded((side,) * 3, 9)
    real = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        found = [m(tokens, attention_mask=mask).logits for m in (ours, other)]
    for each in found:
        each.masked_fill_(real[..., None] == 0, 0.0)
    assert torch.equal(*found)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": real}
    assert torch.equal(ours.generate(tokens, **options), other.generate(tokens, **options))


def test_packed_sequences_are_kept_apart():
    tokens = torch.randint(3, 97, (1, 17))
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
    with torch.no_grad():
        ours, other, exact = (m(tokens, position_ids=positions).logits for m in models("llama"))
        whole = models("llama")[2](tokens).logits
    assert (whole - exact).abs().max() > 0.1
    assert_close([ours], [other], [exact], times=3.0)


def test_a_mask_of_the_users_own():
    tokens = torch.randint(3, 97, (2, 9))
    mask = torch.rand(2, 1, 9, 9) < 0.7
    mask |= torch.eye(9, dtype=torch.bool)
    with torch.no_grad():
        ours, other, exact = (m(tokens, attention_mask=mask).logits for m in models("gpt2"))
    assert_close([ours], [other], [exact], times=3.0)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_was_changed_is_taken_as_it_is(inference):
    with torch.inference_mode(inference):
        _change_a_mask()


def _change_a_mask() -> None:
    mask = attention.attention_mask(
        batch_size=2, q_length=5, kv_length=5, attention_mask=padded(("none", "right"), 5).bool()
    )
    assert mask is not None
    layer, (q, k, v) = nn.Identity(), torch.randn(3, 2, 4, 5, 16)
    with record_calls() as calls:
        before, _ = attention.attention(layer, q, k, v, mask)
        mask[:, :, 3, 1] = False
        changed, _ = attention.attention(layer, q, k, v, mask)
        sliced, _ = attention.attention(layer, q, k, v, mask[:, :, :, :])
    assert len(calls) == 1
    assert torch.equal(changed, sliced) and not torch.equal(before[:, 3], changed[:, 3])


def test_dropout_drops_and_is_seeded():
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.attn_pdrop = 0.5
    model = AutoModelForCausalLM.from_config(config, attn_implementation="gpt2fast").train()
    tokens = torch.randint(97, (2, 9))

    def logits(seed):
        torch.manual_seed(seed)
        return model(tokens).logits

    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gemma2", "torch runs this attention, since its scores are capped"),
        ("gpt_oss", "torch runs this attention, since its softmax has sinks"),
        ("mistral", "SDPA runs this attention, since its mask is not just causal or padding"),
    ],
)
def test_what_does_not_run_on_the_kernels_is_said_once(name, says, monkeypatch):
    monkeypatch.setattr(attention, "_told", set())
    model, tokens = models(name)[0], torch.randint(3, 97, (1, 12))
    with pytest.warns(UserWarning, match=says):
        model(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens)


def test_compiled_models():
    tokens = torch.randint(3, 97, (2, 16))
    with torch.no_grad():
        ours, other, exact = models("llama")
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        found = [compiled(tokens).logits, compiled(tokens, attention_mask=None).logits]
        for each in found:
            assert_close([each], [other(tokens).logits], [exact(tokens).logits], times=3.0)


def test_a_compiled_step_of_generation():
    # Its mask is made outside of the compiled program.
    tokens = torch.randint(3, 97, (1, 9))
    ours, other, _ = models("gpt2")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    config = CompileConfig(fullgraph=True, backend="aot_eager")
    config._compile_all_devices = True
    found = ours.generate(tokens, **options, compile_config=config)
    assert torch.equal(found, other.generate(tokens, **options))


def test_fake_tensors():
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"], attn_implementation="gpt2fast")
        tokens = torch.ones(2, 9, dtype=torch.int64)
        assert model(tokens, attention_mask=torch.ones_like(tokens)).logits.shape == (2, 9, 97)


@pytest.mark.parametrize("found", [None, "5.19.3"])
def test_another_transformers_is_named(found, monkeypatch):
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(
        ImportError, match=r'needs transformers 5\.20 or later: pip install -U "gpt'
    ):
        runpy.run_path(gpt2fast.hf.__file__)


def test_it_is_known_to_transformers(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="gpt2fast")
    assert loaded.config._attn_implementation == "gpt2fast" == attention.NAME
    loaded.save_pretrained(tmp_path)
    assert "gpt2fast" not in (tmp_path / "config.json").read_text()
    gpt2fast.hf.register()  # again, without harm
