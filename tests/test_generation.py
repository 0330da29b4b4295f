"""`GPT2.generate` against transformers, and batches against single prompts."""

from __future__ import annotations

import random

import pytest
import torch

from gpt2fast import GPT2, Error, GPT2Config
from gpt2fast.errors import GenerationError
from gpt2fast.inference.engine import DecodeState
from gpt2fast.inference.sampling import Draw, uniforms
from gpt2fast.ops.backend import record_calls
from gpt2fast.tokenizer import CharTokenizer
from small_generators import small_model, successor_model

SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 5}
PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7}
STRATEGIES = {
    "greedy": {},
    "greedy with penalties": PENALTIES,
    "sampling": SAMPLING,
    "three samples with penalties": {**SAMPLING, **PENALTIES, "num_return_sequences": 3},
    "beams": BEAMS,
    "beams with penalties": {**BEAMS, **PENALTIES},
}


@pytest.fixture(scope="module")
def model():
    return small_model()


def random_pair(choose):
    """A model of transformers' and ours with equal weights and a random configuration."""
    transformers = pytest.importorskip("transformers")
    heads, size = choose.choice([1, 2, 3, 5]), choose.choice([4, 6, 16])
    fields = dict(
        vocab_size=choose.choice([11, 40, 97]),
        n_positions=choose.choice([32, 48]),
        n_embd=heads * size,
        n_layer=choose.choice([1, 2, 3]),
        n_head=heads,
        n_inner=choose.choice([None, 20]),
        activation_function=choose.choice(["gelu_new", "gelu", "relu", "silu", "tanh"]),
        scale_attn_weights=choose.choice([True, False]),
        scale_attn_by_inverse_layer_idx=choose.choice([True, False]),
        reorder_and_upcast_attn=choose.choice([True, False]),
        tie_word_embeddings=choose.choice([True, False]),
        bos_token_id=0,
        eos_token_id=choose.choice([0, 3, 5]),
        initializer_range=0.3,
    )
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    ours = GPT2(GPT2Config(**fields))
    weights = {name.removeprefix("transformer."): w for name, w in theirs.state_dict().items()}
    if fields["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    ours.load_state_dict(weights)
    return theirs, ours


def random_mask(choose, kind, rows, length):
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        if kind == "left":
            mask[row, : choose.randrange(length)] = 0
        elif kind == "holes":
            mask[row, :-1] = torch.tensor([choose.randrange(2) for _ in range(length - 1)])
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_greedy_and_beam_tokens_equal_transformers(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    theirs, ours = random_pair(choose)
    rows, length = choose.choice([1, 2, 3]), choose.choice([1, 4, 9])
    kind = choose.choice(["full", "left", "holes"])
    input_ids = torch.randint(ours.config.vocab_size, (rows, length))
    mask = random_mask(choose, kind, rows, length)
    shared = {"max_new_tokens": choose.choice([1, 5, 12, 20]), "use_cache": choose.random() < 0.8}
    # transformers counts masked tokens as history, in holes and in n-grams; ours never does.
    if kind != "holes":
        shared["repetition_penalty"] = choose.choice([1.0, 1.2, 0.8])
    if kind == "full":
        shared["no_repeat_ngram_size"] = choose.choice([0, 1, 2, 3])
    end = choose.choice(["default", None, [1, 2], 7])
    if end is None:
        theirs.config.eos_token_id = theirs.generation_config.eos_token_id = None
    if end != "default":
        shared["eos_token_id"] = end
    if choose.random() < 0.3:
        shared["pad_token_id"] = choose.choice([0, 4])
    beams = choose.choice([2, 3, 4])
    beam_search = {
        "num_beams": beams,
        "num_return_sequences": choose.randint(1, beams),
        "length_penalty": choose.choice([1.0, 0.0, -1.0, 2.0, 0.6]),
        "early_stopping": choose.choice([False, True, "never"]),
    }
    for options in ({}, beam_search):
        expected = theirs.generate(
            input_ids, attention_mask=mask, do_sample=False, **shared, **options
        )
        assert ours.generate(input_ids, mask, **shared, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 3.0])
def test_beams_that_end_early_equal_transformers(early_stopping, length_penalty):
    choose = random.Random(7)
    theirs, ours = random_pair(choose)
    input_ids = torch.randint(ours.config.vocab_size, (6, 3))
    for beams, ends in ((2, [1, 2]), (3, [1]), (4, [0, 3, 5, 6, 7, 9]), (5, [2, 4, 8, 10])):
        options = {
            "num_beams": beams,
            "num_return_sequences": beams,
            "max_new_tokens": 20,
            "eos_token_id": ends,
            "pad_token_id": ends[0],
            "early_stopping": early_stopping,
            "length_penalty": length_penalty,
        }
        expected = theirs.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **options
        )
        assert ours.generate(input_ids, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_cached_and_uncached_decoding_agree(model, options):
    input_ids = torch.randint(61, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1]])
    cached = model.generate(input_ids, mask, max_new_tokens=25, **options)
    uncached = model.generate(input_ids, mask, max_new_tokens=25, use_cache=False, **options)
    assert cached.tolist() == uncached.tolist()


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_prompts_in_a_batch_give_what_each_gives_alone(model, options, side):
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(61, (n,), generator=generator) for n in (9, 2, 5, 1)]
    input_ids, mask = torch.full((4, 9), 7), torch.zeros(4, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        columns = {
            "left": torch.arange(9 - len(prompt), 9),
            "right": torch.arange(len(prompt)),
            "holes": torch.randperm(9, generator=generator)[: len(prompt)].sort().values,
        }[side]
        input_ids[row, columns] = prompt
        mask[row, columns] = True
    options = {**options, "max_new_tokens": 20, "eos_token_id": [7, 8, 9], "pad_token_id": 7}
    copies = options.get("num_return_sequences", 1)
    together = model.generate(input_ids, mask, **options)
    assert torch.equal(together[:, :9], input_ids.repeat_interleave(copies, dim=0))
    ended = 0
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], **options)[:, len(prompt) :]
        block = together[row * copies : (row + 1) * copies, 9:]
        assert torch.equal(block[:, : alone.shape[1]], alone)
        assert (block[:, alone.shape[1] :] == 7).all()
        ended += alone.shape[1] < 20
    assert ended or options.get("num_beams") or "no_repeat_ngram_size" in options


