"""Constrained output: masks against brute force, and texts that fit whatever a model writes."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable

import jsonschema
import pytest
import regex
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt2fast import GPT2, Generator, GPT2Config
from gpt2fast.errors import GenerationError, TokenizerError
from gpt2fast.inference import grammar as grammars
from gpt2fast.inference.grammar import LARGEST, Grammar, Matcher
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer, Tokenizer
from time_limits import patience
from token_masks import assert_follows, tokens_of

TEXT = (
    '{"name": "Ann", "age": 31, "tags": ["a", "b"], "ok": true, "none": null, "no": false}\n'
    "the cat sat on the mat; über Größe, 你好 🤗🤗 naïve café yes no maybe -1.5e10 0123456789\n"
    "ABCXYZ abcxyz \\\" \\n (a|b)* [x] {y}\t~!@#$%^&*_+=<>,.?/\\:;'`|-\n<|endoftext|>"
) * 3


def bpe() -> Tokenizer:
    return BPETokenizer.train([TEXT], 330)


def characters() -> Tokenizer:
    return CharTokenizer.train([TEXT])


def characters_without_end() -> Tokenizer:
    return CharTokenizer.train([TEXT.replace("<|endoftext|>", "")])


def library() -> Tokenizer:
    """Another pre-tokenizer than GPT-2's, on bytes all the same."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT.replace("<|endoftext|>", "")], trainer)
    found = LibraryTokenizer(json.loads(trained.to_str()), {"eos_token": "<|endoftext|>"})
    assert type(found) is LibraryTokenizer
    return found


def added() -> Tokenizer:
    """With special tokens behind the end token."""
    return bpe().with_tokens(["<|user|>", "<|bot|>"])


