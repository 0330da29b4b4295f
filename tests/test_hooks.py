"""Whoever watches or changes a module sees and does what transformers' module of that name would.

Every way to get between a module and its caller is tried on every module, in both models, and the
logits, gradients, tokens and captured values have to be the same.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from transformers import GPT2LMHeadModel

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import ArgumentError
from gpt2fast.ops.backend import record_calls

MODULES = [
    "wte", "wpe", "drop", "h.1", "h.1.ln_1", "h.1.attn", "h.1.attn.c_attn", "h.1.attn.c_proj",
    "h.1.attn.resid_dropout", "h.1.ln_2", "h.1.mlp", "h.1.mlp.c_fc", "h.1.mlp.act",
    "h.1.mlp.c_proj", "h.1.mlp.dropout", "ln_f",
]  # fmt: skip
WEIGHTED = ["wpe", "h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_fc", "h.1.mlp.c_proj"]
TOKENS = torch.tensor([[5, 7, 60, 2, 2, 8], [0, 1, 2, 3, 4, 9]])
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
STEPS = 6


@pytest.fixture
def models(tmp_path):
    torch.manual_seed(5)
    config = GPT2Config(
        n_layer=3, n_head=2, n_embd=32, vocab_size=61, n_positions=32, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    ours = GPT2(config).eval()
    ours.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    return ours, theirs


def parts(models, name):
    ours, theirs = models
    return ours.get_submodule(name), theirs.transformer.get_submodule(name)


def first(value):
    return value[0] if isinstance(value, tuple) else value


def changed(value):
    """Another value of the same shape; transformers' attention returns its weights as well."""
    return (changed(value[0]), *value[1:]) if isinstance(value, tuple) else value * 1.7 + 0.3


def change_output(module):
    module.register_forward_hook(lambda module, inputs, output: changed(output))


def change_output_knowing_keywords(module):
    module.register_forward_hook(
        lambda module, inputs, keywords, output: changed(output), with_kwargs=True
    )


def wrap_forward(module):
    before = module.forward
    module.forward = lambda *args, **kwargs: changed(before(*args, **kwargs))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return changed(self.inner(*args, **kwargs))


WAYS = {
    "hook": change_output,
    "hook with keywords": change_output_knowing_keywords,
    "wrapped forward": wrap_forward,
    "replaced": None,
}


def apply(models, name, way):
    if WAYS[way] is not None:
        for module in parts(models, name):
            WAYS[way](module)
        return
    for model, root in zip(models, (models[0], models[1].transformer), strict=True):
        parent, _, last = name.rpartition(".")
        holder = root.get_submodule(parent)
        wrapper = Wrapper(root.get_submodule(name))
        if isinstance(holder, nn.ModuleList):
            holder[int(last)] = wrapper
        else:
            setattr(holder, last, wrapper)
        assert model is not None


def close(ours, theirs):
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def assert_same(models, name=None):
    """Logits, gradients and continuations."""
    ours, theirs = models
    close(ours(TOKENS).logits, theirs(TOKENS).logits)
    mask = PADDED[:, :, None].bool()
    mine = ours(TOKENS, PADDED).logits
    places = (PADDED.cumsum(1) - 1).clamp(min=0)
    other = theirs(TOKENS, attention_mask=PADDED, position_ids=places).logits
    mine = ours(TOKENS, PADDED, position_ids=places).logits
    close(mine[mask.expand_as(mine)], other[mask.expand_as(other)])
    mine, other = ours(TOKENS, labels=TOKENS).loss, theirs(TOKENS, labels=TOKENS).loss
    close(mine, other)
    mine.backward()
    other.backward()
    their_gradients = dict(theirs.transformer.named_parameters())
    compared = 0
    for key, parameter in ours.named_parameters():
        if parameter.grad is not None and key in their_gradients:
            theirs_ = their_gradients[key].grad
            assert (parameter.grad - theirs_).norm() <= 1e-3 * theirs_.norm() + 1e-6, key
            compared += 1
    assert compared > 10
    assert_same_tokens(models)


def assert_same_tokens(models):
    ours, theirs = models
    options = {"max_new_tokens": STEPS, "do_sample": False}
    for prompt, mask in [(TOKENS, None), (TOKENS, PADDED)]:
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt) if mask is None else mask,
            pad_token_id=0,
            **options,
        )
        assert ours.generate(prompt, mask, **options).tolist() == expected.tolist()
    beams = {**options, "num_beams": 3}
    expected = theirs.generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), pad_token_id=0, **beams
    )
    assert ours.generate(TOKENS, **beams).tolist() == expected.tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_what_changes_a_module_changes_all_that_transformers_changes(models, name, way):
    plain = models[0].generate(TOKENS, max_new_tokens=STEPS)
    apply(models, name, way)
    if name == "h.1" and way == "replaced":
        return assert_replaced_block(models)
    assert_same(models)
    if name != "h.1.ln_1":  # the test would prove nothing where the tokens stay
        assert models[0].generate(TOKENS, max_new_tokens=STEPS).shape == plain.shape
    return None