def test_equal_seeds_give_equal_tokens_and_different_ones_different(model):
    prompt = torch.tensor([[1, 2, 3]])
    options = {**SAMPLING, "max_new_tokens": 20, "eos_token_id": None}
    first = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options), first)
    assert not torch.equal(model.generate(prompt, **{**options, "seed": 6}), first)


def test_without_a_seed_torchs_own_decides(model):
    prompt = torch.tensor([[1, 2, 3]])
    options = {**SAMPLING, "seed": None, "max_new_tokens": 20, "eos_token_id": None}
    torch.manual_seed(3)
    first, second = model.generate(prompt, **options), model.generate(prompt, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(prompt, **options), first)
    assert not torch.equal(first, second)


def test_greedy_decoding_leaves_torchs_random_state_alone(model):
    before = torch.get_rng_state()
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_samples_or_more_steps_do_not_change_the_first_ones(model):
    prompt = torch.tensor([[1, 2, 3]])
    options = {**SAMPLING, "eos_token_id": None}
    many = model.generate(prompt, max_new_tokens=20, num_return_sequences=4, **options)
    few = model.generate(prompt, max_new_tokens=9, num_return_sequences=2, **options)
    assert torch.equal(many[:2, :12], few)
    assert len(many.unique(dim=0)) == 4


def test_samples_follow_the_models_distribution(model):
    prompt = torch.tensor([[4, 5]])
    draws = 3000
    drawn = model.generate(
        prompt, max_new_tokens=1, do_sample=True, num_return_sequences=draws, seed=1
    )[:, -1]
    with torch.no_grad():
        expected = model.eval()(prompt).logits[0, -1].softmax(-1) * draws
    counts = torch.bincount(drawn, minlength=61)
    common = expected > 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    assert chi_square < common.sum() + 5 * (2 * common.sum()) ** 0.5


EQUAL_ROWS = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None}


@pytest.mark.parametrize("packed", [False, True])
def test_equal_rows_are_the_samples_of_their_prompt(model, packed):
    decoder = model.pack() if packed and model.can_be_packed() else model
    prompt, other = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    samples = decoder.generate(prompt, num_return_sequences=4, seed=3, **EQUAL_ROWS)
    assert len(samples.unique(dim=0)) == 4
    rows = decoder.generate(prompt.expand(4, -1), seed=3, **EQUAL_ROWS)
    assert torch.equal(rows, samples)
    # With company, several samples each, and padding, which makes equal rows look unlike.
    batch = torch.cat([prompt, other, prompt])
    company = decoder.generate(batch, num_return_sequences=2, seed=3, **EQUAL_ROWS)
    assert torch.equal(company[[0, 1, 4, 5]], samples)
    padded = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0], [0, 4, 5, 6]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
    drawn = decoder.generate(padded, mask, seed=3, **EQUAL_ROWS)
    assert torch.equal(drawn[:2, 4:], samples[:2, 3:])
    assert torch.equal(drawn[2, 4:], company[2, 3:])