KINDS: dict[str, Callable[[], Tokenizer]] = {
    each.__name__: each for each in (bpe, characters, characters_without_end, library, added)
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    return KINDS[request.param]()


def small_generator(tokenizer: Tokenizer, seed: int = 0, padding: int = 5) -> Generator:
    """A random model with rows that the tokenizer has no tokens for."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size + padding, n_positions=256, n_embd=16, n_layer=1, n_head=2,
        initializer_range=0.6, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Generator(GPT2(config).eval(), tokenizer, notify=lambda message: None)


def allowed(matcher: Matcher, size: int) -> set[int]:
    out = torch.full((-(-size // 32),), 0x5A5A5A5A, dtype=torch.int32)
    matcher.mask(out)
    assert all(token < size for token in tokens_of(out, 32 * len(out)))
    return set(tokens_of(out, size))


def walk(
    grammar: Grammar,
    tokenizer: Tokenizer,
    begins: Callable[[bytes], bool],
    is_whole: Callable[[bytes], bool],
    rng: random.Random,
) -> bytes:
    """A random continuation, each of whose masks is compared to a look at every token."""
    matcher, text, tokens = grammar.matcher(), b"", []
    bytes_of = tokenizer.token_bytes()
    special = {t.id for t in tokenizer.added_tokens}
    end = tokenizer.eos_token_id
    for _ in range(60):
        expected = {
            token
            for token, piece in bytes_of.items()
            if token not in special and begins(text + piece)
        }
        assert matcher.finished == (is_whole(text) and not expected)
        if is_whole(text) and end is not None:
            expected.add(end)
        if not expected:
            with pytest.raises(GenerationError, match="is complete, and there is no end token"):
                allowed(matcher, tokenizer.vocab_size + 7)
            return text
        assert allowed(matcher, tokenizer.vocab_size + 7) == expected, text
        for other in rng.sample(sorted(bytes_of), 8):
            assert matcher.accepts([other]) == (other in expected), (text, other)
        token = rng.choice(sorted(expected))
        matcher.advance(token)
        tokens.append(token)
        if token == end:
            assert matcher.finished and matcher.accepts([token]) == 0
            return text
        text += bytes_of[token]
    return text


CHOICES = ["yes", "no", "yes, sir", "über", "你好 🤗", "🤗🤗", "maybe", "Größe", '"\\\n\t']


def test_masks_of_choices_are_those_of_brute_force(tokenizer):
    possible = [text for text in CHOICES if encodable(tokenizer, text)]
    whole = {text.encode() for text in possible}
    prefixes = {text[:n] for text in whole for n in range(1, len(text) + 1)}
    grammar = Grammar.choices(possible, tokenizer)
    for seed in range(20):
        walk(grammar, tokenizer, prefixes.__contains__, whole.__contains__, random.Random(seed))


def encodable(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except TokenizerError:
        return False
    return True


PATTERNS = [
    r"[a-c]{2,5}x?",
    r"(ab|a)*c",
    r"[0-9]{3}-[0-9]{4}|none",
    r"(yes|no|maybe)(, (yes|no|maybe)){0,2}\.",
    r"[A-Z][a-z]+( [A-Z][a-z]+)*",
    r"(a|b)*a(a|b){3}",
    r'"([^"\\]|\\["n])*"',
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_regular_expressions_are_those_of_brute_force(tokenizer, pattern):
    # ASCII alone: the oracle looks at bytes.
    ascii_pattern = pattern.replace('[^"\\\\]', "[ !#-\\[\\]-~]")
    compiled = regex.compile(ascii_pattern.encode())

    def begins(text: bytes) -> bool:
        return compiled.fullmatch(text, partial=True) is not None

    def is_whole(text: bytes) -> bool:
        return compiled.fullmatch(text) is not None

    grammar = Grammar.regex(ascii_pattern, tokenizer)
    for seed in range(6):
        walk(grammar, tokenizer, begins, is_whole, random.Random(seed))


def test_masks_of_a_json_schema_are_those_of_brute_force(tokenizer):
    schema = {
        "type": "object",
        "properties": {
            "ok": {"type": "boolean"},
            "n": {"enum": [1, -20, None, "a"]},
            "tags": {"type": "array", "items": {"const": "b"}, "maxItems": 2},
        },
        "required": ["ok", "tags"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    whole = set()
    for ok in ("true", "false"):
        for n in (None, "1", "-20", "null", '"a"'):
            for tags in ("[]", '["b"]', '["b","b"]'):
                middle = "" if n is None else f'"n":{n},'
                whole.add(f'{{"ok":{ok},{middle}"tags":{tags}}}'.encode())
    prefixes = {text[:n] for text in whole for n in range(1, len(text) + 1)}
    grammar = Grammar.json_schema(schema, tokenizer)
    for seed in range(10):
        walk(grammar, tokenizer, prefixes.__contains__, whole.__contains__, random.Random(seed))


LARK = """
start: "(" item ("," item)* ")"
item: WORD | start
WORD: /[a-c]{1,2}/
"""
GBNF = """
# the same
root ::= "(" item ("," item)* ")"
item ::= word | root
word ::= [a-c]{1,2}
"""


@pytest.mark.parametrize("text", [LARK, GBNF], ids=["lark", "gbnf"])
def test_masks_of_a_recursive_grammar_are_those_of_brute_force(tokenizer, text):
    recursive = regex.compile(rb"(?<s>\((?<i>[a-c]{1,2}|(?&s))(,(?&i))*\))")
    # Every beginning that can go on has a shortest completion.
    endings = [b"", b")", b"a)", b"(a))", b"a", b"a))", b"))", b")))", b"a)))"]

    def is_whole(text: bytes) -> bool:
        return recursive.fullmatch(text) is not None

    def begins(text: bytes) -> bool:
        depth = text.count(b"(") - text.count(b")")
        ends = [b")" * depth, b"a" + b")" * depth, b"(a" + b")" * (depth + 1), *endings]
        return any(is_whole(text + end) for end in ends)

    grammar = Grammar.lark(text, tokenizer)
    for seed in range(8):
        walk(grammar, tokenizer, begins, is_whole, random.Random(seed))


def test_characters_may_be_split_over_tokens():
    """With bytes alone for tokens, a character of four bytes takes four of them."""
    single = BPETokenizer.train(["x"], 257)
    grammar = Grammar.choices(["🤗é"], single)
    matcher = grammar.matcher()
    for id in single.encode("🤗é"):
        assert not matcher.finished
        assert allowed(matcher, single.vocab_size) == {id}
        matcher.advance(id)
    assert matcher.finished
    grammar = Grammar.regex(r"\p{Greek}+", single)
    for seed in range(5):
        rng, matcher, tokens = random.Random(seed), grammar.matcher([]), []
        while len(tokens) < 12:
            tokens.append(rng.choice(sorted(allowed(matcher, 257))))
            matcher.advance(tokens[-1])
        text = bytes(b for id in tokens for b in single.token_bytes()[id])
        written = text.decode("utf-8", "ignore")
        assert regex.fullmatch(r"\p{Greek}+", written), written


@pytest.mark.parametrize("seed", range(6))
def test_taking_tokens_back_leads_where_they_were_never_added(tokenizer, seed):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": True}},
    }
    grammar = Grammar.json_schema(schema, tokenizer)
    rng, size = random.Random(seed), tokenizer.vocab_size
    matcher, tokens = grammar.matcher(), []
    for _ in range(40):
        if tokens and rng.random() < 0.3:
            count = rng.randint(0, len(tokens))
            matcher.rollback(count)
            tokens = tokens[: len(tokens) - count]
        elif not matcher.finished:
            tokens.append(rng.choice(sorted(allowed(matcher, size))))
            matcher.advance(tokens[-1])
        other = grammar.matcher()
        for token in tokens:
            other.advance(token)
        assert matcher.finished == other.finished
        if not matcher.finished:
            assert allowed(matcher, size) == allowed(other, size)
    with pytest.raises(ValueError, match="cannot be taken back"):
        matcher.rollback(len(tokens) + 1)


@pytest.mark.parametrize("seed", range(4))
def test_it_counts_the_tokens_that_fit(tokenizer, seed):
    grammar = Grammar.regex(r"[a-c]{2,5}(x[0-9]+)?", tokenizer)
    rng = random.Random(seed)
    matcher = grammar.matcher()
    for _ in range(12):
        if matcher.finished:
            break
        drafts = [rng.choice(sorted(allowed(matcher, tokenizer.vocab_size)))]
        drafts += [rng.randrange(-2, tokenizer.vocab_size + 3) for _ in range(3)]
        expected, other = 0, grammar.matcher()
        for token in matcher._tokens:
            other.advance(token)
        for token in drafts:
            if other.finished or token not in allowed(other, tokenizer.vocab_size):
                break
            other.advance(token)
            expected += 1
        before = allowed(matcher, tokenizer.vocab_size)
        assert matcher.accepts(drafts) == expected
        assert allowed(matcher, tokenizer.vocab_size) == before
        matcher.advance(drafts[0])


def test_a_token_that_does_not_fit_is_refused_and_changes_nothing():
    tokenizer = bpe()
    matcher = Grammar.choices(["yes", "no"], tokenizer).matcher()
    (y,) = tokenizer.encode("y")
    (x,) = tokenizer.encode("x")
    matcher.advance(y)
    before = allowed(matcher, tokenizer.vocab_size)
    for token in (x, tokenizer.eos_token_id, -1, 10**9, tokenizer.vocab_size):
        with pytest.raises(GenerationError, match=r"does not fit the list of choices after 'y'"):
            matcher.advance(token)
    assert allowed(matcher, tokenizer.vocab_size) == before


def test_the_end_is_allowed_where_the_text_is_complete_and_nowhere_else():
    tokenizer = bpe()
    end = tokenizer.eos_token_id
    matcher = Grammar.regex("a+", tokenizer).matcher()
    assert end not in allowed(matcher, 400)
    matcher.advance(tokenizer.encode("a")[0])
    assert end in allowed(matcher, 400) and not matcher.finished
    other = Grammar.regex("a+", tokenizer).matcher([])
    other.advance(tokenizer.encode("a")[0])
    assert end not in allowed(other, 400)
    # An end token of the caller's that is text otherwise: it only ends.
    b = tokenizer.encode("b")[0]
    ending = Grammar.regex("b?a+b?", tokenizer).matcher([b, end])
    assert b not in allowed(ending, 400)
    ending.advance(tokenizer.encode("a")[0])
    assert {b, end} <= allowed(ending, 400)
    ending.advance(b)
    assert ending.finished
    with pytest.raises(GenerationError, match="has ended"):
        allowed(ending, 400)
    ending.rollback(1)
    assert not ending.finished and {b, end} <= allowed(ending, 400)


def test_special_tokens_are_no_text():
    tokenizer = added()
    grammar = Grammar.regex(r"[<|>a-z]+", tokenizer)
    special = {token.id for token in tokenizer.added_tokens}
    assert not special & allowed(grammar.matcher(), tokenizer.vocab_size)
    named = Grammar.lark('start: <|user|> "a" <|bot|>', tokenizer).matcher()
    assert allowed(named, tokenizer.vocab_size) == set(tokenizer.encode("<|user|>"))


def test_a_mask_narrower_or_wider_than_the_vocabulary():
    tokenizer = bpe()
    matcher = Grammar.regex("[a-z]+", tokenizer).matcher()
    whole = allowed(matcher, tokenizer.vocab_size)
    assert allowed(matcher, 5000) == whole
    narrow = torch.zeros(4, dtype=torch.int32)
    matcher.mask(narrow)
    assert set(tokens_of(narrow, 128)) == {token for token in whole if token < 128}


# What a random model writes.


def texts_of(generator, grammar, count=4, **options):
    """The complete ones of some texts; a check that others are cut is part of it."""
    for seed in range(count):
        options = {"max_new_tokens": 120, "seed": seed, "temperature": 1.5} | options
        found = generator("the", grammar=grammar, **options)
        assert found.finish_reason in ("stop", "eos", "length")
        if found.finish_reason != "length":
            yield found.text
        streamed = generator.stream("the", grammar=grammar, **options)
        assert ("".join(streamed), streamed.finish_reason) == (found.text, found.finish_reason)


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\p{L}{3}\.", r"[^x]{4}", "(?i:Größe)"])
def test_texts_match_the_regular_expression(tokenizer, pattern):
    generator = small_generator(tokenizer)
    try:
        grammar = Grammar.regex(pattern, tokenizer)
    except GenerationError as error:
        assert "no text" in str(error) and isinstance(tokenizer, CharTokenizer)
        return
    for text in texts_of(generator, grammar):
        assert regex.fullmatch(pattern, text), text


def test_texts_are_among_the_choices(tokenizer):
    generator = small_generator(tokenizer)
    possible = [text for text in CHOICES if encodable(tokenizer, text)]
    grammar = Grammar.choices(possible, tokenizer)
    found = list(texts_of(generator, grammar, count=12))
    assert len(found) == 12 and set(found) <= set(possible)
    many = generator("the", grammar=grammar, num_return_sequences=40, temperature=2.0, seed=1)
    assert all(each.text in possible for each in many)
    assert len({each.text for each in many}) > 3
    greedy = generator("the", grammar=grammar, do_sample=False)
    assert greedy.text in possible and greedy.finish_reason in ("stop", "eos")


names = st.sampled_from(["a", "b", "name", "über", 'q"q', "x y"])
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-1000, 1000), st.sampled_from(["", "a", "é", '"', "yes"])
)
schemas = st.recursive(
    st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
            st.integers(-500, 500), st.integers(0, 700),
        ),
        st.builds(
            lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
            st.integers(0, 3), st.integers(0, 4),
        ),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}[0-9]?$"}),
        st.builds(lambda values: {"enum": values}, st.lists(scalars, min_size=1, max_size=4)),
        st.builds(lambda value: {"const": value}, scalars),
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda items, low, more: {
                "type": "array", "items": items, "minItems": low, "maxItems": low + more,
            },
            inner, st.integers(0, 2), st.integers(0, 2),
        ),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": sorted(set(required) & set(properties)),
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3), st.lists(names, max_size=3),
        ),
        st.builds(lambda either: {"anyOf": either}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def writers() -> list[Generator]:
    return [small_generator(make()) for make in (bpe, library, characters)]


@settings(deadline=None, max_examples=60)
@given(schema=schemas, seed=st.integers(0, 2**31))
def test_texts_are_valid_under_their_schema(writers, schema, seed):
    complete = 0
    for generator in writers:
        try:
            grammar = Grammar.json_schema(schema, generator.tokenizer)
        except GenerationError as error:
            # An alphabet may lack what a constant needs.
            assert "no text" in str(error) and isinstance(generator.tokenizer, CharTokenizer)
            continue
        try:
            found = generator(
                "the", grammar=grammar, max_new_tokens=200, seed=seed, temperature=1.2
            )
        except GenerationError as error:
            assert "cannot go on" in str(error) and isinstance(generator.tokenizer, CharTokenizer)
            continue
        if found.finish_reason != "length":
            jsonschema.validate(json.loads(found.text), schema)
            complete += 1
    assert complete, "every text was cut"


def test_what_a_length_cuts_is_the_beginning_of_a_text():
    generator = small_generator(bpe())
    grammar = Grammar.json_schema({"type": "array", "minItems": 300}, generator.tokenizer)
    found = generator("the", grammar=grammar, max_new_tokens=30)
    assert found.finish_reason == "length" and found.new_tokens == 30
    assert found.text.startswith("[")


def test_a_text_that_its_last_token_completes_is_no_cut_one():
    tokenizer = characters()
    generator = small_generator(tokenizer)
    grammar = Grammar.choices(["yes"], tokenizer)
    found = generator("the", grammar=grammar, max_new_tokens=3)
    assert (found.text, found.finish_reason, found.new_tokens) == ("yes", "stop", 3)
    assert generator("the", grammar=grammar, max_new_tokens=2).finish_reason == "length"


def test_other_options_go_with_a_grammar():
    tokenizer = bpe()
    generator = small_generator(tokenizer)
    grammar = Grammar.regex(r"[a-c ]{4,30}\.", tokenizer)
    every = [
        {"repetition_penalty": 1.5},
        {"top_k": 3, "top_p": 0.8, "min_p": 0.05},
        {"frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
        {"logit_bias": {tokenizer.encode("x")[0]: 100.0}},
        {"min_new_tokens": 3},
        {"logits_processor": [lambda ids, scores: torch.zeros_like(scores)]},
        {"do_sample": False, "logits_processor": [lambda ids, scores: scores.clamp(min=-5.0)]},
        {"logprobs": True, "top_logprobs": 2},
        {"eos_token_id": None},
        {"stop": "."},
        {"stopping_criteria": [lambda ids, scores: ids.shape[1] > 12]},
    ]
    for options in every:
        for seed in range(4):
            found = generator("the", grammar=grammar, max_new_tokens=60, seed=seed, **options)
            if options.get("stop"):
                assert re.fullmatch(r"[a-c ]{4,30}", found.text), options
            elif "stopping_criteria" in options or found.finish_reason == "length":
                assert re.fullmatch(r"[a-c ]{0,30}\.?", found.text), options
            else:
                assert re.fullmatch(r"[a-c ]{4,30}\.", found.text), options


def test_options_that_leave_no_token_are_an_error():
    tokenizer = characters()
    generator = small_generator(tokenizer)
    grammar = Grammar.choices(["aaaa"], tokenizer)
    for options in ({"no_repeat_ngram_size": 1}, {"bad_words": ["a"]}):
        with pytest.raises(GenerationError, match=r"does not fit|that the grammar allows"):
            generator("a", grammar=grammar, max_new_tokens=9, **options)


def test_a_grammar_that_no_token_continues_is_an_error():
    letters = CharTokenizer.train(["abc <|endoftext|>"])
    generator = small_generator(letters)
    grammar = Grammar.regex("a(x|[xy]+)", letters)
    with pytest.raises(GenerationError, match="'a', cannot go on: none of the tokenizer's tokens"):
        generator("abc", grammar=grammar)
    with pytest.raises(GenerationError, match="no text of the tokenizer's tokens fits it"):
        Grammar.json_schema({"type": "object"}, letters)


def test_draws_follow_the_allowed_distribution():
    tokenizer = bpe()
    generator = small_generator(tokenizer)
    grammar = Grammar.regex("[a-f]", tokenizer)
    count = 4000
    found = generator(
        "the", grammar=grammar, num_return_sequences=count, seed=1, temperature=3.0, top_k=0,
        top_p=None,
    )  # fmt: skip
    model = generator.model
    logits = model(torch.tensor([tokenizer.encode("the")])).logits[0, -1].double() / 3.0
    ids = [tokenizer.encode(letter)[0] for letter in "abcdef"]
    expected = logits[ids].softmax(-1).detach() * count
    counts = torch.tensor([sum(each.text == letter for each in found) for letter in "abcdef"])
    assert_follows(counts.double(), expected)


def test_a_grammar_and_its_options_are_checked():
    tokenizer = bpe()
    generator = small_generator(tokenizer)
    grammar = Grammar.choices(["a"], tokenizer)
    with pytest.raises(GenerationError, match="num_beams is 2, and a grammar is followed"):
        generator("the", grammar=grammar, num_beams=2)
    with pytest.raises(GenerationError, match="it must be a Grammar"):
        generator("the", grammar='{"type": "object"}')
    with pytest.raises(GenerationError, match="another tokenizer"):
        generator("the", grammar=Grammar.choices(["a"], characters()))
    # An equal tokenizer will do.
    assert generator("the", grammar=Grammar.choices(["a"], bpe())).text == "a"


def test_transformers_tokenizers_will_do():
    import transformers

    tokenizer = bpe()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(backend_of(tokenizer)),
        eos_token="<|endoftext|>",
    )
    generator = small_generator(tokenizer)
    grammar = Grammar.choices(["yes", "no"], theirs)
    assert generator("the", grammar=grammar).text in ("yes", "no")


def backend_of(tokenizer: Tokenizer) -> str:
    """The tokenizer.json that it writes."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")


