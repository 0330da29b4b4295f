"""Another number of tokens: the model that comes of it, and what may not go on with the old one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import ArgumentError, ConfigError
from gpt2fast.inference.cuda_graphs import CapturedStep
from gpt2fast.inference.graph_pool import addresses, pool_of
from gpt2fast.lora import add_adapters, merge, save_adapter
from gpt2fast.lora.adapters import adapted

OLD = 61
IDS = torch.tensor([[1, 2, 3, 60], [9, 8, 7, 0]])
SIZES = [62, 64, 300, 60, 11, OLD]


def make(tied=True, **options) -> GPT2:
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=OLD, n_positions=32, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None, tie_word_embeddings=tied, **options,
    )  # fmt: skip
    return GPT2(config).eval()


def theirs(model: GPT2, tmp_path) -> transformers.GPT2LMHeadModel:
    model.save_pretrained(tmp_path)
    return transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


def greedy(model: GPT2, ids: torch.Tensor, new: int) -> torch.Tensor:
    """By forward passes alone, which keep nothing."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_model_is_the_one_that_transformers_makes(tied, size, tmp_path):
    model = make(tied)
    other = theirs(model, tmp_path)
    before = model(IDS).logits
    assert model.resize_token_embeddings(size) is model.wte
    other.resize_token_embeddings(size)

    ids = IDS.clamp(max=size - 1)
    assert model.config.vocab_size == other.config.vocab_size == size
    assert model.wte.weight.shape == other.transformer.wte.weight.shape == (size, 32)
    assert ("lm_head.weight" in dict(model.named_parameters())) is not tied
    assert sum(p.numel() for p in model.parameters()) == model.config.parameter_count
    if size >= OLD:
        assert torch.equal(model(ids).logits[..., :OLD], before)
    # Its noise has a variance of 1e-9 times the old rows' covariance.
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_new_rows_are_the_mean_of_the_old_ones(dtype):
    model = make(tied=False).to(dtype)
    means = [w.double().mean(0) for w in (model.wte.weight, model.lm_head.weight)]
    model.resize_token_embeddings(OLD + 3)
    bound = torch.finfo(dtype).eps
    for weight, mean in zip((model.wte.weight, model.lm_head.weight), means, strict=True):
        assert weight.dtype == dtype
        torch.testing.assert_close(
            weight[OLD:].double(), mean.expand(3, -1), atol=bound, rtol=bound
        )


def test_new_rows_are_drawn_where_that_is_asked_for():
    model = make()
    model.resize_token_embeddings(OLD + 2000, mean_resizing=False)
    rows = model.wte.weight[OLD:].detach()
    assert rows.mean().abs() < 0.01
    assert rows.std() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize(
    ("size", "multiple", "expected"), [(None, 64, 64), (62, 64, 64), (64, 64, 64), (65, 8, 72)]
)
def test_a_vocabulary_is_rounded_up_as_in_transformers(size, multiple, expected, tmp_path):
    model = make()
    other = theirs(model, tmp_path)
    model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    other.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    assert model.config.vocab_size == other.config.vocab_size == expected


def test_nothing_is_asked_for():
    model = make()
    weight = model.wte.weight
    assert model.resize_token_embeddings() is model.wte
    assert model.wte.weight is weight and model.config.vocab_size == OLD


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_model_is_saved_and_loaded(tied, tmp_path):
    model = make(tied)
    model.resize_token_embeddings(OLD + 5)
    ids = torch.tensor([[1, OLD, OLD + 4]])
    logits = model(ids).logits
    other = theirs(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, logits, atol=2e-5, rtol=1e-5)
    again = GPT2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids).logits, logits)


