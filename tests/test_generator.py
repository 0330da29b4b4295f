"""The `Generator`: results, log-probabilities, streams and windows of a model and its tokenizer."""

from __future__ import annotations

import itertools

import pytest
import torch

from comparison import needs_native
from gpt2fast.errors import GenerationError
from gpt2fast.inference import teacher_forcing
from gpt2fast.inference.continuation import Generation
from gpt2fast.inference.decoding import Timing
from gpt2fast.inference.generator import Generator
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer
from small_generators import small_model, successor_model

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
    # No setting: it takes long prompts of many to fill a batch.
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


@needs_native
def test_float16_weights_stay_float16_where_they_are_packed(tmp_path):
    tokenizer = BPETokenizer.train(["ab " * 20], vocab_size=270)
    model = small_model(vocab_size=270, bos_token_id=269, eos_token_id=269)
    model.half().save_pretrained(tmp_path, tokenizer)
    generator = Generator.from_pretrained(tmp_path, pack=True)
    wide = Generator.from_pretrained(tmp_path, dtype="float32", pack=True)
    assert (generator.model.format, wide.model.format) == ("float16", "float32")
    options = {"max_new_tokens": 30, "seed": 3, "eos_token_id": None}
    assert generator("ab", **options).tokens == wide("ab", **options).tokens
    # Without packed weights the modules run, and bfloat16 rounds what it is multiplied with.
    assert Generator.from_pretrained(tmp_path).model.dtype == torch.float32
    model.bfloat16().save_pretrained(tmp_path, tokenizer)
    assert Generator.from_pretrained(tmp_path, pack=True).model.format == "float32"


def test_an_unknown_option_is_named_with_the_one_that_was_meant(generator):
    with pytest.raises(GenerationError, match="no option 'temprature'.* did you mean temperature"):
        generator("ab", temprature=0.5)
    with pytest.raises(GenerationError, match="no option 'zoom'.* there are max_new_tokens, "):
        next(iter(generator.stream("ab", zoom=2)))