def assert_replaced_block(models):
    ours, theirs = models
    close(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert_same_tokens(models)


@pytest.mark.parametrize("name", MODULES)
def test_every_step_of_decoding_shows_what_transformers_shows(models, name):
    """Values that go in and come out: of the prompt, then of each new token."""
    seen = [[], []]
    for kept, module in zip(seen, parts(models, name), strict=True):
        module.register_forward_hook(
            lambda module, inputs, output, kept=kept: kept.append(
                (first(inputs).detach().clone(), first(output).detach().clone())
            )
        )
    ours, theirs = models
    options = {"max_new_tokens": STEPS, "do_sample": False}
    ours.generate(TOKENS, **options)
    theirs.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), pad_token_id=0, **options)
    assert len(seen[0]) == len(seen[1]) == STEPS
    for mine, other in zip(*seen, strict=True):
        if name != "wpe":  # positions of one row serve all
            assert mine[0].shape == other[0].shape
            close(mine[0].float(), other[0].float())
        close(mine[1].expand_as(other[1]) if name == "wpe" else mine[1], other[1])


@pytest.mark.parametrize("name", MODULES)
def test_a_hook_before_a_module_changes_what_goes_in(models, name):
    def shift(module, inputs):
        value = inputs[0]
        value = (value + 1) % 7 if not value.is_floating_point() else value * 0.6 - 0.2
        return (value, *inputs[1:])

    for module in parts(models, name):
        module.register_forward_pre_hook(shift)
    assert_same(models)


@pytest.mark.parametrize("name", MODULES)
def test_backward_hooks_see_the_gradients(models, name):
    seen = [[], []]
    for kept, module in zip(seen, parts(models, name), strict=True):
        module.register_full_backward_hook(
            lambda module, grad_in, grad_out, kept=kept: kept.append(first(grad_out))
        )
    ours, theirs = models
    ours(TOKENS, labels=TOKENS).loss.backward()
    theirs(TOKENS, labels=TOKENS).loss.backward()
    (mine,), (other,) = seen
    close(mine.sum(0) if name == "wpe" else mine, other.sum(0) if name == "wpe" else other)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2.0 + 0.1


