"""A model whose modules are not what its configuration says: used as it is, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import ArgumentError

TOKENS = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])


def make(**options) -> GPT2:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=32, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None, **options,
    )  # fmt: skip
    return GPT2(config).eval()


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args) * 1.5


def change_epsilon(model):
    model.ln_f.eps = 0.5


def change_scale(model):
    model.h[1].attn.scale = 3.0


def change_activation(model):
    model.h[0].mlp.act = nn.Identity()


def change_activation_by_name(model):
    model.h[0].mlp.activation = "relu"


def wrap(model):
    model.h[0].mlp.c_fc = Wrapper(model.h[0].mlp.c_fc)


def wrap_embedding(model):
    model.wte = Wrapper(model.wte)


def parametrize_one(model):
    parametrize.register_parametrization(model.h[0].mlp.c_fc, "weight", Doubled())


def prune_one(model):
    prune.l1_unstructured(model.h[0].attn.c_proj, "weight", amount=0.5)


def drop_a_block(model):
    del model.h[1]


def add_a_head(model):
    model.lm_head = nn.Linear(32, 61, bias=False)


CHANGES = [
    change_epsilon, change_scale, change_activation, change_activation_by_name, wrap,
    wrap_embedding, parametrize_one, prune_one, drop_a_block, add_a_head,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_decodes_as_it_computes(change):
    model, plain = make(), make()
    change(model)
    logits = model(TOKENS).logits
    assert not torch.allclose(logits, plain(TOKENS).logits, atol=1e-3)
    expected = TOKENS
    for _ in range(6):
        new = model(expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, new], 1)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=6), expected)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_not_saved_or_packed_as_another(change, tmp_path):
    model = make()
    change(model)
    with pytest.raises(ArgumentError, match="checkpoint cannot say"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ArgumentError, match="cannot be packed"):
        model.pack()
    with pytest.raises(ArgumentError, match="cannot be quantized"):
        model.quantize("int8")


@pytest.mark.parametrize("change", [parametrize_one, prune_one])
def test_a_change_that_was_made_part_of_the_weight_is_saved(change, tmp_path):
    model = make()
    change(model)
    expected = model(TOKENS).logits
    if change is prune_one:
        prune.remove(model.h[0].attn.c_proj, "weight")
    else:
        parametrize.remove_parametrizations(model.h[0].mlp.c_fc, "weight")
    now = model(TOKENS).logits
    # One op does what three did where a module was called: the rounding differs.
    assert (now - expected).norm() <= 1e-5 * expected.norm()
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT2.from_pretrained(tmp_path)(TOKENS).logits, now)


@pytest.mark.parametrize("labels", [None, TOKENS])
def test_a_watched_head_is_called_once(labels):
    model = make(tie_word_embeddings=False)
    calls = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output))
    out = model(TOKENS, labels=labels)
    assert len(calls) == 1 and torch.equal(out.logits, calls[0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_watched_loss_beside_a_watched_head_gets_its_logits(tied):
    model = make(tie_word_embeddings=tied)
    expected = model(TOKENS, labels=TOKENS).loss
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.loss.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    torch.testing.assert_close(model(TOKENS, labels=TOKENS).loss, expected)
    assert torch.equal(seen[0][:, :-1], seen[1])


def test_another_loss_beside_a_watched_head_is_refused():
    model = make()
    model.lm_head.register_forward_hook(lambda *args: None)
    model.loss = Wrapper(model.loss)
    with pytest.raises(ArgumentError, match="loss is a Wrapper"):
        model(TOKENS, labels=TOKENS)


def test_all_modules_may_be_watched_at_once():
    model = make()
    expected = model(TOKENS, labels=TOKENS)
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: called.append(name))
    found = model(TOKENS, labels=TOKENS)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)
    assert {"wte", "h.0.attn", "lm_head", "loss", ""} <= set(called)


def test_a_model_whose_weights_were_released_says_so(tmp_path):
    model = make()
    packed = model.pack(release=True)
    for use in (
        lambda: model(TOKENS),
        lambda: model.generate(TOKENS, max_new_tokens=2),
        lambda: model.decode_step(TOKENS[:, 0], packed.new_cache(2)),
        lambda: model.pack(),
        lambda: model.quantize("int8"),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(ArgumentError, match="released"):
            use()


@pytest.mark.parametrize(
    "move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")]
)
def test_packed_weights_are_not_moved_in_silence(move):
    packed = make().pack()
    expected = packed(TOKENS).logits
    with pytest.raises(ArgumentError, match="pack it again"):
        move(packed)
    assert torch.equal(packed.to("cpu").float()(TOKENS).logits, expected)


def test_a_hook_on_a_packed_model_is_refused_where_it_would_not_be_called():
    packed = make().pack()
    seen = []
    packed.register_forward_hook(lambda *args: seen.append(1))
    packed(TOKENS)
    assert seen
    with pytest.raises(ArgumentError, match="hook"):
        packed.generate(TOKENS, max_new_tokens=2)