def test_tokenizers_of_words_are_refused():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TokenizerError, match="tokens that stand for bytes"):
        Grammar.choices(["a"], Tokenizer.of(words))


# Grammars that are wrong, or meant to do harm.


WRONG: Iterable[tuple[Callable[..., Grammar], object, str]] = [
    (Grammar.regex, "(", "refused: unclosed group"),
    (Grammar.regex, "a(?=b)", "look-around"),
    (Grammar.regex, r"(a)\1", "backreferences"),
    (Grammar.regex, "", "only the empty text"),
    (Grammar.regex, "\ud800", "lone surrogate"),
    (Grammar.regex, 5, "must be a text"),
    (Grammar.regex, "(" * 10_000 + ")" * 10_000, "refused: "),
    (Grammar.regex, "a" * (LARGEST + 1), f"{LARGEST + 1} bytes, and a grammar at most {LARGEST}"),
    (Grammar.regex, ".*" * 3000, "refused: lexer precomputation failed"),
    (Grammar.json_schema, "{", "not valid JSON"),
    (Grammar.json_schema, "[]", "must be an object"),
    (Grammar.json_schema, False, "schema is false"),
    (Grammar.json_schema, {"type": "strng"}, "Invalid type: strng"),
    (Grammar.json_schema, {"not": {}}, r'Unimplemented keys: \["not"\]'),
    (Grammar.json_schema, {"type": "array", "uniqueItems": True}, "uniqueItems"),
    (Grammar.json_schema, {"a": object()}, "is no JSON"),
    (Grammar.json_schema, {"$ref": "#"}, "no text"),
    (
        Grammar.json_schema,
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "no text",
    ),
    (Grammar.json_schema, {"$ref": "http://127.0.0.1:1/schema"}, "does not fetch"),
    (Grammar.json_schema, {"$ref": "file:///etc/passwd"}, "does not fetch"),
    (Grammar.json_schema, '{"items":' * 10_000 + "{}" + "}" * 10_000, "nested"),
    (Grammar.json_schema, '{"items":' * 101 + "{}" + "}" * 101, "nested more than 100 deep"),
    (Grammar.json_schema, json.dumps({"enum": ["x" * 10**7]}), "bytes, and a grammar at most"),
    (
        Grammar.json_schema,
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": True}} for j in range(9)]}
                   for i in range(9)]},
        "too large",
    ),
    (Grammar.json_schema, {"type": "string", "x-guidance": 5}, "refused"),
    (Grammar.lark, "start: missing", "unknown name"),
    (Grammar.lark, "nonsense", "refused: "),
    (Grammar.lark, "start: " + "(" * 10_000 + '"a"' + ")" * 10_000, "too deeply nested"),
    (Grammar.lark, "start: start", "no text"),
    (
        Grammar.lark,
        "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "x"',
        "too big",
    ),
    (Grammar.lark, "root ::= missing", "not valid GBNF"),
    (Grammar.lark, 'x ::= "a"', "not valid GBNF"),
    (Grammar.lark, "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000, "nested too deeply"),
    (Grammar.choices, [], "must be a list of texts"),
    (Grammar.choices, "yes", "must be a list of texts"),
    (Grammar.choices, ["a", ""], "at least one character"),
    (Grammar.choices, ["a", 5], "at least one character"),
    (Grammar.choices, ["x" * 99] * 2000, "bytes, and a grammar at most"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "text", "message"),
    WRONG,
    ids=[f"{m.__name__}-{i}" for i, (m, _, _) in enumerate(WRONG)],
)
def test_what_is_no_grammar_is_refused_at_once(make, text, message, capfd):
    tokenizer = bpe()
    begun = time.perf_counter()
    with pytest.raises(GenerationError, match=message) as caught:
        make(text, tokenizer)
    assert time.perf_counter() - begun < 5 * patience()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "")