def test_what_a_parameter_is_stays():
    model = make(tied=False).train()
    model.lm_head.weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    model(IDS, labels=IDS).loss.backward()
    model.resize_token_embeddings(OLD + 1)
    assert all(parameters[name] is now for name, now in model.named_parameters())
    assert model.training and model.wte.weight.grad is None
    assert model.wte.weight.requires_grad and not model.lm_head.weight.requires_grad
    model.resize_token_embeddings(OLD + 2)
    model(IDS + 2, labels=IDS).loss.backward()
    assert model.wte.weight.grad.shape == (OLD + 2, 32)


def test_an_optimizer_trains_the_new_rows():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.resize_token_embeddings(OLD + 1)
    before = model.wte.weight.detach().clone()
    model(IDS + 1, labels=IDS).loss.backward()
    optimizer.step()
    assert (model.wte.weight != before).all()
    model.resize_token_embeddings(OLD + 2)
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [OLD + 7, OLD - 20])
def test_decoding_goes_on_with_the_new_table(dtype, size):
    """Packed copies are made of the weights, and kept."""
    model = make(tied=False).to(dtype)
    ids = IDS.clamp(max=size - 1)
    model.generate(ids, max_new_tokens=4)
    model.resize_token_embeddings(size)
    with torch.no_grad():
        if size > OLD:
            model.lm_head.weight[size - 1] = 3 * model.lm_head.weight[:OLD].sum(0)
        expected = greedy(model, ids, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6, use_cache=False), expected)
    cache = model.new_cache(2)
    model(ids, cache=cache)
    assert model.decode_step(ids[:, 0], cache).shape == (2, size)


def test_a_cache_goes_on(tmp_path):
    """Keys and values do not depend on how many tokens there are."""
    model = make()
    cache = model.new_cache(2)
    with torch.no_grad():
        model(IDS, cache=cache)
        model.resize_token_embeddings(OLD + 3)
        expected = model(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1]
        torch.testing.assert_close(model.decode_step(IDS[:, 0], cache), expected)


def test_captured_steps_go_with_the_old_table():
    model = make()
    key = (1, 8, torch.float32)
    steps = CapturedStep(model, *key, samples=False)
    pool = pool_of(model)
    assert pool.take(addresses(model), key, lambda: steps) is steps
    pool.give_back(steps)
    assert len(pool) == 1
    model.resize_token_embeddings(OLD + 1)
    assert len(pool) == 0


def test_compiled_models_read_the_new_table():
    model = make()
    compiled = torch.compile(model, backend="eager")
    compiled(IDS)
    model.resize_token_embeddings(OLD + 3)
    ids = IDS + 3
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_logits_that_were_put_off_are_not_computed_with_another_table():
    model = make()
    output = model(IDS, labels=IDS)
    model.resize_token_embeddings(OLD + 1)
    with pytest.raises(ArgumentError, match="weights were changed"):
        _ = output.logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


def test_hooks_stay():
    model = make()
    seen = []
    model.wte.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.generate(IDS, max_new_tokens=1)
    model.resize_token_embeddings(OLD + 1)
    model(IDS + 1)
    assert seen[-1] == (2, 4, 32)


def test_an_embedding_of_ones_own_stays():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    model = make()
    model.wte = Scaled(OLD, 32, padding_idx=60)
    model.resize_token_embeddings(OLD + 1)
    assert type(model.wte) is Scaled and model.wte.padding_idx == 60
    assert model(IDS + 1).logits.shape == (2, 4, OLD + 1)
    model.resize_token_embeddings(60)
    assert model.wte.padding_idx is None


def test_adapters_stay_beside_a_resized_model(tmp_path):
    model = make()
    add_adapters(model, rank=2)
    for projection in adapted(model).values():
        nn.init.normal_(projection.lora_B)
    before = model(IDS).logits
    merged = merge(model)
    model.resize_token_embeddings(OLD + 4)
    assert not model.wte.weight.requires_grad
    ids = torch.tensor([[5, OLD + 3, 2]])
    assert torch.equal(model(IDS).logits[..., :OLD], before)
    assert merged(IDS).logits.shape[-1] == merged.config.vocab_size == OLD
    expected = greedy(model, ids, 5)
    assert torch.equal(model.generate(ids, max_new_tokens=5), expected)
    other = theirs(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)


