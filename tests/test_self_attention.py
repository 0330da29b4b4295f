"""nn.SelfAttention: not causal, with fewer heads of keys, and all that modules go through."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from comparison import BACKENDS, backend
from gpt2fast.errors import ArgumentError
from gpt2fast.nn import CausalSelfAttention, SelfAttention
from gpt2fast.nn.kv_cache import KVCache
from gpt2fast.ops.backend import record_calls
from tolerance import assert_close

FORMS = [(False, None), (False, 2), (False, 1), (True, 2)]
forms = pytest.mark.parametrize(("causal", "key_heads"), FORMS)


def attention(causal, key_heads, dropout=0.0, **options):
    torch.manual_seed(0)
    module = SelfAttention(48, 4, dropout, causal=causal, key_heads=key_heads, **options)
    if module.c_attn.weight.is_meta:
        return module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def formula(module, x, mask=None):
    """The module's result by torch's own attention."""
    time, size = x.shape[1], x.shape[2] // module.heads
    projected = x @ module.c_attn.weight + module.c_attn.bias
    sizes = [x.shape[2], module.key_heads * size, module.key_heads * size]
    q, k, v = (x.unflatten(2, (-1, size)).transpose(1, 2) for x in projected.split(sizes, 2))
    seen = torch.ones(time, time, dtype=torch.bool)
    seen = seen.tril() if module.causal else seen
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, seen, scale=module.scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2) @ module.c_proj.weight + module.c_proj.bias


def results(module, x, run=None):
    """What `run` of the module gives, and gradients of it."""
    x = x.clone().requires_grad_()
    out = (module if run is None else run)(x)
    gradients = torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])
    return [out.detach(), *gradients]


@forms
@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_formula(causal, key_heads, masked):
    module = attention(causal, key_heads)
    exactly = copy.deepcopy(module).double()
    x = torch.randn(2, 17, 48)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[1, 11:] = not masked
    ours = results(module, x, lambda x: module(x, mask.float() if masked else None))
    other = results(module, x, lambda x: formula(module, x, mask))
    exact = results(exactly, x.double(), lambda x: formula(exactly, x, mask))
    assert_close(ours[:1], other[:1], exact[:1], times=2.0)
    assert_close(ours[1:], other[1:], exact[1:], times=3.0)


def test_without_causality_equals_torchs_multihead_attention():
    ours = attention(False, None)
    theirs = nn.MultiheadAttention(48, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.c_attn.weight.t())
        theirs.in_proj_bias.copy_(ours.c_attn.bias)
        theirs.out_proj.weight.copy_(ours.c_proj.weight.t())
        theirs.out_proj.bias.copy_(ours.c_proj.bias)
    x, hidden = torch.randn(2, 17, 48), torch.zeros(2, 17, dtype=torch.bool)
    hidden[0, 9:] = True
    expected = theirs(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
    assert torch.allclose(ours(x, ~hidden), expected, atol=1e-5)


def test_causal_self_attention_is_its_causal_form():
    torch.manual_seed(1)
    causal = CausalSelfAttention(48, 4, 0.1, 0.3, residual_dropout=0.2)
    torch.manual_seed(1)
    general = SelfAttention(48, 4, 0.1, 0.3, residual_dropout=0.2)
    assert causal.state_dict().keys() == general.state_dict().keys()
    general.load_state_dict(causal.state_dict())
    x = torch.randn(2, 9, 48)
    for module in (causal, general):
        module.train()
    torch.manual_seed(2)
    expected = causal(x)
    torch.manual_seed(2)
    assert torch.equal(general(x), expected)
    cache = KVCache(1, 2, 16, 4, 12, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(general.eval()(x, None, cache.layer(0)), causal.eval()(x))


@forms
def test_runs_on_one_fused_op_also_with_dropout(causal, key_heads):
    module = attention(causal, key_heads, dropout=0.5).train()
    x = torch.randn(2, 9, 48)
    with record_calls() as calls:
        torch.manual_seed(3)
        first = module(x)
        torch.manual_seed(3)
        assert torch.equal(module(x), first)
        assert not torch.equal(module(x), first)
    assert [c.op for c in calls if "attention" in c.op] == ["causal_attention"] * 3
    assert torch.equal(module.eval()(x), module(x))


@forms
@pytest.mark.parametrize("masked", [False, True])
def test_a_dropout_of_the_users_own_sees_the_weights(causal, key_heads, masked):
    class Watching(nn.Module):
        def forward(self, weights):
            self.seen = weights
            return weights

    module = attention(causal, key_heads)
    x = torch.randn(2, 9, 48)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = not masked
    expected = module(x, mask)
    module.attn_dropout = Watching()
    with record_calls() as calls:
        found = module(x, mask)
    assert not [call for call in calls if "attention" in call.op]
    assert torch.allclose(found, expected, atol=1e-5)
    weights = module.attn_dropout.seen
    assert weights.shape == (2, 4, 9, 9)
    assert ((weights.triu(1) == 0).all().item()) == causal
    assert (weights[1, :, :, 6:] == 0).all().item() == masked


def test_a_cache_is_refused_where_it_does_not_serve():
    cache = KVCache(1, 2, 16, 4, 12, torch.float32, torch.device("cpu"))
    x = torch.randn(2, 3, 48)
    with pytest.raises(ArgumentError, match="causal=False: .* without a cache"):
        attention(False, None)(x, None, cache.layer(0))
    with pytest.raises(ArgumentError, match="key_heads=2: .* of queries, 4; .* without a cache"):
        attention(True, 2)(x, None, cache.layer(0))
    assert (cache.k == 0).all() and cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("key_heads", [3, 0, -2, 8])
def test_key_heads_that_do_not_divide_the_heads_are_named(key_heads):
    with pytest.raises(ArgumentError, match=f"key_heads={key_heads} does not divide heads=4"):
        SelfAttention(48, 4, key_heads=key_heads)


def test_its_parameters_are_as_narrow_as_its_heads_and_printed():
    module = SelfAttention(48, 4, key_heads=1, causal=False)
    assert module.c_attn.weight.shape == (48, 48 + 2 * 12)
    assert "key_heads=1, causal=False" in repr(module)
    assert "causal" not in repr(SelfAttention(48, 4)).splitlines()[1]


@forms
def test_under_autocast(causal, key_heads):
    module, x = attention(causal, key_heads), torch.randn(2, 9, 48)
    exactly = copy.deepcopy(module).double()
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(module, x)
        other = results(module, x, lambda x: formula(module, x))
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    exact = results(exactly, x.double(), lambda x: formula(exactly, x))
    assert_close(ours[:1], other[:1], exact[:1], times=2.0)
    assert_close(ours[1:], other[1:], exact[1:], times=3.0)


@forms
def test_compiled_into_one_graph(causal, key_heads):
    module, x = attention(causal, key_heads), torch.randn(2, 9, 48)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(results(module, x, compiled), results(module, x), strict=True):
        assert torch.allclose(mine, plain, atol=1e-6)


@forms
def test_exported(causal, key_heads):
    module, x = attention(causal, key_heads).eval(), torch.randn(2, 9, 48)
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), module(x))


@forms
def test_called_with_other_parameters(causal, key_heads):
    module, x = attention(causal, key_heads), torch.randn(2, 9, 48)
    other = {name: 2 * p.detach() for name, p in module.named_parameters()}
    expected = copy.deepcopy(module)
    expected.load_state_dict(other)
    assert torch.equal(torch.func.functional_call(module, other, (x,)), expected(x))

    x, expected = x.double(), expected.double()
    other = {name: parameter.double() for name, parameter in other.items()}

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x[None],)).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(other, x)
    for name, parameter in expected.named_parameters():
        for row in range(2):
            (alone,) = torch.autograd.grad(expected(x[row][None]).sin().sum(), parameter)
            assert torch.allclose(each[name][row], alone), name


@forms
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(causal, key_heads, reentrant):
    module, x = attention(causal, key_heads, dropout=0.3).train(), torch.randn(2, 9, 48)

    def run(x):
        return checkpoint(module, x, use_reentrant=reentrant)

    torch.manual_seed(4)
    x = x.requires_grad_()
    run(x).sin().sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    torch.manual_seed(4)
    module(x).sin().sum().backward()
    for mine, plain in zip(found, (p.grad for p in module.parameters()), strict=True):
        assert torch.allclose(mine, plain, atol=1e-6)


@forms
def test_on_the_meta_device_and_back(causal, key_heads):
    module = attention(causal, key_heads, device="meta")
    assert module(torch.empty(2, 9, 48, device="meta")).shape == (2, 9, 48)
    made = module.to_empty(device="cpu")
    given = attention(causal, key_heads)
    made.load_state_dict(given.state_dict())
    x = torch.randn(2, 9, 48)
    assert torch.equal(made(x), given(x))


@forms
def test_copied_pickled_and_saved(causal, key_heads):
    module, x = attention(causal, key_heads), torch.randn(2, 9, 48)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copied in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(copied(x), module(x)) and copied.causal is causal


@forms
@pytest.mark.parametrize("name", [each for each in BACKENDS if each in ("torch", "reference")])
def test_backends_agree(causal, key_heads, name):
    module, x = attention(causal, key_heads), torch.randn(2, 9, 48)
    with backend(name):
        assert torch.allclose(module(x), formula(module, x), atol=1e-4)


def test_masks_that_are_added_to_scores_are_refused():
    attend, x = SelfAttention(16, 2, causal=False), torch.randn(1, 5, 16)
    added = torch.tensor([[0.0, 0.0, 0.0, 0.0, float("-inf")]])
    watched = SelfAttention(16, 2, causal=False)
    watched.attn_dropout = nn.Identity()  # so that attention is computed unfused
    for each in (attend, watched):
        with pytest.raises(ArgumentError, match="negative numbers"):
            each(x, added)
    torch.testing.assert_close(attend(x, (added == 0).float()), attend(x, added == 0))
    with pytest.raises(ArgumentError, match="heads=0"):
        SelfAttention(16, 0)
