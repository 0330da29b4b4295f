"""Packed weights: the step from token ids to logits, its formats, and the models made of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from comparison import needs_native
from gpt2fast import GPT2, GPT2Config, backend, ops
from gpt2fast.errors import ArgumentError, BackendError, GenerationError, WeightsError
from gpt2fast.inference.packed import PackedGPT2
from gpt2fast.inference.packing import pack_weights
from gpt2fast.ops.backend import record_calls
from gpt2fast.ops.packed import MatrixFormat, ModelShape, PackedWeights, QuantizedMatrix
from gpt2fast.quantization import quantize_weights
from tolerance import assert_allclose, assert_close, assert_equal

CONFIG = GPT2Config(n_layer=2, n_head=3, n_embd=48, vocab_size=101, n_positions=96)
ODD = dataclasses.replace(
    CONFIG, n_embd=51, n_inner=70, tie_word_embeddings=False, activation_function="gelu",
    scale_attn_by_inverse_layer_idx=True, dropout=None,
)  # fmt: skip
FORMATS = {"float32": 0, "bfloat16": 0, "float16": 0, "int8": 64, "int4": 32}


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def in_format(model, name):
    """The model packed in a format."""
    if name == "float32":
        return model.pack()
    if name in ("bfloat16", "float16"):
        copy = GPT2(model.config, dtype=getattr(torch, name))
        copy.load_state_dict(model.state_dict())
        return copy.eval().pack()
    return model.quantize(name, method="nearest")


def unpacked(packed):
    """A float32 GPT2 with the weights that `packed` stores."""
    model = GPT2(packed.config).eval()
    state = {}
    for name in model.state_dict():
        value = packed.weights.get(name)
        value = value.dequantize() if isinstance(value, QuantizedMatrix) else value.float()
        state[name] = value.t() if name in ("wte.weight", "lm_head.weight") else value
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 96), (51, 33), (1, 1), (130, 101)])
def test_what_is_packed_comes_out_again(form, inputs, outputs):
    group = FORMATS[form]
    shape = ModelShape(1, inputs, 2 * inputs, outputs, 4, "relu", 1e-5, (1.0,), True)
    weights = PackedWeights(shape, {name: MatrixFormat(form, group) for name in shape.matrices()})
    if group:
        most = 127 if form == "int8" else 7
        q = torch.randint(-most, most + 1, (inputs, outputs), dtype=torch.int8)
        scales = torch.rand(-(-inputs // group), outputs).half()
        weights.put("wte.weight", QuantizedMatrix(q, scales, 8 if most == 127 else 4, group))
        found = weights.get("wte.weight")
        assert torch.equal(found.q, q) and torch.equal(found.scales, scales)
    else:
        matrix = torch.randn(inputs, outputs).to(getattr(torch, form))
        weights.put("wte.weight", matrix)
        assert_equal(weights.get("wte.weight"), matrix)
    again = PackedWeights.from_arena(weights.arena)
    assert again.shape == shape and again.formats == weights.formats


@needs_native
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["plain", "odd"])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16"])
def test_a_step_is_as_exact_as_torch(config, form):
    """Prompts of several lengths in one call, then single tokens, against float64."""
    packed = in_format(random_model(config), form)
    plain = unpacked(packed)
    counts = [1, 17, 70]
    rows = [torch.randint(config.vocab_size, (count + 3,)) for count in counts]
    exact_model = plain.double()
    theirs_model = unpacked(packed)
    if form == "bfloat16":
        theirs_model = theirs_model.bfloat16()
    cache = packed.new_cache(3, 80, torch.float32)
    width = max(counts)
    padded = torch.stack([torch.cat([row[:1].expand(width - n), row[:n]])
                          for row, n in zip(rows, counts, strict=True)])  # fmt: skip
    with torch.no_grad(), backend("native"):
        found = [packed.prefill(padded, counts, [0, 0, 0], cache)]
        for step in range(3):
            tokens = torch.stack([row[n + step] for row, n in zip(rows, counts, strict=True)])
            found.append(packed.decode_step(tokens, cache))
    with torch.no_grad(), backend("torch"):
        for index, logits in enumerate(found):
            ends = [count + index for count in counts]
            exact, theirs = (
                torch.stack([model(row[None, :end]).logits[0, -1] for row, end in
                             zip(rows, ends, strict=True)])
                for model in (exact_model, theirs_model)
            )  # fmt: skip
            assert_close([logits], [theirs], [exact], times=3.0)


@needs_native
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["plain", "odd"])
def test_float16_weights_decode_as_in_transformers_float32(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    random_model(config).half().save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).float().eval()
    model = GPT2.from_pretrained(tmp_path)
    packed = model.pack()
    assert packed.format == "float16" and packed.new_cache(1).k.dtype == torch.float32
    ids = torch.randint(config.vocab_size, (5, 30))
    with torch.no_grad():
        assert_allclose(packed(ids).logits, theirs(ids).logits, atol=1e-4)
        for decoder in (model, packed):
            written = decoder.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None)
            assert_equal(theirs(written).logits[:, 29:-1].argmax(-1), written[:, 30:])


@needs_native
def test_a_float16_model_takes_steps_with_either_cache():
    model = random_model(CONFIG).half()
    tokens = torch.tensor([3, 5])
    with record_calls() as calls:
        wide = model.decode_step(tokens, packed_cache := model.pack().new_cache(2, 8))
        assert {call.op for call in calls} == {"packed_step"}
        own = model.decode_step(tokens, own_cache := model.new_cache(2, 8))
    assert (packed_cache.k.dtype, own_cache.k.dtype) == (torch.float32, torch.float16)
    assert wide.dtype == own.dtype == torch.float16
    assert (wide - own).float().norm() < 0.02 * wide.float().norm()


@needs_native
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["plain", "odd"])
def test_quantized_activations_cost_little(config, form):
    packed = in_format(random_model(config), form)
    ids = torch.randint(config.vocab_size, (2, 40))
    exact = unpacked(packed)(ids).logits
    found = packed(ids).logits
    assert (found - exact).norm() < 0.05 * exact.norm()


@needs_native
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_native_and_reference_steps_agree(form, cache_dtype):
    packed = in_format(random_model(CONFIG), form)
    ids = torch.randint(CONFIG.vocab_size, (2, 40))
    found = {}
    for name in ("native", "reference"):
        cache = packed.new_cache(2, 64, cache_dtype)
        with backend(name):
            found[name] = [packed.prefill(ids, [40, 23], [0, 0], cache)]
            found[name] += [packed.decode_step(ids[:, step], cache) for step in range(3)]
    exact = cache_dtype == torch.float32 and form in ("float32", "float16")
    for ours, theirs in zip(found["native"], found["reference"], strict=True):
        assert (ours - theirs).norm() < (1e-5 if exact else 0.06) * theirs.norm()


@needs_native
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "tanh"])
def test_every_activation(activation):
    model = random_model(dataclasses.replace(CONFIG, activation_function=activation, dropout=None))
    ids = torch.randint(CONFIG.vocab_size, (2, 9))
    with backend("torch"):
        expected = model(ids).logits
    assert_allclose(model.pack()(ids).logits, expected, atol=1e-4)


@needs_native
def test_generation_runs_on_packed_steps_alone():
    model = random_model(CONFIG)
    with backend("native"), record_calls() as calls:
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert {(call.op, call.backend) for call in calls} == {
        ("packed_step", "native"), ("sample", "native"), ("packed_next", "native"),
    }  # fmt: skip
    assert [call.op for call in calls].count("packed_next") == 4
    assert len(calls) == 6


def stepping(packed, rows):
    """Arguments of ops.packed_next behind a prompt of 5, and of ops.packed_step for the same."""
    torch.manual_seed(1)
    cache = packed.new_cache(rows, 20)
    prompts = torch.randint(packed.config.vocab_size, (rows, 5))
    packed.prefill(prompts, list(range(5 - rows + 1, 6)), [0] * rows, cache)
    return cache, torch.randint(packed.config.vocab_size, (rows,))


CHOICES = [
    {},
    {"vocab_size": 17},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
]


@needs_native
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_decode_and_sample_is_a_step_and_a_choice(rows, form, choice):
    packed = in_format(random_model(CONFIG), form)
    cache, tokens = stepping(packed, rows)
    other, _ = stepping(packed, rows)
    history = torch.randint(CONFIG.vocab_size, (rows, 30))[:, ::3]
    uniform = torch.rand(rows, 2)[:, 0] if "temperature" in choice else None
    logits = packed.decode_step(tokens, other)
    processors = {name: value for name, value in choice.items() if name != "vocab_size"}
    expected = ops.sample(logits[:, : choice.get("vocab_size")], history, uniform, **processors)
    found_logits, found = packed.decode_and_sample(tokens, cache, history, uniform, **choice)
    assert_equal(found_logits, logits)
    assert_equal(found, expected)
    for name in ("k", "v", "lengths", "positions"):
        assert torch.equal(getattr(cache, name), getattr(other, name)), name


def packed_arguments(form="float32"):
    packed = in_format(random_model(CONFIG), form)
    cache, tokens = stepping(packed, 2)
    caches = (packed.weights.arena, cache.k, cache.v, cache.k_scales, cache.v_scales)
    rows = torch.arange(3)
    step = (*caches, tokens, cache.positions, rows, rows[:-1], cache.lengths, rows[:-1], 101)
    mask = torch.tensor([[1, 0, 0, 0], [-1, 3, 5, 9]], dtype=torch.int32)
    processors = (1.0, 0, 1.0, 0.0, 1.0, 1.0, 0)
    choice = (torch.zeros(2, 0, dtype=torch.int64), None, mask, 101, 101, *processors)
    return {
        "packed_step": step,
        "packed_next": (*caches, tokens, cache.positions, cache.lengths, *choice),
    }


@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize("name", ["packed_step", "packed_next"])
def test_steps_are_well_formed_ops(name, form):
    torch.library.opcheck(getattr(torch.ops.gpt2fast, name).default, packed_arguments(form)[name])


@pytest.mark.parametrize("name", ["packed_step", "packed_next"])
def test_steps_compile_to_one_graph(name):
    op = getattr(torch.ops.gpt2fast, name)

    def step(*arguments):
        found = op(*arguments)
        return found if name == "packed_step" else found[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*packed_arguments()[name]), step(*packed_arguments()[name]))


def test_decode_and_sample_names_mistakes():
    packed = random_model(CONFIG).pack()
    cache = packed.new_cache(1, 8)
    history = torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(GenerationError, match="token id 101"):
        packed.decode_and_sample(torch.tensor([101]), cache, history)
    cache.positions = torch.tensor([CONFIG.n_positions])
    with pytest.raises(GenerationError, match="n_positions=96"):
        packed.decode_and_sample(torch.tensor([1]), cache, history)
    with pytest.raises(GenerationError, match="cache"):
        packed.decode_and_sample(torch.tensor([1, 2]), cache, history)


@needs_native
def test_changed_weights_are_packed_again():
    model = random_model(CONFIG)
    prompt = torch.tensor([[1, 2, 3]])
    model.generate(prompt, max_new_tokens=8, do_sample=False)
    before = model.for_decoding()
    assert model.for_decoding() is before
    model.ln_f.weight.data.neg_()  # torch does not count this change
    after = model.for_decoding()
    assert after is not before
    with backend("torch"):
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert_equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)
    with torch.no_grad():
        model.ln_f.weight.mul_(-1)
    cache = model.new_cache(1)
    with backend("torch"):
        expected = model.decode_step(prompt[:, 0], model.new_cache(1))
    assert_allclose(model.decode_step(prompt[:, 0], cache), expected, atol=1e-5)


def test_releasing_leaves_one_copy():
    model = random_model(CONFIG)
    expected = model.state_dict()["h.1.mlp.c_fc.weight"].clone()
    packed = model.pack(release=True)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    assert_equal(packed.weights.get("h.1.mlp.c_fc.weight"), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_packed_models_are_saved_and_loaded(form, tmp_path):
    packed = in_format(random_model(ODD), form)
    packed.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    if FORMATS[form]:
        assert isinstance(loaded, PackedGPT2) and loaded.format == form
        assert_equal(loaded.weights.arena, packed.weights.arena)
        assert loaded.bits_per_weight == packed.bits_per_weight
        with pytest.raises(WeightsError, match="run on the CPU as they are"):
            GPT2.from_pretrained(tmp_path, dtype="float32")
    else:
        assert_equal(loaded.pack().weights.arena, packed.weights.arena)


def test_vectors_too_large_for_float16_are_saved_beside_wider_matrices(tmp_path):
    model = random_model(CONFIG).half()
    model.ln_f.bias = torch.nn.Parameter(torch.full((48,), 1e6))
    packed = pack_weights(model)
    assert packed.format == "float16"
    packed.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert_equal(loaded.get_parameter(name), parameter.float())


def test_forward_takes_what_the_plain_model_takes():
    model = random_model(CONFIG)
    packed = model.pack()
    ids = torch.randint(CONFIG.vocab_size, (3, 20))
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :5] = 0
    mask[2, 15:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        found = packed(ids, attention_mask=mask, position_ids=positions).logits
        assert_allclose(found[mask.bool()], expected[mask.bool()], atol=1e-4)
        assert torch.allclose(
            packed(ids, logits_to_keep=2).logits, model(ids, logits_to_keep=2).logits, atol=1e-4
        )
        labels = ids.clone()
        labels[:, 3] = -100
        assert torch.allclose(
            packed(ids, labels=labels).loss, model(ids, labels=labels).loss, atol=1e-5
        )
        cache, other = packed.new_cache(3), model.new_cache(3)
        for part in (slice(0, 7), slice(7, 20)):
            found = packed(ids[:, part], cache=cache).logits
            expected = model(ids[:, part], cache=other).logits
            assert_allclose(found, expected, atol=1e-4)


@needs_native
def test_long_prompts_pass_in_blocks():
    config = dataclasses.replace(CONFIG, n_positions=1200, dropout=None)
    model = random_model(config)
    ids = torch.randint(config.vocab_size, (2, 1023))
    packed = model.pack()
    cache = packed.new_cache(2, 1200)
    found = packed.prefill(ids, [1023, 600], [0, 0], cache)
    with torch.no_grad(), backend("torch"):
        assert_allclose(found[0], model(ids[:1]).logits[0, -1], atol=2e-4)
        assert_allclose(found[1], model(ids[1:, -600:]).logits[0, -1], atol=2e-4)
    assert cache.lengths.tolist() == [1023, 600]


@needs_native
def test_positions_to_keep_may_come_in_any_order():
    config = dataclasses.replace(CONFIG, n_positions=700, dropout=None)
    model = random_model(config)
    ids = torch.randint(config.vocab_size, (2, 600))
    kept = torch.tensor([599, 0, 300])
    with torch.no_grad(), backend("torch"):
        expected = model(ids, logits_to_keep=kept).logits
    assert_allclose(model.pack()(ids, logits_to_keep=kept).logits, expected, atol=2e-4)


def test_nothing_but_padding_gives_zeros():
    packed = random_model(CONFIG).pack()
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert not packed(ids, attention_mask=torch.zeros_like(ids)).logits.any()


def test_mistakes_are_named():
    model = random_model(CONFIG)
    with pytest.raises(ArgumentError, match="float64"):
        model.double().pack()
    packed = random_model(CONFIG).pack()
    with pytest.raises(ArgumentError, match="not an arena"):
        PackedWeights.from_arena(torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(GenerationError, match="token id 101"):
        packed(torch.tensor([[101]]))
    with pytest.raises(GenerationError, match="cache"):
        packed.decode_step(torch.tensor([1]), packed.new_cache(2))
    with pytest.raises(ArgumentError, match="int5"):
        random_model(CONFIG).quantize("int5")


@needs_native
def test_the_step_checks_what_it_is_given():
    packed = random_model(CONFIG).pack()
    cache = packed.new_cache(2, 8)
    good = {
        "tokens": [1], "positions": [0], "starts": [0, 1], "rows": [0], "lengths": [0],
        "outputs": [0],
    }  # fmt: skip
    bad = {
        "tokens": [101], "positions": [96], "starts": [0, 2], "rows": [2], "lengths": [8],
        "outputs": [1],
    }  # fmt: skip
    for name, values in bad.items():
        arguments = {key: torch.tensor(value) for key, value in {**good, name: values}.items()}
        with pytest.raises(ArgumentError, match=name.removesuffix("s")):
            ops.packed_step(packed.weights, cache.k, cache.v, **arguments)
    arguments = {key: torch.tensor(value) for key, value in good.items()}
    with pytest.raises(BackendError, match="float16"), backend("native"):
        ops.packed_step(packed.weights, cache.k.half(), cache.v.half(), **arguments)


@needs_native
@pytest.mark.parametrize("name", ["packed_step", "packed_next"])
def test_steps_check_caches_and_scales(name):
    op = getattr(torch.ops.gpt2fast, name)
    arena, k, v, k_scales, v_scales, *rest = packed_arguments("int8")[name]
    bad = [
        (k, v[:, :1], k_scales, v_scales, "must share one shape"),
        (k, v[:, :, :3], k_scales, v_scales, "must share one shape"),
        (k, v, k_scales[:, :1], v_scales, "scales must be"),
        (k, v, k_scales, v_scales.double(), "scales must be"),
        (k, v, k_scales[0], v_scales, "scales must be"),
    ]
    for *caches, message in bad:
        with pytest.raises(ArgumentError, match=message):
            op(arena, *caches, *rest)
    if name == "packed_step":
        tokens, positions, starts, rows, *others = rest
        with pytest.raises(ArgumentError, match="twice"):
            op(arena, k, v, k_scales, v_scales, tokens, positions, starts, rows * 0, *others)


def test_nothing_to_do_is_done():
    packed = random_model(CONFIG).pack()
    none = torch.zeros(0, dtype=torch.int64)
    cache = packed.new_cache(0, 8)
    logits, tokens = packed.decode_and_sample(none, cache, none[:, None])
    assert logits.shape == (0, CONFIG.vocab_size) and tokens.shape == (0,)
    assert packed.decode_step(none, packed.new_cache(0, 8)).shape == (0, CONFIG.vocab_size)


def test_caches_that_cannot_serve_are_refused():
    model = random_model(CONFIG)
    with pytest.raises(GenerationError, match="int16"):
        model.new_cache(1, 8, torch.int16)


def test_tokens_of_any_integer_type():
    packed = random_model(CONFIG).pack()
    ids = torch.tensor([[1, 2, 3]])
    expected = packed(ids).logits
    assert_equal(packed(ids.int()).logits, expected)
    cache = packed.new_cache(1, 8)
    for token in ids[0].int():
        logits = packed.decode_step(token[None], cache)
    assert_allclose(logits, expected[:, -1], atol=1e-4)
    with pytest.raises(GenerationError, match="float32"):
        packed(ids.float())


def test_quantized_matrices_enter_as_they_are():
    model = random_model(CONFIG)
    quantized = quantize_weights(model, "int4", method="nearest")
    packed = pack_weights(model, quantized)
    for name, matrix in quantized.matrices.items():
        found = packed.weights.get(name)
        assert torch.equal(found.q, matrix.q) and torch.equal(found.scales, matrix.scales)
    assert packed.bits_per_weight > 4.5


@needs_native
@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_steps_and_torchs_products_take_turns_on_one_thread(name):
    """Both may use AMX, whose tiles are a state of the thread."""
    packed = in_format(random_model(CONFIG), name)
    prompt = torch.randint(101, (1, 60))
    factor = torch.randn(128, 128).bfloat16()

    def logits():
        return packed.prefill(prompt, [60], [0], packed.new_cache(1, 60))

    product, first = factor @ factor, logits()
    for _ in range(3):
        assert_equal(factor @ factor, product)
        assert_equal(logits(), first)
