"""The attention that the page shows is that of the model's own pass."""

from __future__ import annotations

import pytest
import torch

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import GenerationError
from gpt2fast.inference.packed import PackedGPT2
from gpt2fast.inference.packing import pack_weights
from gpt2fast.ops.packed import QuantizedMatrix
from gpt2fast.quantization import quantize_weights
from gpt2fast.serving import attention
from gpt2fast.serving.attention import attention_response, attention_weights
from gpt2fast.tokenizer import BPETokenizer
from tolerance import assert_close, assert_equal

CONFIG = GPT2Config(
    n_layer=3, n_head=3, n_embd=51, n_inner=70, vocab_size=301, n_positions=40,
    scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False, activation_function="gelu",
)  # fmt: skip
TOKENIZER = BPETokenizer.train(["the cat sat on the mat, and the cat sat. " * 20], 270)


def random_model(config: GPT2Config = CONFIG) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_tokens(count: int = 17) -> list[int]:
    drawn = torch.randint(0, 260, (count,), generator=torch.Generator().manual_seed(1))
    return drawn.tolist()


def in_format(model: GPT2, name: str) -> PackedGPT2:
    if name.startswith("int"):
        return pack_weights(model, quantize_weights(model, name, method="nearest"))
    return pack_weights(GPT2.to(model, getattr(torch, name)))


def unpacked(packed: PackedGPT2) -> GPT2:
    """A GPT2 with the weights that `packed` stores."""
    model = GPT2(packed.config).eval()
    state = {}
    for name in model.state_dict():
        value = packed.weights.get(name)
        value = value.dequantize() if isinstance(value, QuantizedMatrix) else value.float()
        state[name] = value.t() if name in ("wte.weight", "lm_head.weight") else value
    model.load_state_dict(state)
    return model


def weights_of_forward(model: GPT2, tokens: list[int], layer: int, head: int) -> torch.Tensor:
    found = model(torch.tensor([tokens]), output_attentions=True).attentions
    assert found is not None
    return found[layer][0, head]


@pytest.mark.parametrize("form", [None, "float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize(("layer", "head"), [(0, 0), (0, 2), (2, 1)])
def test_weights_are_those_of_the_forward_pass(form: str | None, layer: int, head: int) -> None:
    model: GPT2 | PackedGPT2 = random_model()
    plain = model
    if form is not None:
        model = in_format(random_model(), form)
        plain = unpacked(model)
    assert isinstance(plain, GPT2)
    tokens = some_tokens()
    with torch.no_grad():
        theirs = weights_of_forward(plain, tokens, layer, head)
        exact = weights_of_forward(plain.double(), tokens, layer, head)
    if form is None:
        model = plain.float()
    assert_close([attention_weights(model, tokens, layer, head)], [theirs], [exact], times=3)


def test_the_newest_tokens_look_at_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    whole = attention_weights(model, some_tokens(), 2, 1)
    monkeypatch.setattr(attention, "MOST_ROWS", 5)
    assert_equal(attention_weights(model, some_tokens(), 2, 1), whole[-5:])
    rows = attention_response(model, TOKENIZER, some_tokens(), 2, 1)["weights"]
    assert [len(row) for row in rows] == [13, 14, 15, 16, 17]


def test_the_response_has_the_texts_and_a_triangle_of_weights() -> None:
    model = random_model()
    ids = TOKENIZER.encode("the cat 猫 sat")
    response = attention_response(model, TOKENIZER, ids, 1, 0)
    assert "".join(response["tokens"]) == "the cat 猫 sat"
    assert len(response["tokens"]) == len(ids)
    assert [len(row) for row in response["weights"]] == list(range(1, len(ids) + 1))
    for row in response["weights"]:
        assert sum(row) == pytest.approx(1, abs=1e-5 * len(row))
    assert (response["layers"], response["heads"]) == (3, 3)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    ids = TOKENIZER.encode("猫")[:-1]
    assert attention_response(random_model(), TOKENIZER, ids, 0, 0)["tokens"][-1] == "�"


def test_a_module_with_a_hook_is_called() -> None:
    model, calls = random_model(), []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    attention_weights(model, some_tokens(), 1, 0)
    assert calls


@pytest.mark.parametrize("packed", [False, True])
def test_what_the_model_does_not_have_is_refused(packed: bool) -> None:
    model: GPT2 | PackedGPT2 = random_model()
    if packed:
        model = in_format(random_model(), "float32")
    for tokens, layer, head, message in [
        ([1], 3, 0, "layer is 3; this model has 3, so it is a whole number from 0 to 2"),
        ([1], 0, -1, "head is -1; this model has 3"),
        ([1], True, 0, "layer is True"),
        ([], 0, 0, "at least one token"),
        ([1, 301], 0, 0, "301 is outside the vocabulary"),
        ([1, -1], 0, 0, "-1 is outside the vocabulary"),
        ([1] * 41, 0, 0, "41 tokens exceed this model's n_positions=40"),
    ]:
        with pytest.raises(GenerationError, match=message):
            attention_weights(model, tokens, layer, head)


def test_weights_that_are_not_numbers_are_refused() -> None:
    model = random_model()
    with torch.no_grad():
        model.blocks[0].attn.c_attn.bias.fill_(torch.nan)
    with pytest.raises(GenerationError, match="not a number"):
        attention_weights(model, some_tokens(), 0, 0)


def test_an_attention_of_another_kind_is_refused() -> None:
    model = random_model()
    model.h[1].attn = torch.nn.Identity()
    with pytest.raises(GenerationError, match="Identity"):
        attention_weights(model, some_tokens(), 1, 0)