HOSTILE = [
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+b",
    "(x+x+)+y",
    "(.*)*" * 50,
    "(a?){300}a{300}",
    "a{1000000}",
    "(((x{100}){100}){100}){100}" * 99,
    "(.{1,1000}){1,1000}",
    r"\p{L}{1,500}\d{3}",
    "(a|b)*a(a|b){14}c",
    "(.*a){25}",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_expressions_end_soon_one_way_or_the_other(pattern):
    """They run in linear time, or into a limit; nothing takes forever, or a machine's memory."""
    generator = small_generator(bpe())
    begun = time.perf_counter()
    try:
        grammar = Grammar.regex(pattern, generator.tokenizer)
        found = generator("the", grammar=grammar, max_new_tokens=60, seed=1)
        assert found.new_tokens
    except GenerationError as error:
        assert re.search("too large|too much time or memory|refused", str(error)), error
    assert time.perf_counter() - begun < 20 * patience()


def test_a_text_that_takes_too_much_ends_with_an_error(monkeypatch):
    monkeypatch.setitem(grammars._LIMITS, "max_lexer_states", 60)
    tokenizer = bpe()
    generator = small_generator(tokenizer)
    grammar = Grammar.regex("(a|b)*a(a|b){12}c", tokenizer)
    with pytest.raises(GenerationError, match="too much time or memory after .*too many states"):
        generator(["the"] * 20, grammar=grammar, max_new_tokens=200, seed=1)


def test_what_others_have_filled_does_not_end_a_text(monkeypatch):
    """Matchers of a grammar share an automaton, whose states are counted together."""
    monkeypatch.setitem(grammars._LIMITS, "max_lexer_states", 400)
    tokenizer = bpe()
    grammar = Grammar.regex("(a|b)*a(a|b){12}c", tokenizer)
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    other = grammar.matcher()
    other.advance(a)
    rng = random.Random(0)
    used = 0
    for _ in range(60):
        matcher = grammar.matcher()
        for _ in range(16):
            matcher.advance(rng.choice([a, b]))
            assert {a, b} <= allowed(matcher, 400)
            used += 1
    assert used > 400
    assert {a, b} <= allowed(other, 400)
    other.rollback(1)
    assert allowed(other, 400) == allowed(grammar.matcher(), 400)


def test_equal_grammars_are_compiled_once(monkeypatch):
    tokenizer = bpe()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    Grammar.json_schema(schema, tokenizer)

    def never(*arguments):
        raise AssertionError("compiled again")

    monkeypatch.setattr(grammars._Vocabulary, "compile", never)
    Grammar.json_schema(dict(schema), tokenizer).matcher()
    Grammar.json_schema(json.dumps(schema), tokenizer).matcher()


def test_grammars_are_named_by_what_they_say():
    one, equal, other = (Grammar.regex(p, bpe()) for p in ("a+", "a+", "a*b"))
    assert repr(one) == repr(equal) != repr(other)


def test_only_so_many_compiled_grammars_are_kept():
    tokenizer = bpe()
    made = [Grammar.choices([f"choice {n}"], tokenizer) for n in range(50)]
    assert len(grammars._vocabulary_of(tokenizer)._compiled) <= 16
    for grammar in made[:3]:  # those that were dropped work on
        assert allowed(grammar.matcher(), 400)


def test_a_tokenizer_and_its_grammars_are_forgotten_together():
    tokenizer = bpe()
    watched = weakref.ref(tokenizer)
    Grammar.choices(["a"], tokenizer).matcher()
    del tokenizer
    gc.collect()
    assert watched() is None


def test_threads_share_a_grammar():
    tokenizer = bpe()
    grammar = Grammar.json_schema({"type": "array", "items": {"type": "string"}}, tokenizer)
    failures = []

    def write(seed: int) -> None:
        try:
            rng = random.Random(seed)
            matcher, text = grammar.matcher(), b""
            for _ in range(60):
                if matcher.finished:
                    break
                token = rng.choice(sorted(allowed(matcher, tokenizer.vocab_size)))
                matcher.advance(token)
                if token == tokenizer.eos_token_id:
                    break
                text += tokenizer.token_bytes()[token]
            if matcher.finished:
                json.loads(text)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GenerationError, match=r'pip install "gpt2fast\[serve\]"'):
        Grammar.choices(["a"], bpe())
