"""Texts are the same with and without speculation: greedy, drawn, scored, streamed, stopped."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import pytest
import torch

from gpt2fast import Generator
from gpt2fast.errors import GenerationError
from gpt2fast.inference.decoding import Timing
from gpt2fast.inference.speculation import (
    DraftLengths,
    DraftRow,
    LookupDrafter,
    ModelDrafter,
    NgramPool,
    choice,
)
from gpt2fast.tokenizer import CharTokenizer
from small_engines import ALPHABET, TOKENIZER
from small_generators import small_model, successor_model

FORMATS = ["float32", "bfloat16", "float16", "int8", "int4"]


def packed(name, seed=0):
    """A model that repeats itself, as small random ones do."""
    model = small_model(seed, n_embd=32, n_head=2, n_positions=128, vocab_size=len(ALPHABET))
    if name in ("int8", "int4"):
        return model.quantize(name)
    return model.to(getattr(torch, name)).pack()


class Random(DraftLengths):
    """Proposes random numbers of tokens: nothing may depend on them."""

    def __init__(self, seed):
        super().__init__()
        self._draw = random.Random(seed)

    def renewed(self):
        return self

    def choose(self, chances, rows):
        return [self._draw.randrange(min(chance.most, self.most) + 1) for chance in chances]


@pytest.fixture(autouse=True)
def random_lengths(monkeypatch):
    monkeypatch.setattr(choice, "DraftLengths", lambda: Random(0))


@pytest.fixture(scope="module", params=FORMATS)
def generator(request):
    return Generator(packed(request.param), TOKENIZER, notify=lambda _: None)


@pytest.fixture(scope="module")
def drafts():
    """What to speculate with: lookup, a model, the same model in other numbers, a useless one."""
    other = small_model(5, n_layer=1, n_positions=64, vocab_size=len(ALPHABET))
    return ["lookup", packed("int4"), Generator(packed("int8"), TOKENIZER), other]


def requests(draw):
    """Options of all kinds."""
    options = {"max_new_tokens": draw.randrange(1, 60), "eos_token_id": None}
    if draw.random() < 0.6:
        options |= {"do_sample": True, "seed": draw.randrange(99), "temperature": 0.5}
        options |= draw.choice([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 0}])
        options |= draw.choice([{}, {"typical_p": 0.9}, {"epsilon_cutoff": 0.01}])
    else:
        options["temperature"] = 0
    options |= draw.choice(
        [{}, {}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 4},
         {"frequency_penalty": 0.5}, {"logit_bias": {3: 2.0}}, {"bad_words": "ab"},
         {"min_new_tokens": 1}, {"stop": ["e", "xy"]}, {"eos_token_id": [1, 2, 3]}]
    )  # fmt: skip
    if draw.random() < 0.3:
        options |= {"logprobs": True, "top_logprobs": draw.randrange(3)}
    return options


def text(draw):
    some = "".join(draw.choices(ALPHABET, k=draw.randrange(1, 20)))
    return some * draw.randrange(1, 4)


def test_a_call_gives_the_same(generator, drafts):
    draw = random.Random(generator.model.format)
    for _ in range(25):
        options = requests(draw)
        if options.get("do_sample") and draw.random() < 0.3:
            options["num_return_sequences"] = 3
        prompts = [text(draw) for _ in range(draw.randrange(1, 6))]
        plain = generator(prompts, **options)
        assert generator(prompts, speculate=draw.choice(drafts), **options) == plain, options


def test_a_stream_gives_the_same_pieces(generator, drafts):
    draw = random.Random(generator.model.format)
    for _ in range(8):
        options, prompt = requests(draw), text(draw)
        plain = generator.stream(prompt, **options)
        pieces = list(plain)
        other = generator.stream(prompt, speculate=draw.choice(drafts), **options)
        assert list(other) == pieces, options
        for name in ("text", "tokens", "logprobs", "top_logprobs", "finish_reason", "seed"):
            assert getattr(other, name) == getattr(plain, name), (name, options)


def test_many_prompts_with_options_of_their_own_give_the_same(generator, drafts):
    draw = random.Random(generator.model.format)
    asked = [(text(draw), requests(draw)) for _ in range(90)]
    expected = [[generator(prompt, **options)] for prompt, options in asked]
    assert list(generator.run(asked)) == expected
    assert list(generator.run(asked, speculate=draw.choice(drafts))) == expected
    assert list(generator.run(iter(asked), done=70, speculate="lookup")) == expected[70:]


def test_run_gives_an_error_in_its_place_and_does_what_the_engine_does_not(drafts):
    model = small_model(n_positions=64, vocab_size=len(ALPHABET)).pack()
    generator = Generator(model, TOKENIZER, window="slide", notify=lambda _: None)
    asked = [
        ("abc", {"max_new_tokens": 5, "temperature": 0}),
        ("abc", {"max_new_tokens": -5}),
        ("a~c", {}),
        ("abc", {"num_beams": 3, "max_new_tokens": 5}),
        ("abc", {"max_new_tokens": 0, "seed": 2}),
        ("abc", {"max_new_tokens": 0, "logprobs": True, "seed": 2}),
        ("abc" * 10, {"max_new_tokens": 90, "seed": 4}),
        ("abc", {"max_new_tokens": 5, "seed": 1, "num_return_sequences": 3}),
        ("abc", {"max_new_tokens": 5, "seed": 1, "num_return_sequences": 2}),
        ("abc", {"temperature": 0, "num_return_sequences": 2}),
    ]
    for speculate in ("off", *drafts):
        found = list(generator.run(asked, speculate=speculate))
        wrong = [number for number, one in enumerate(found) if isinstance(one, Exception)]
        assert wrong == [1, 2, 9]
        assert found[0] == [generator(*asked[0][:1], **asked[0][1])]
        assert found[3] == [generator("abc", **asked[3][1])]
        assert found[4][0].tokens == [] and found[5] == [generator("abc", **asked[5][1])]
        assert found[6] == [generator(asked[6][0], **asked[6][1])]
        samples = generator("abc", max_new_tokens=5, seed=1, num_return_sequences=5)
        assert [*found[7], *found[8]] == samples


def test_what_the_engine_does_not_carry_out_goes_on_without(drafts):
    model = small_model(n_positions=64, vocab_size=len(ALPHABET))
    for each in (model, model.pack()):
        generator = Generator(each, TOKENIZER, window="slide", notify=lambda _: None)
        for prompt, options in [
            ("abc", {"num_beams": 3, "max_new_tokens": 9}),
            ("abc" * 10, {"max_new_tokens": 90, "seed": 4}),
            ("abc", {"max_new_tokens": 0, "logprobs": True, "seed": 1}),
        ]:
            plain = generator(prompt, **options)
            assert generator(prompt, speculate=drafts[1], **options) == plain
    watched = small_model(n_positions=64, vocab_size=len(ALPHABET))
    seen = []
    watched.h[0].register_forward_hook(lambda *_: seen.append(1))
    generator = Generator(watched, TOKENIZER, notify=lambda _: None)
    plain = generator("abc", temperature=0, max_new_tokens=9)
    count = len(seen)
    assert generator("abc", temperature=0, max_new_tokens=9, speculate="lookup") == plain
    assert len(seen) == 2 * count


def test_a_window_that_stops_stops(drafts):
    model = small_model(n_positions=64, vocab_size=len(ALPHABET)).pack()
    generator = Generator(model, TOKENIZER, window="stop", notify=lambda _: None)
    for limits in ({"max_new_tokens": 90}, {"max_length": 80}):
        options = {"temperature": 0, "eos_token_id": None, **limits}
        plain = generator(["abc" * 15, "b"], **options)
        assert plain[0].new_tokens == 64 - 45
        for speculate in drafts:
            assert generator(["abc" * 15, "b"], speculate=speculate, **options) == plain


def test_two_streams_at_once_do_not_mix(generator):
    options = {"max_new_tokens": 30, "seed": 3, "eos_token_id": None}
    plain = [list(generator.stream(prompt, **options)) for prompt in ("abab", "xyxy")]
    one, two = (generator.stream(p, speculate="lookup", **options) for p in ("abab", "xyxy"))
    first, second = [], []
    while len(first) < len(plain[0]) or len(second) < len(plain[1]):
        first += [piece for piece in [next(one, "")] if piece]
        second += [piece for piece in [next(two, "")] if piece]
    assert [first, second] == plain


def test_a_stream_that_is_dropped_leaves_nothing_behind(generator):
    stream = generator.stream("abab", speculate="lookup", max_new_tokens=50, eos_token_id=None)
    next(stream)
    stream._steps.close()
    assert generator("abab", temperature=0, max_new_tokens=9, speculate="lookup") == generator(
        "abab", temperature=0, max_new_tokens=9
    )


def test_the_time_limit_ends_a_text(generator):
    options = {"max_time": 1e-9, "temperature": 0, "max_new_tokens": 20, "eos_token_id": None}
    found = generator("abc", speculate="lookup", **options)
    assert found.finish_reason == "time" and found.new_tokens <= 1
    stream = generator.stream("abc", speculate="lookup", **options)
    assert "".join(stream) == stream.text and stream.finish_reason == "time"


def test_texts_that_wait_for_their_turn_lose_no_time(generator):
    options = {"max_time": 2.5, "temperature": 0, "max_new_tokens": 4, "eos_token_id": None}
    clock = itertools.count(step=0.02)
    prompts = ["abc"] * 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        found = generator(prompts, speculate="lookup", **options)
        each = list(generator.run([(prompt, options) for prompt in prompts]))
    assert next(clock) > 5
    assert {one.finish_reason for one in [*found, *(one for (one,) in each)]} == {"length"}


def test_times_are_counted(generator):
    timing = Timing()
    generator(["abc", "d"], speculate="lookup", max_new_tokens=20, eos_token_id=None, timing=timing)
    assert timing.prefill_tokens == 4
    assert timing.first_token_seconds > 0 and timing.decode_seconds > 0
    assert 30 <= timing.decode_tokens <= 40  # tokens beside the end of a prompt count with it
    assert timing.decode_bytes >= generator.model.weight_bytes


def test_speculation_is_the_generator_s_unless_a_call_says_otherwise(monkeypatch):
    asked = []
    real = LookupDrafter.propose
    monkeypatch.setattr(
        LookupDrafter, "propose", lambda self, rows: asked.append(1) or real(self, rows)
    )
    model = packed("float32")
    on = Generator(model, TOKENIZER, speculate="lookup", notify=lambda _: None)
    off = Generator(model, TOKENIZER, notify=lambda _: None)
    for generator, speculate, expected in (
        (on, None, True), (on, "off", False), (off, None, False), (off, "lookup", True),
    ):  # fmt: skip
        asked.clear()
        generator("abab", temperature=0, max_new_tokens=5, speculate=speculate)
        assert bool(asked) == expected


def test_what_is_nothing_to_speculate_with_is_refused():
    model = packed("float32")
    generator = Generator(model, TOKENIZER, notify=lambda _: None)
    reversed_alphabet = CharTokenizer({c: id for id, c in enumerate(reversed(ALPHABET))})
    wrong = [
        (7, 'speculate is 7; it must be "off", "lookup"'),
        (Generator(model, reversed_alphabet), "the id 0 is"),
        (small_model(vocab_size=50), "vocabulary of 50, and the model one of 61"),
    ]
    for speculate, part in wrong:
        with pytest.raises(GenerationError, match=part):
            generator("abc", speculate=speculate)
        with pytest.raises(GenerationError, match=part):
            generator.stream("abc", speculate=speculate)
        with pytest.raises(GenerationError, match=part):
            Generator(model, TOKENIZER, speculate=speculate)
    hooked = small_model(vocab_size=len(ALPHABET))
    hooked.h[0].register_forward_hook(lambda *_: None)
    with pytest.raises(GenerationError, match="without hooks"):
        generator("abc", speculate=hooked)


# -- distributions --------------------------------------------------------------------------------


def chi_square(counts, probabilities, total):
    """The statistic, and the number of cells, of which rare ones are put together."""
    statistic, cells, rare, expected_rare = 0.0, 0, 0, 0.0
    for token, probability in enumerate(probabilities):
        expected = probability * total
        if expected < 8:
            rare, expected_rare = rare + counts[token], expected_rare + expected
            continue
        statistic += (counts[token] - expected) ** 2 / expected
        cells += 1
    if expected_rare > 0:
        statistic += (rare - expected_rare) ** 2 / max(expected_rare, 1e-9)
        cells += 1
    return statistic, cells


@pytest.mark.parametrize("speculate", ["lookup", "model"])
def test_drawn_tokens_have_the_model_s_distribution(speculate, drafts):
    """Seeds of their own for many texts: the third token of each, by the two before it."""
    model = packed("float32")
    generator = Generator(model, TOKENIZER, notify=lambda _: None)
    draft = drafts[1] if speculate == "model" else speculate
    options = {"do_sample": True, "temperature": 1.0, "top_k": 4, "top_p": 1.0}
    count = 6000
    torch.manual_seed(0)
    found = generator(
        ["ababab"] * count, max_new_tokens=3, eos_token_id=None, speculate=draft, **options
    )
    prompt = TOKENIZER.encode("ababab")
    pairs = Counter(tuple(one.tokens[:2]) for one in found)
    tested = 0
    for pair, total in pairs.most_common(4):
        logits = model(torch.tensor([[*prompt, *pair]])).logits[0, -1].double()
        kept = logits.topk(4).indices
        probabilities = torch.zeros_like(logits)
        probabilities[kept] = logits[kept].softmax(0)
        counts = Counter(one.tokens[2] for one in found if tuple(one.tokens[:2]) == pair)
        statistic, cells = chi_square(counts, probabilities.tolist(), total)
        # Mean cells - 1, variance twice that: five standard deviations.
        freedom = cells - 1
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5, (pair, statistic, cells)
        tested += total
    assert tested > count / 20


def test_the_statistic_sees_another_distribution():
    draw = random.Random(0)
    counts = Counter(draw.choices(range(4), [4, 3, 2, 1], k=3000))
    statistic, cells = chi_square(counts, [0.4, 0.3, 0.2, 0.1], 3000)
    assert statistic < (cells - 1) + 20
    statistic, _ = chi_square(counts, [0.35, 0.3, 0.2, 0.15], 3000)
    assert statistic > 30


# -- drafters in use ------------------------------------------------------------------------------


def test_a_model_that_drafts_for_itself_is_always_right():
    from small_engines import job, small_engine

    model = packed("float32")
    seconds = itertools.count()
    lengths = DraftLengths(clock=lambda: next(seconds))  # steps of all lengths take as long
    drafter = ModelDrafter(model, lengths=lengths)
    for options in ({"temperature": 0}, {"seed": 3, "temperature": 1.2, "top_k": 10}):
        engine = small_engine(model, drafter=drafter)
        ticket = engine.submit(job(model, "abc", max_new_tokens=60, eos_token_id=None, **options))
        assert ticket.result().new_tokens == 60
        stats = engine.stats()
        assert stats.drafted_tokens == stats.accepted_tokens > 40
        assert drafter.cache_rows == 0


def test_what_repeats_takes_few_steps():
    from small_engines import job, small_engine

    size = len(ALPHABET)
    model = successor_model([(7 * token + 3) % size for token in range(size)]).pack()
    seconds = itertools.count()
    lengths = DraftLengths(clock=lambda: next(seconds))  # steps of all lengths take as long
    drafter = LookupDrafter(NgramPool(), lengths)
    engine = small_engine(model, drafter=drafter)
    greedy = {"temperature": 0, "max_new_tokens": 60, "eos_token_id": None}
    texts = [engine.submit(job(model, "abc", **greedy)).result() for _ in range(2)]
    assert texts[0] == texts[1]
    # All letters come before any comes again: only the second text is like an earlier one.
    stats = engine.stats()
    assert stats.drafted_tokens == stats.accepted_tokens > 40
    assert 60 < stats.steps < 80
    assert not drafter._texts


def test_drafters_take_rows_as_the_engine_gives_them(generator):
    """The tokens of a row are never shorter than before, and the numbers are those to come."""
    seen = {}

    class Watching(LookupDrafter):
        def propose(self, rows):
            for row in rows:
                assert isinstance(row, DraftRow)
                assert len(row.tokens) >= len(seen.get(row.id, []))
                seen[row.id] = list(row.tokens)
            return super().propose(rows)

    from small_engines import job, small_engine

    engine = small_engine(generator.model, drafter=Watching(None, Random(1)), cache_tokens=256)
    jobs = [
        job(generator.model, "ab" * n, max_new_tokens=40, seed=n, eos_token_id=None)
        for n in range(1, 12)
    ]
    found = list(engine.run(jobs))
    plain = list(small_engine(generator.model).run(jobs))
    assert found == plain