@pytest.mark.parametrize("name", [*WEIGHTED, "wte", "h.1.ln_2", "ln_f"])
def test_parametrized_weights_are_in_effect_everywhere(models, name):
    for module in parts(models, name):
        parametrize.register_parametrization(module, "weight", Doubled())
    ours, theirs = models
    close(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert_same_tokens(models)
    with pytest.raises(ArgumentError, match="parametrization"):
        ours.pack()
    with pytest.raises(ArgumentError, match="parametrization"):
        ours.quantize("int8")


@pytest.mark.parametrize("name", WEIGHTED)
def test_pruned_weights_are_in_effect_everywhere(models, name):
    for module in parts(models, name):
        prune.l1_unstructured(module, "weight", amount=0.5)
    ours, theirs = models
    close(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert_same_tokens(models)


class HandMadeLoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(1)
        inputs, outputs = base.weight.shape
        self.a = nn.Parameter(torch.randn(inputs, 2, generator=generator))
        self.b = nn.Parameter(torch.randn(2, outputs, generator=generator))

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b


@pytest.mark.parametrize("name", WEIGHTED[1:])
def test_a_hand_made_adapter_is_in_effect_everywhere(models, name):
    parent, _, last = name.rpartition(".")
    for root in (models[0], models[1].transformer):
        holder = root.get_submodule(parent)
        setattr(holder, last, HandMadeLoRA(getattr(holder, last)))
    assert_same(models)


@pytest.mark.parametrize("steps", ["decode_step", "forward"])
def test_loops_of_ones_own_go_through_hooks(models, steps):
    ours, theirs = models
    for module in parts(models, "h.2.mlp"):
        change_output(module)
    cache = ours.new_cache(len(TOKENS), 16)
    logits = ours(TOKENS, cache=cache).logits[:, -1]
    tokens = TOKENS
    for _ in range(3):
        close(logits, theirs(tokens).logits[:, -1])
        new = logits.argmax(-1)
        tokens = torch.cat([tokens, new[:, None]], 1)
        if steps == "decode_step":
            logits = ours.decode_step(new, cache)
        else:
            logits = ours(new[:, None], cache=cache).logits[:, -1]


def test_a_hook_on_the_model_itself_is_called_at_every_step(models):
    counts = [0, 0]
    for index, model in enumerate(models):

        def bias(module, inputs, output, index=index):
            counts[index] += 1
            output.logits = output.logits + torch.arange(61) / 10
            return output

        model.register_forward_hook(bias)
    assert_same_tokens(models)
    assert counts[0] > 3 * STEPS - 3 and counts[0] == counts[1]


def test_a_hook_for_all_modules_sees_every_step(models):
    ours, _ = models
    seen = []
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        ours.generate(TOKENS, max_new_tokens=STEPS)
    finally:
        handle.remove()
    for name in MODULES:
        assert seen.count(ours.get_submodule(name)) == STEPS, name


def test_checkpointed_blocks_are_called_where_they_are_watched(models):
    ours, theirs = models
    for module in parts(models, "h.1"):
        change_output(module)
    ours.train().gradient_checkpointing = True
    for module in [*ours.modules(), *theirs.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for block in ours.blocks:
        block.attn.dropout = 0.0
    loss, other = ours(TOKENS, labels=TOKENS).loss, theirs(TOKENS, labels=TOKENS).loss
    loss.backward()
    other.backward()
    close(ours.wte.weight.grad, theirs.transformer.wte.weight.grad)


HEADS = {
    "hook": lambda model: change_output(model.lm_head),
    "pre-hook": lambda model: model.lm_head.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * 0.5 + 0.1,)
    ),
    "wrapped forward": lambda model: wrap_forward(model.lm_head),
    "replaced": lambda model: setattr(model, "lm_head", Wrapper(model.lm_head)),
}


@pytest.mark.parametrize("way", HEADS)
def test_a_tied_head_is_watched_and_changed_as_in_transformers(models, way):
    for model in models:
        HEADS[way](model)
    assert_same(models)


def test_a_tied_head_sees_what_transformers_head_sees(models):
    seen = [[], []]
    for model, calls in zip(models, seen, strict=True):
        model.lm_head.register_forward_hook(
            lambda module, inputs, output, calls=calls: calls.append((inputs[0], output))
        )
    with torch.no_grad():
        assert_same_tokens(models)
        models[0](TOKENS, labels=TOKENS)
        models[1](TOKENS, labels=TOKENS)
    for mine, other in zip(seen[0][-1], seen[1][-1], strict=True):
        close(mine, other)
    assert len(seen[0]) > STEPS


def test_a_tied_head_has_no_weight_of_its_own(models, tmp_path):
    ours, theirs = models
    assert ours.lm_head.weight is ours.wte.weight
    assert not list(ours.lm_head.parameters()) and "lm_head.weight" not in ours.state_dict()
    hidden = torch.randn(2, 32)
    close(ours.lm_head(hidden), theirs.lm_head(hidden))  # what a logit lens does
    with record_calls() as calls:
        ours.generate(TOKENS, max_new_tokens=2)
    if ours.can_be_packed():  # nobody watches it
        assert any(call.op == "packed_next" for call in calls)
    torch.save(ours, tmp_path / "model.pt")
    for twin in (copy.deepcopy(ours), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert twin.lm_head.weight is twin.wte.weight is not ours.wte.weight
    shallow = copy.copy(ours)
    del shallow
    assert ours.lm_head.weight is ours.wte.weight
    alone = copy.deepcopy(ours).lm_head  # its model is gone without a collection of garbage
    with pytest.raises(ArgumentError, match="model that is gone"):
        alone(hidden)


def test_an_untied_heads_hooks_are_in_effect(tmp_path):
    torch.manual_seed(5)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=61, n_positions=32, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    ours = GPT2(config).eval()
    ours.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    weights = torch.arange(61) / 10
    for model in (ours, theirs):
        model.lm_head.register_forward_hook(lambda module, inputs, output: output - weights)
    close(ours(TOKENS, labels=TOKENS).loss, theirs(TOKENS, labels=TOKENS).loss)
    assert_same_tokens((ours, theirs))


def test_a_removed_hook_gives_the_fast_path_back(models):
    ours, _ = models
    handle = ours.h[0].mlp.register_forward_hook(lambda *args: None)
    with record_calls() as calls:
        watched = ours.generate(TOKENS, max_new_tokens=STEPS)
    assert not any(call.op in ("packed_next", "packed_step", "decode_step") for call in calls)
    handle.remove()
    with record_calls() as calls:
        assert ours.generate(TOKENS, max_new_tokens=STEPS).tolist() == watched.tolist()
    if ours.can_be_packed():
        assert any(call.op == "packed_next" for call in calls)


def test_hooks_survive_a_copy_and_go_with_it(models):
    ours, _ = models
    plain = ours(TOKENS).logits
    twin = copy.deepcopy(ours)
    change_output(twin.ln_f)
    assert torch.equal(ours(TOKENS).logits, plain)
    assert not torch.allclose(twin(TOKENS).logits, plain)
    again = copy.deepcopy(twin)
    assert torch.equal(again(TOKENS).logits, twin(TOKENS).logits)