def test_adapters_alone_are_not_saved_where_embeddings_are_trained_as_well(tmp_path):
    model = make()
    model.resize_token_embeddings(OLD + 1)
    add_adapters(model, rank=2)
    save_adapter(model, tmp_path / "frozen")  # what was resized is the mean, which can be made anew
    again = make()
    state = merge(model).state_dict()
    again.load_state_dict({**state, "wte.weight": state["wte.weight"][:OLD]})
    again.resize_token_embeddings(OLD + 1)
    assert torch.equal(again(IDS + 1).logits, model(IDS + 1).logits)
    model.wte.weight.requires_grad_(True)
    with pytest.raises(ArgumentError, match="wte.weight is trained beside the adapters"):
        save_adapter(model, tmp_path / "trained")
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_data_is_resized(tied):
    with torch.device("meta"):
        model = make(tied)
    model.resize_token_embeddings(OLD + 3)
    model.to_empty(device="cpu").reset_parameters()
    assert model(IDS + 3).logits.shape == (2, 4, OLD + 3)


def test_models_of_inference_mode_are_resized():
    with torch.inference_mode():
        model = make()
        model.resize_token_embeddings(OLD + 1)
    model.resize_token_embeddings(OLD + 3)
    with torch.no_grad():
        assert torch.equal(model.generate(IDS + 3, max_new_tokens=4), greedy(model, IDS + 3, 4))
    trained = make()
    with torch.inference_mode():
        trained.resize_token_embeddings(OLD + 3)
    trained(IDS + 3, labels=IDS).loss.backward()


@pytest.mark.parametrize("size", [0, -1, 2.0, 65.5, "70", True, [70], torch.tensor([1, 2])])
@pytest.mark.parametrize("name", ["new_num_tokens", "pad_to_multiple_of"])
def test_a_size_that_is_none_is_named(name, size):
    model = make()
    with pytest.raises(ArgumentError, match=name):
        model.resize_token_embeddings(**{name: size})
    assert model.config.vocab_size == len(model.wte.weight) == OLD


def test_a_size_beyond_all_vocabularies_is_refused_before_anything_changes():
    model = make()
    with pytest.raises(ConfigError, match="vocab_size=99999999999"):
        model.resize_token_embeddings(99999999999)
    assert torch.equal(model(IDS).logits, copy.deepcopy(model)(IDS).logits)


class _Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class _Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def _released(model):
    model.pack(release=True)


def _parametrized(model):
    parametrize.register_parametrization(model.wte, "weight", _Doubled())


def _wrapped(model):
    model.wte = _Wrapped(model.wte)


def _wrapped_head(model):
    model.lm_head = _Wrapped(model.lm_head)


def _added_head(model):
    model.lm_head = nn.Linear(32, OLD, bias=False)


@pytest.mark.parametrize(
    ("change", "tied", "says"),
    [
        (_released, True, "were released"),
        (_parametrized, True, "wte is a ParametrizedEmbedding"),
        (_wrapped, True, "wte is a _Wrapped"),
        (_wrapped_head, False, "lm_head is a _Wrapped"),
        (_added_head, True, "lm_head, a Linear, was added"),
    ],
)
def test_what_has_no_table_of_its_own_is_refused_by_name(change, tied, says):
    model = make(tied)
    change(model)
    before = model.config
    with pytest.raises(ArgumentError, match=says):
        model.resize_token_embeddings(OLD + 1)
    assert model.config is before


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_packed_weights_are_refused_by_name(scheme):
    model = make()
    packed = model.pack() if scheme is None else model.quantize(scheme)
    with pytest.raises(ArgumentError, match="packed weights .* cannot be resized: resize the GPT2"):
        packed.resize_token_embeddings(OLD + 1)
