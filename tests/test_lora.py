"""Low-rank adapters: what they compute, train, leave alone, and what else reads the weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2fast import GPT2, backend
from gpt2fast.lora import add_adapters, is_adapted, merge
from gpt2fast.lora.adapters import adapted
from small_adapters import ALL, CONFIG, adapted_model, random_model, tokens
from tolerance import assert_close

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
