"""`GPT2.generate` against transformers, batches against single prompts, and the `Generator`."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from gpt2fast import GPT2, Error, GPT2Config
from gpt2fast.errors import GenerationError
from gpt2fast.inference import teacher_forcing
from gpt2fast.inference.continuation import Generation
from gpt2fast.inference.decoding import Timing
from gpt2fast.inference.engine import DecodeState
from gpt2fast.inference.generator import Generator
from gpt2fast.inference.sampling import Draw, uniforms
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer

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


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=61, n_positions=48, n_embd=24, n_layer=2, n_head=3,
        bos_token_id=7, eos_token_id=7, initializer_range=0.3,
    )  # fmt: skip
    return GPT2(GPT2Config(**{**shape, **changes}))


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


def successor_model(successors, config=None):
    """A GPT-2 in which token i is always followed by successors[i]."""
    size = len(successors)
    config = config or GPT2Config(
        vocab_size=size, n_positions=64, n_embd=size, n_layer=1, n_head=1,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = GPT2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("ln_f.weight"):
                parameter.zero_()
        model.wte.weight.copy_(torch.eye(size))
        model.lm_head.weight[torch.tensor(successors), torch.arange(size)] = 1.0
    return model


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
def test_past_n_positions_is_refused_before_any_work(model, options, monkeypatch):
    monkeypatch.setattr(GPT2, "hidden_states", None)
    with pytest.raises(GenerationError) as error:
        model.generate(torch.ones(2, 40).long(), max_new_tokens=9, **options)
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


# Generator

TEXT = "Once upon a time the cat sat on the mat. The dog sat there too, and so it goes on. "


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([TEXT * 10], 300)


@pytest.fixture(scope="module")
def generator(tokenizer):
    model = small_model(
        vocab_size=tokenizer.vocab_size + 20, n_positions=64,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Generator(model, tokenizer)


def spelling_generator(text, tokenizer, **options):
    """Writes `text` after its first token; no token may occur twice in it."""
    tokens = tokenizer.encode(text)
    assert len(set(tokens)) == len(tokens)
    successors = [0] * tokenizer.vocab_size
    for token, following in itertools.pairwise(tokens):
        successors[token] = following
    return Generator(successor_model(successors), tokenizer, **options)


def test_a_result_counts_its_tokens(generator, tokenizer):
    result = generator("Once upon a time", max_new_tokens=20, seed=1, eos_token_id=None)
    assert isinstance(result, Generation)
    assert result.prompt_tokens == len(tokenizer.encode("Once upon a time"))
    assert result.new_tokens == len(result.tokens) == 20
    assert result.text == tokenizer.decode(result.tokens)
    assert str(result) == "Once upon a time" + result.text
    assert result.finish_reason == "length"
    assert result.seed == 1
    assert result.logprobs is None


def test_a_result_is_what_the_model_generates(generator, tokenizer):
    prompt = torch.tensor([tokenizer.encode("The cat")])
    for options in (
        {"do_sample": False},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": None, "seed": 4},
    ):
        # Ids past the tokenizer's are not chosen; so that the model doesn't either:
        generator.model.wte.weight.data[tokenizer.vocab_size :] = 0
        result = generator("The cat", max_new_tokens=15, **options)
        expected = generator.model.generate(prompt, max_new_tokens=15, **options)
        assert result.tokens == expected[0, prompt.shape[1] :].tolist()


def test_shapes_of_results_follow_the_prompts(generator):
    options = {"max_new_tokens": 3, "seed": 0}
    one = generator("a", **options)
    assert generator(["a", "b"], **options)[0] == one
    several = generator("a", num_return_sequences=2, **options)
    assert several[0] == one
    assert len(several) == 2
    nested = generator(["a", "b", "c"], num_return_sequences=2, **options)
    assert [len(found) for found in nested] == [2, 2, 2]
    assert nested[0] == several
    assert generator([], **options) == []


def test_many_prompts_give_what_each_gives_alone(generator):
    words = TEXT.split()
    prompts = [" ".join(words[: 1 + number % 17]) for number in range(70)]
    results = generator(prompts, max_new_tokens=12, seed=3)
    assert [result.prompt for result in results] == prompts
    for number in (0, 16, 31, 32, 33, 69):
        # The prompts come around again and again: each time it is the next sample.
        samples = generator(prompts[number], max_new_tokens=12, seed=3, num_return_sequences=5)
        assert results[number] == samples[number // 17]


def test_equal_prompts_have_unequal_texts(generator):
    options = {"max_new_tokens": 12, "eos_token_id": None}
    samples = generator("The cat", seed=3, num_return_sequences=70, **options)
    assert len({tuple(sample.tokens) for sample in samples}) == 70
    # More than are computed at once, with another prompt among them.
    prompts = ["The cat"] * 40 + ["The dog"] + ["The cat"] * 30
    results = generator(prompts, seed=3, **options)
    assert results[:40] + results[41:] == samples
    assert results[40] == generator("The dog", seed=3, **options)
    pairs = generator(["The cat"] * 35, seed=3, num_return_sequences=2, **options)
    assert [one for pair in pairs for one in pair] == samples
    unseeded = generator(["The cat"] * 40, **options)
    assert len({tuple(result.tokens) for result in unseeded}) == 40
    # Each can be had again from the seed that it names.
    for result in unseeded[::13]:
        assert generator("The cat", seed=result.seed, **options) == result


@pytest.mark.parametrize(
    "options",
    [{"seed": 2}, {"do_sample": False}, {"num_beams": 2}, {"seed": 2, "top_k": 1}],
    ids=str,
)
def test_logprobs_are_the_models(generator, tokenizer, options):
    result = generator("The dog", max_new_tokens=10, logprobs=True, **options)
    prompt = tokenizer.encode("The dog")
    with torch.no_grad():
        logits = generator.model.eval()(torch.tensor([prompt + result.tokens])).logits[0]
    expected = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + 9), result.tokens]
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["plain", "packed", "hooked"])
def test_prompts_are_scored_as_transformers_does(generator, tokenizer, form, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = generator.model
    model.save_pretrained(tmp_path)
    judge = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    handles = []
    if form == "packed":
        model = model.pack()
    elif form == "hooked":
        handles = [model.h[0].register_forward_hook(lambda *arguments: None)]
    prompts = ["The dog sat", "", "Once upon a time there was a very small cat", "T", "The dog sat"]
    results = Generator(model, tokenizer)(prompts, max_new_tokens=0, logprobs=True, top_logprobs=4)
    for handle in handles:
        handle.remove()
    for prompt, result in zip(prompts, results, strict=True):
        tokens = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
        with torch.no_grad():
            expected = judge(torch.tensor([tokens])).logits[0].log_softmax(-1)
        assert result.prompt_token_ids == tokens
        assert result.logprobs == result.top_logprobs == result.tokens == []
        assert result.prompt_logprobs[0] is result.prompt_top_logprobs[0] is None
        wanted = expected[range(len(tokens) - 1), tokens[1:]].tolist()
        assert result.prompt_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
        for place, top in enumerate(result.prompt_top_logprobs[1:]):
            best = expected[place].topk(4)
            assert list(top) == best.indices.tolist()
            assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_prompts_are_scored_in_as_many_batches_as_memory_wants(generator, monkeypatch):
    prompts = ["The dog", "Once upon a time", "The", "The cat sat on the mat"]
    together = generator(prompts, max_new_tokens=0, logprobs=True)
    monkeypatch.setattr(teacher_forcing, "_MOST_BYTES", 1)
    for one, other in zip(
        generator(prompts, max_new_tokens=0, logprobs=True), together, strict=True
    ):
        assert one.prompt_logprobs[1:] == pytest.approx(other.prompt_logprobs[1:], abs=1e-5)


@pytest.mark.parametrize("window", ["error", "slide", "stop"])
def test_a_prompt_as_long_as_the_window_is_scored_and_a_longer_one_refused(generator, window):
    scorer = Generator(generator.model, generator.tokenizer, window=window)
    room = generator.model.config.n_positions
    fits = scorer("<|endoftext|>" * room, max_new_tokens=0, logprobs=True)
    assert len(fits.prompt_logprobs) == room
    with pytest.raises(GenerationError, match=f"{room + 1} tokens.*n_positions={room}"):
        scorer("<|endoftext|>" * (room + 1), max_new_tokens=0, logprobs=True)


def test_logprobs_need_a_plain_answer(generator):
    for options, part in (
        ({"logprobs": 3}, "logprobs is 3"),
        ({"top_logprobs": 3}, "logprobs is off"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs is -1"),
        ({"logprobs": True, "top_logprobs": 10**6}, "vocab_size"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs is True"),
    ):
        with pytest.raises(GenerationError, match=part):
            generator("The dog", **options)
    with pytest.raises(GenerationError, match="score a prompt"):
        generator.stream("The dog", logprobs=True, max_new_tokens=0)


def test_a_stream_has_the_logprobs_of_a_call(generator):
    options = {"max_new_tokens": 12, "seed": 2, "logprobs": True, "top_logprobs": 2}
    stream = generator.stream("The dog", **options)
    assert stream.logprobs == []
    list(stream)
    result = generator("The dog", **options)
    assert (stream.logprobs, stream.top_logprobs) == (result.logprobs, result.top_logprobs)
    assert generator.stream("The dog", max_new_tokens=1).logprobs is None


@pytest.mark.parametrize(
    "options",
    [{"seed": 2}, {"seed": 3, "stop": ["e", "at"]}, {"do_sample": False, "max_new_tokens": 0}],
    ids=str,
)
def test_a_stream_joined_is_the_text_of_a_call(generator, options):
    options = {"max_new_tokens": 40, **options}
    stream = generator.stream("Once upon", **options)
    assert stream.finish_reason in (None, "length")
    pieces = list(stream)
    result = generator("Once upon", **options)
    assert "".join(pieces) == stream.text == result.text
    assert stream.tokens == result.tokens
    assert stream.finish_reason == result.finish_reason
    assert "" not in pieces


def test_a_stream_never_gives_half_a_character(tokenizer):
    text = "xé😀 ¿"  # 2, 4 and 2 bytes, which this vocabulary spells one by one
    generator = spelling_generator(text, tokenizer)
    steps = len(tokenizer.encode(text)) - 1
    stream = generator.stream("x", max_new_tokens=steps, do_sample=False)
    assert list(stream) == ["é", "😀", " ", "¿"]
    cut = generator("x", max_new_tokens=steps - 1, do_sample=False)
    assert cut.text == "é😀 �"


@pytest.mark.parametrize(
    ("stop", "pieces", "reason"),
    [
        (["def"], ["b", "c"], "stop"),
        ("def", ["b", "c"], "stop"),
        (["dx", "defx"], ["b", "c", "defg", "h"], "length"),
        (["cdz", "h"], ["b", "cde", "f", "g"], "stop"),
        (["fg", "efgh"], ["b", "c", "d", "e"], "stop"),
        (["hij"], ["b", "c", "d", "e", "f", "g", "h"], "length"),
        (["z"], ["b", "c", "d", "e", "f", "g", "h"], "length"),
    ],
    ids=str,
)
def test_a_stream_never_gives_part_of_a_stop_string(stop, pieces, reason):
    tokenizer = CharTokenizer.train(["abcdefghijxz"])
    generator = spelling_generator("abcdefghij", tokenizer)
    stream = generator.stream("a", max_new_tokens=7, do_sample=False, stop=stop)
    assert list(stream) == pieces
    assert stream.finish_reason == reason
    assert generator("a", max_new_tokens=7, do_sample=False, stop=stop).text == "".join(pieces)


def test_the_end_token_ends_a_text_and_is_no_part_of_it(tokenizer):
    generator = spelling_generator("ab<|endoftext|>", tokenizer)
    for result in (
        generator("a", do_sample=False, max_new_tokens=50),
        generator("a", num_beams=2, max_new_tokens=50),
    ):
        assert result.text == "b"
        assert result.tokens == tokenizer.encode("b<|endoftext|>")
        assert result.finish_reason == "eos"
    unending = generator("a", do_sample=False, max_new_tokens=5, eos_token_id=None)
    assert unending.finish_reason == "length"
    assert unending.new_tokens == 5


def test_an_empty_prompt_begins_with_the_end_of_text_token(generator, tokenizer):
    result = generator("", max_new_tokens=8, seed=0)
    expected = generator("<|endoftext|>", max_new_tokens=8, seed=0)
    assert result.tokens == expected.tokens
    assert result.prompt_tokens == 1
    assert str(result) == result.text
    characters = CharTokenizer.train(["abc"])
    with pytest.raises(GenerationError, match="empty"):
        spelling_generator("abc", characters)("")


def test_ids_that_the_tokenizer_lacks_are_never_chosen(tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size + 50, n_positions=64)
    with torch.no_grad():
        model.wte.weight[tokenizer.vocab_size :] *= 20
    generator = Generator(model, tokenizer)
    for options in ({"do_sample": False}, {"seed": 0}, {"num_beams": 2}):
        result = generator("The", max_new_tokens=20, eos_token_id=None, **options)
        assert max(result.tokens) < tokenizer.vocab_size


def test_a_foreign_tokenizer_is_noticed(tokenizer):
    with pytest.raises(GenerationError, match="tokenizer"):
        Generator(small_model(), tokenizer)("Once upon a time")


def test_the_window_decides_what_happens_past_n_positions(generator, tokenizer):
    words = TEXT * 3
    count = len(tokenizer.encode(words))
    assert count > 64
    with pytest.raises(GenerationError, match="n_positions=64"):
        generator(words)
    with pytest.raises(GenerationError, match="n_positions=64"):
        generator.stream("The cat", max_new_tokens=64)

    stopping = Generator(generator.model, tokenizer, window="stop")
    result = stopping("The cat", max_new_tokens=500, seed=0, eos_token_id=None)
    assert result.prompt_tokens + result.new_tokens == 64
    assert result.finish_reason == "length"
    with pytest.raises(GenerationError, match="n_positions=64"):
        stopping(words)

    told = []
    sliding = Generator(generator.model, tokenizer, window="slide", notify=told.append)
    short = sliding("The cat", max_new_tokens=20, seed=0)
    assert not told
    assert short.tokens == generator("The cat", max_new_tokens=20, seed=0).tokens
    for prompt in ("The cat", words):
        options = {"max_new_tokens": 100, "seed": 0, "eos_token_id": None}
        result = sliding(prompt, **options)
        assert result.new_tokens == 100
        assert list(sliding.stream(prompt, **options))
    assert len(told) == 1
    assert "32" in told[0]
    assert sliding(["The cat", words], **options)[0] == sliding("The cat", **options)


def test_bad_requests_are_refused(generator):
    with pytest.raises(GenerationError, match="window"):
        Generator(generator.model, generator.tokenizer, window="jump")
    with pytest.raises(GenerationError, match="temperature"):
        generator("a", temperature=float("nan"))
    with pytest.raises(GenerationError, match="one continuation"):
        generator.stream("a", num_beams=2)
    with pytest.raises(GenerationError, match="one continuation"):
        generator.stream("a", num_return_sequences=2)
    with pytest.raises(GenerationError, match="num_beams"):
        generator("a", num_beams=2, do_sample=True)
    with pytest.raises(GenerationError, match="must be a text"):
        generator(["a", 3], max_new_tokens=3)
    with pytest.raises(GenerationError, match="prompts is None; it must be a text"):
        generator(None)
    with pytest.raises(GenerationError, match="prompt is None; it must be a text"):
        generator.stream(None)
    with pytest.raises(GenerationError, match="stop is 5"):
        generator("a", stop=5)


def test_a_tokenizer_and_a_model_of_different_sizes_are_noticed(tokenizer):
    size = tokenizer.vocab_size
    with pytest.raises(GenerationError, match=f"up to {size - 2}.* ends at {size - 3}"):
        Generator(small_model(vocab_size=size - 2), tokenizer)
    # The end token, an added one, need not have a row: nothing generates it.
    told = []
    Generator(small_model(vocab_size=size - 1), tokenizer, notify=told.append)
    Generator(small_model(vocab_size=size + 127), tokenizer, notify=told.append)
    assert told == []
    Generator(small_model(vocab_size=size + 128), tokenizer, notify=told.append)
    assert len(told) == 1
    assert f"{size} tokens, and the model's vocabulary {size + 128}" in told[0]


def test_a_seed_means_the_same_in_any_batch_and_however_long_the_text(generator, tokenizer):
    sliding = Generator(generator.model, tokenizer, window="slide", notify=lambda message: None)
    options = {"max_new_tokens": 270, "seed": 3}
    prompts = ["The cat", "Once upon a time"]
    together = sliding(prompts, num_return_sequences=2, **options)
    for prompt, (first, second) in zip(prompts, together, strict=True):
        assert sliding(prompt, **options) == first
        assert first.tokens != second.tokens
    unended = {**options, "eos_token_id": None}
    assert sliding("The", **unended).tokens[:9] == generator("The", max_new_tokens=9, seed=3).tokens


def test_continuations_come_one_by_one_from_any_number(generator):
    options = {"max_new_tokens": 3, "seed": 3}
    found = generator.one_by_one("The", num_return_sequences=10**9, **options)
    first = [next(found) for _ in range(70)]
    assert first == generator("The", num_return_sequences=70, **options)


def test_timing_counts_what_was_read_and_written(generator, tokenizer):
    timing = Timing()
    results = generator(
        ["Once upon a time", "The"], max_new_tokens=6, seed=0, eos_token_id=None, timing=timing
    )
    assert timing.prefill_tokens == sum(result.prompt_tokens for result in results)
    assert timing.decode_tokens == 2 * 5
    weights = sum(
        p.nbytes for name, p in generator.model.named_parameters() if name != "wpe.weight"
    )
    assert 5 * weights < timing.decode_bytes < 5 * weights * 1.5
    assert timing.prefill_seconds == timing.first_token_seconds > 0
    assert timing.decode_seconds > 0


def test_a_saved_model_generates_the_same_when_loaded(generator, tokenizer, tmp_path):
    generator.model.save_pretrained(tmp_path, tokenizer)
    loaded = Generator.from_pretrained(tmp_path)
    options = {"max_new_tokens": 20, "seed": 9}
    assert loaded("Once", **options) == generator("Once", **options)
    # The path of the weights will do: the tokenizer is looked for beside them.
    beside = Generator.from_pretrained(tmp_path / "model.safetensors")
    assert beside("Once", **options) == loaded("Once", **options)


def test_half_precision_weights_are_widened_on_a_cpu_unless_asked_for(tmp_path):
    tokenizer = BPETokenizer.train(["ab " * 20], vocab_size=270)
    model = small_model(vocab_size=270, bos_token_id=269, eos_token_id=269).bfloat16()
    model.save_pretrained(tmp_path, tokenizer)
    assert Generator.from_pretrained(tmp_path).model.dtype == torch.float32
    kept = Generator.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert kept.model.dtype == torch.bfloat16


def test_an_unknown_option_is_named_with_the_one_that_was_meant(generator):
    with pytest.raises(GenerationError, match="no option 'temprature'.* did you mean temperature"):
        generator("ab", temprature=0.5)
    with pytest.raises(GenerationError, match="no option 'zoom'.* there are max_new_tokens, "):
        next(iter(generator.stream("ab", zoom=2)))