def test_rows_without_a_seed_are_drawn_independently(model):
    # Every token is as likely as every other after any prompt.
    uniform = small_model()
    with torch.no_grad():
        uniform.wte.weight.zero_()
    torch.manual_seed(2)
    alone = uniform.generate(torch.tensor([[1, 2]]), **EQUAL_ROWS)
    for rows in (torch.tensor([[1, 2]]).expand(5, -1), torch.arange(1, 11).view(5, 2)):
        torch.manual_seed(2)
        drawn = uniform.generate(rows, **EQUAL_ROWS)
        assert len(drawn[:, 2:].unique(dim=0)) == 5
        assert torch.equal(drawn[:1], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_no_draw_and_no_beam(model, dtype):
    packed = model.quantize("int8", calibration=None) if model.can_be_packed() else model
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def everything():
        return [
            decoder.generate(prompt, max_new_tokens=12, **options)
            for decoder in (model, packed)
            for options in (SAMPLING, {**SAMPLING, **PENALTIES}, BEAMS)
        ]

    expected = everything()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = everything()
        uniform = next(uniforms([Draw(1, sample) for sample in range(400)]))
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # 102,400 draws out of 500 equally likely tokens leave none out; with the 8 or 11 bits of a half
    # type's numbers they would.
    assert len((uniform.double() * 500).long().unique()) == 500


def test_torchs_default_device_changes_no_draw(model):
    prompt = torch.tensor([[1, 2, 3]])
    expected = model.generate(prompt, **SAMPLING)
    with torch.device("meta"):
        found = model.generate(prompt, **SAMPLING)
        unseeded = model.generate(prompt, do_sample=True)
    assert torch.equal(found, expected)
    assert unseeded.device.type == "cpu"


def test_temperature_zero_is_greedy(model):
    prompt = torch.tensor([[1, 2, 3]])
    cold = model.generate(prompt, do_sample=True, temperature=0, max_new_tokens=15)
    assert torch.equal(cold, model.generate(prompt, max_new_tokens=15))


@pytest.fixture(scope="module")
def counting():
    """Counts up: 0 1 2 ... 19 0 1 ..."""
    return successor_model([(token + 1) % 20 for token in range(20)])


@pytest.mark.parametrize(
    ("eos", "lengths"), [(5, [3, 1]), ([5, 4], [2, 1]), (None, [12, 12]), ([], [12, 12])], ids=str
)
def test_rows_end_at_their_end_token_and_are_padded(counting, eos, lengths):
    prompts = torch.tensor([[1, 2], [9, 4]]) if eos != [5, 4] else torch.tensor([[1, 2], [9, 3]])
    out = counting.generate(prompts, max_new_tokens=12, eos_token_id=eos, pad_token_id=19)
    assert out.shape[1] == 2 + max(lengths)
    for row, length in enumerate(lengths):
        start = int(prompts[row, 1]) + 1
        expected = [(start + step) % 20 for step in range(length)]
        assert out[row, 2:].tolist() == expected + [19] * (max(lengths) - length)


def test_the_end_token_pads_unless_told_otherwise(counting):
    out = counting.generate(torch.tensor([[4], [2]]), max_new_tokens=9, eos_token_id=5)
    assert out.tolist() == [[4, 5, 5, 5], [2, 3, 4, 5]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_stop_ends_at_token_sequences_and_strings(counting, options):
    prompt = torch.tensor([[1]])
    tokenizer = CharTokenizer.train(["abcdefghijklmnopqrst"])
    for stop in ([[4, 5]], ["ef"], "ef", [[9, 9], "ef"], ["zz", [5]]):
        out = counting.generate(
            prompt, max_new_tokens=12, stop=stop, tokenizer=tokenizer, **options
        )
        assert out.tolist() == [[1, 2, 3, 4, 5]]
    # What begins in the prompt does not count.
    out = counting.generate(prompt, max_new_tokens=4, stop=[[1, 2]], **options)
    assert out.tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize("stop", [["ef"], [""], [[]], [3], 3.5, [None]], ids=str)
def test_a_stop_that_cannot_be_found_is_refused(counting, stop):
    with pytest.raises((GenerationError, TypeError)):
        counting.generate(torch.tensor([[1]]), stop=stop)


def test_no_new_tokens_return_the_prompt(model):
    prompt = torch.tensor([[1, 2, 3]])
    assert model.generate(prompt, max_new_tokens=0).tolist() == [[1, 2, 3]]
    repeated = model.generate(prompt, max_new_tokens=0, do_sample=True, num_return_sequences=2)
    assert repeated.tolist() == [[1, 2, 3]] * 2


@pytest.mark.parametrize("options", [{}, SAMPLING, {"num_beams": 2}], ids=str)
def test_past_n_positions_is_refused_before_any_work(model, options):
    with record_calls() as calls, pytest.raises(GenerationError) as error:
        model.generate(torch.ones(2, 40).long(), max_new_tokens=9, **options)
    assert calls == []
    for part in ("40", "9", "49", "n_positions=48", "max_new_tokens=8"):
        assert part in str(error.value)


def test_the_whole_of_n_positions_can_be_used(model):
    long = torch.ones(1, 40).long()
    assert model.generate(long, max_new_tokens=8, eos_token_id=None).shape == (1, 48)
    # Padding takes no positions.
    mask = torch.ones(1, 40).long()
    mask[:, :10] = 0
    assert model.generate(long, mask, max_new_tokens=18, eos_token_id=None).shape == (1, 58)


@pytest.mark.parametrize(
    ("input_ids", "mask", "complaint"),
    [
        (torch.zeros(0, 3).long(), None, "at least one token"),
        (torch.zeros(3).long(), None, "(batch, time)"),
        (torch.zeros(1, 3), None, "float32"),
        (torch.tensor([[1, 61]]), None, "61"),
        (torch.tensor([[1, -1]]), None, "-1"),
        (torch.ones(1, 3).long(), torch.ones(1, 2), "(1, 2)"),
        (torch.ones(1, 3).long(), torch.tensor([[1, 2, 1]]), "0 and 1"),
        (torch.ones(2, 2).long(), torch.tensor([[0, 1], [0, 2]]), "0 and 1"),
    ],
)
def test_bad_prompts_are_refused(model, input_ids, mask, complaint):
    with pytest.raises(Error) as error:
        model.generate(input_ids, mask)
    assert complaint in str(error.value)


@pytest.mark.parametrize("eos", [61, -1, [3, 99], "x", True, 3.0], ids=str)
def test_an_end_token_outside_the_vocabulary_is_refused(model, eos):
    with pytest.raises(GenerationError, match="eos_token_id"):
        model.generate(torch.tensor([[1]]), eos_token_id=eos)


@pytest.mark.parametrize("padding", ["a", 10**30, 1.0, True], ids=str)
def test_padding_that_is_no_id_is_refused(model, padding):
    with pytest.raises(GenerationError, match="pad_token_id"):
        model.generate(torch.tensor([[1]]), pad_token_id=padding)


@pytest.mark.parametrize("prompt", ["text", [[1], [2, 3]]], ids=str)
def test_what_makes_no_tensor_is_refused(model, prompt):
    with pytest.raises(GenerationError, match="input_ids"):
        model.generate(prompt)


def test_a_default_end_token_outside_a_small_vocabulary_is_none():
    model = small_model(eos_token_id=50256)
    assert model.generate(torch.tensor([[1]]), max_new_tokens=4).shape == (1, 5)


def test_dropout_is_off_and_modes_are_restored():
    model = small_model(dropout=0.5)
    model.train()
    model.h[1].eval()
    prompt = torch.tensor([[1, 2, 3]])
    first = model.generate(prompt, max_new_tokens=20)
    assert torch.equal(model.generate(prompt, max_new_tokens=20), first)
    assert model.training
    assert model.h[0].attn.training
    assert not model.h[1].training
    assert not model.h[1].attn.training
    assert not first.is_inference() or not first.requires_grad


@pytest.mark.parametrize("options", [{}, SAMPLING, {"num_beams": 2}], ids=str)
def test_weights_that_are_not_numbers_are_reported(options):
    model = small_model()
    with torch.no_grad():
        model.wte.weight[3, 3] = float("nan")
    with pytest.raises(GenerationError, match="not a number"):
        model.generate(torch.tensor([[1, 2]]), **options)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_sliding_window_keeps_the_newest_half(use_cache):
    model = small_model(n_positions=12).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], list(range(30))]
    with torch.inference_mode():
        context = DecodeState(model, prompts, 40, use_cache=use_cache, slides=True)
        seen = [list(prompt) if len(prompt) <= 12 else prompt[-6:] for prompt in prompts]
        logits = context.read()
        for _ in range(40):
            for row, tokens in enumerate(seen):
                expected = model(torch.tensor([tokens])).logits[0, -1]
                torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
            chosen = logits.argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                tokens = [*seen[row], token]
                seen[row] = tokens if len(tokens) <= 12 else tokens[-6:]
            logits = context.append(chosen)
