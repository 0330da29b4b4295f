"""Constrained output: continuations that fit a JSON schema, a regular expression or a grammar.

A `Grammar` belongs to a tokenizer; a `Matcher` follows one continuation and says, before each
token, which ones may come: a mask of bits that `ops.sample` reads. `llguidance` (extra `serve`)
parses the text so far. A token is allowed if, and only if, its bytes can go on to some text of the
grammar; a token may end within a character, and the next one completes it.

The end of a text is no part of a grammar. Where the text so far is complete, the end tokens of the
request are allowed beside whatever may still follow; nowhere else. Where nothing may follow, the
text ends by itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._system.parsing import Unreadable, parse_json
from ..errors import GenerationError, shown
from ..tokenizer import Tokenizer

LARGEST = 1 << 17
"""Most bytes of a grammar's text."""
_LIMITS = {
    # Of the automaton that reads tokens; llguidance's own limits of time for a step, 14 ms of
    # lexing and 3 ms of parsing, stand.
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
_KEPT = 16
"""Compiled grammars that a tokenizer keeps for the next request of the same text."""
# Without this, llguidance allows of a text that is certain only the tokens that encoding it gives.
_ALL_TOKENS = '\n%llguidance {"no_forcing": true}\n'
# With any white space, small models go on with it for long, or for good.
_ONE_SPACE = " ?"
_SPACING = {"whitespace_pattern", "whitespace_flexible"}
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
# Ends of what an error of llguidance says: its listing of the source, or a dump of its state.
_LISTING = re.compile(r"\n *1 \| |\n<non-verbose/>|\n<state>")
_PLACE = re.compile(r"(at )?\d+\(\d+\): (failed to compile JSON schema: )?")


_Result = TypeVar("_Result")


class Grammar:
    """What continuations must be, compiled for a tokenizer. It does not change.

    `json_schema`, `regex`, `lark` and `choices` make one. Making an equal one again for the same
    tokenizer takes no time.

    Args:
        kind: what it is, for messages.
        text: in llguidance's dialect of Lark.
        tokenizer: one of gpt2fast, transformers or tokenizers, whose tokens stand for bytes.

    Raises:
        GenerationError: the text is no such grammar or too large, nothing but the empty text fits
            it, or `llguidance` is missing.
        TokenizerError: the tokens' texts depend on their neighbors.
    """

    def __init__(self, kind: str, text: str, tokenizer: Any):
        self.tokenizer = Tokenizer.of(tokenizer)
        """The tokenizer that it is compiled for."""
        self._kind, self._text = kind, text
        self._vocabulary = _vocabulary_of(self.tokenizer)
        self._vocabulary.compiled(kind, text)

    def __repr__(self) -> str:
        # Equal for equal grammars: a job that goes on later looks whether it has the same one.
        digest = hashlib.sha256(self._text.encode()).hexdigest()
        return f"<Grammar: {self._kind} {digest[:16]}>"

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str, tokenizer: Any) -> Grammar:
        """JSON that a JSON Schema accepts; names of an object come in the schema's order.

        Between its parts there may be one space. Another rule is
        `"x-guidance": {"whitespace_pattern": regex}` in the schema, or none with
        `"whitespace_flexible": false` there.

        Args:
            schema: as a mapping, or its JSON text. `{"type": "object"}` is any object. Keywords
                that the parser cannot follow (`not`, `uniqueItems`, …) are refused by name.
            tokenizer: one of gpt2fast, transformers or tokenizers.
        """
        text = schema if isinstance(schema, str) else _dumped(schema)
        _check_size("the JSON schema", text)
        try:
            value = parse_json(text)
        except Unreadable as reason:
            raise GenerationError(f"the JSON schema cannot be read: {reason}") from None
        if not isinstance(value, (dict, bool)):
            raise GenerationError(
                f"the JSON schema is {text!r:.80}; it must be an object, or true for any JSON"
            )
        if value is not False:
            value = {} if value is True else value
            options = value.setdefault("x-guidance", {})
            if isinstance(options, dict) and not _SPACING & options.keys():
                options["whitespace_pattern"] = _ONE_SPACE
        return cls("JSON schema", f"start: %json {json.dumps(value)}", tokenizer)

    @classmethod
    def regex(cls, pattern: str, tokenizer: Any) -> Grammar:
        """Texts that a regular expression matches as a whole.

        Args:
            pattern: in the syntax of Rust's `regex`: Unicode, without look-around and references
                to groups, which it refuses.
            tokenizer: as for `json_schema`.
        """
        _check_size("the regular expression", pattern)
        grammar = json.loads(_library().LLMatcher.grammar_from_regex(pattern))
        (part,) = grammar["grammars"]
        return cls("regular expression", part["lark_grammar"], tokenizer)

    @classmethod
    def lark(cls, grammar: str, tokenizer: Any) -> Grammar:
        """Texts of a context-free grammar.

        Args:
            grammar: in llguidance's dialect of Lark, which begins at the rule `start`; or in
                llama.cpp's GBNF, whose rules are written with `::=` and begin at `root`.
            tokenizer: as for `json_schema`.
        """
        _check_size("the grammar", grammar)
        if _GBNF.search(grammar):
            from llguidance.gbnf_to_lark import gbnf_to_lark

            try:
                grammar = gbnf_to_lark(grammar)
            except RecursionError:
                raise GenerationError("the grammar in GBNF is nested too deeply") from None
            except Exception as error:  # plain ones among them
                raise GenerationError(f"the grammar is not valid GBNF: {error!s:.300}") from None
        return cls("grammar", grammar, tokenizer)

    @classmethod
    def choices(cls, texts: Sequence[str], tokenizer: Any) -> Grammar:
        """One of some texts.

        Args:
            texts: of at least one character each.
            tokenizer: as for `json_schema`.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise GenerationError(f"choices is {texts!r:.80}; it must be a list of texts")
        for text in texts:
            if not isinstance(text, str) or not text:
                raise GenerationError(
                    f"choices has the item {text!r:.80}; each must be a text of at least one "
                    "character"
                )
        quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        _check_size("choices, all together,", quoted)
        return cls("list of choices", f"start: {quoted}", tokenizer)

    def matcher(self, ends: Sequence[int] | None = None) -> Matcher:
        """A new `Matcher`, before the first token of a continuation.

        Args:
            ends: ids that end a text, allowed where it is complete; by default the tokenizer's
                end-of-text token, if it has one.
        """
        if ends is None:
            ends = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        return Matcher(self, ends)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer whose tokens are others.

        Raises:
            GenerationError: they are.
        """
        if tokenizer is self.tokenizer or tokenizer.token_bytes() == self.tokenizer.token_bytes():
            return
        raise GenerationError(
            "the grammar was compiled for another tokenizer: make it with this generator's "
            "(generator.tokenizer)"
        )

    def _start(self) -> Any:
        """llguidance's matcher before the first token, which shares an automaton with others."""
        return self._vocabulary.compiled(self._kind, self._text).deep_copy()

    def _start_alone(self) -> Any:
        """The same with an automaton of its own, where the shared one is full."""
        self._vocabulary.forget(self._kind, self._text)
        return self._vocabulary.compile(self._kind, self._text)


class Matcher:
    """The state of one continuation in its grammar; for one thread at a time.

    Args:
        grammar: what the continuation must be.
        ends: ids that end it where it is complete.
    """

    def __init__(self, grammar: Grammar, ends: Sequence[int]):
        self._grammar, self._vocabulary = grammar, grammar._vocabulary
        self._ends = list(ends)
        self._tokens: list[int] = []
        self._ended = False
        self._matcher = grammar._start()
        self._words: Tensor | None = None
        """The mask of the next token without the end tokens, if it is computed."""
        self._complete = False
        """True if the text may end here; valid with `_words`."""

    def mask(self, out: Tensor) -> None:
        """Write which tokens may come next.

        Args:
            out: (W,) int32 on the CPU, contiguous: bit i % 32 of word i // 32 is set if token i is
                allowed. W may be less or more than the tokenizer has ids for; ids that it lacks,
                such as rows that pad a model's vocabulary, are not allowed.

        Raises:
            GenerationError: the text has ended, no token can follow, or a step takes more time or
                memory than a grammar may.
        """
        if self._ended:
            raise GenerationError("the text has ended: no token can follow its end token")
        words = self._next()
        count = min(len(out), len(words))
        out[:count] = words[:count]
        out[count:] = 0
        for token in self._ends:
            word, bit = divmod(token, 32)
            if word >= len(out):
                continue
            # An end token is allowed at an end, and only there.
            kept = int(out[word]) & ~(1 << bit)
            out[word] = _signed(kept | self._complete << bit)
        if not bool(out.any()):
            what = "is complete, and there is no end token to end it" if self._complete else (
                "cannot go on: none of the tokenizer's tokens continues it"
            )  # fmt: skip
            raise GenerationError(f"the text so far, {self._so_far()}, {what}")

    def advance(self, token: int) -> None:
        """Add a token to the text.

        Raises:
            GenerationError: it is not allowed here; nothing has changed then.
        """
        if self._ended or not self.accepts([token]):
            raise GenerationError(
                f"token {token} does not fit the {self._grammar._kind} after {self._so_far()}: "
                "what else bans or favors tokens (no_repeat_ngram_size, bad words, processors) "
                "leaves none that fits"
            )
        self._tokens.append(token)
        if token in self._ends:
            self._ended = True
            return
        self._words = None
        self._guarded(lambda matcher: matcher.try_consume_tokens([token]))

    def rollback(self, count: int) -> None:
        """Take the newest `count` tokens back.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= count <= len(self._tokens):
            raise ValueError(f"{count} of {len(self._tokens)} tokens cannot be taken back")
        if count == 0:
            return
        consumed = count - self._ended
        del self._tokens[-count:]
        self._ended = False
        if consumed:
            self._words = None
            if not self._matcher.rollback(consumed):
                self._replay(self._grammar._start())

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may be added one after the other."""
        if self._ended:
            return 0
        fitting: list[int] = []
        for token in tokens:
            if token in self._ends:
                fitting.append(self._vocabulary.end)
                break
            if not 0 <= token < self._vocabulary.end:
                break
            fitting.append(token)
        if not fitting:
            return 0
        if fitting[0] == self._vocabulary.end:  # of a complete text llguidance takes no more tokens
            return int(self._matcher.is_accepting())
        return self._guarded(lambda matcher: matcher.validate_tokens(fitting))

    @property
    def finished(self) -> bool:
        """True if the text is complete and nothing but its end can follow."""
        if self._ended:
            return True
        words = self._next()
        return self._complete and not bool(words.any())

    def _next(self) -> Tensor:
        """The mask of the next token, without the end tokens."""
        if self._words is not None:
            return self._words
        end = self._vocabulary.end
        words = torch.empty(end // 32 + 1, dtype=torch.int32, device="cpu")

        def compute(matcher: Any) -> bool:
            complete = matcher.is_accepting()
            matcher.unsafe_compute_mask_ptr(words.data_ptr(), 4 * len(words))
            return complete

        self._complete = self._guarded(compute)
        words[end // 32] = _signed(int(words[end // 32]) & ~(1 << end % 32))
        self._words = words
        return words

    def _guarded(self, step: Callable[[Any], _Result]) -> _Result:
        """A step of llguidance's matcher; from a new start, once, where it hits a limit."""
        found = step(self._matcher)
        if _over_limit(self._matcher):
            # Matchers of a grammar share an automaton, which others may have filled.
            self._replay(self._grammar._start_alone())
            found = step(self._matcher)
        if _over_limit(self._matcher):
            raise GenerationError(
                f"the {self._grammar._kind} takes too much time or memory after "
                f"{self._so_far()} ({_reason(self._matcher.get_error())}): make it simpler"
            )
        return found

    def _replay(self, matcher: Any) -> None:
        self._matcher = matcher
        matcher.try_consume_tokens(self._tokens)

    def _so_far(self) -> str:
        if not self._tokens:
            return "the empty text"
        return shown(self._grammar.tokenizer.decode(self._tokens)[-60:])


class _Vocabulary:
    """A tokenizer as llguidance takes it, and the grammars that were compiled for it."""

    def __init__(self, tokenizer: Tokenizer):
        library = _library()
        tokens = tokenizer.token_bytes()
        self.end = max(tokens) + 1
        """The id, beyond all of the tokenizer's, that stands for any end token."""
        special = {token.id for token in tokenizer.added_tokens if token.special}
        for id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            special |= set() if id is None else {id}
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._tokenizer = library.LLTokenizer(
            library.TokenizerWrapper(
                _Tokens(
                    [tokens.get(id, b"") for id in range(self.end)] + [b"<end>"],
                    [*sorted(special), self.end],
                )
            )
        )

    def compiled(self, kind: str, text: str) -> Any:
        """llguidance's matcher of a grammar before the first token, to be copied."""
        with self._lock:
            found = self._compiled.get((kind, text))
            if found is not None:
                self._compiled.move_to_end((kind, text))
                return found
        found = self.compile(kind, text)
        with self._lock:
            self._compiled[kind, text] = found
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return found

    def compile(self, kind: str, text: str) -> Any:
        """The same, compiled anew.

        Raises:
            GenerationError: the grammar is wrong or too large, or nothing fits it.
        """
        library = _library()
        found = library.LLMatcher(
            self._tokenizer,
            text + _ALL_TOKENS,
            log_level=0,
            limits=library.LLParserLimits(**_LIMITS),
        )
        if found.is_error():
            raise GenerationError(f"the {kind} is refused: {_reason(found.get_error())}")
        probe = found.deep_copy()
        complete = probe.is_accepting()
        allowed = int.from_bytes(probe.compute_bitmask(), "little") & ~(1 << self.end)
        if _over_limit(probe):
            raise GenerationError(f"the {kind} is too large: {_reason(probe.get_error())}")
        if not allowed:
            what = "only the empty text" if complete else "no text of the tokenizer's tokens"
            raise GenerationError(f"the {kind} is of no use: {what} fits it")
        return found

    def forget(self, kind: str, text: str) -> None:
        """Compile a grammar anew when it is asked for next."""
        with self._lock:
            self._compiled.pop((kind, text), None)


class _Tokens:
    """What llguidance reads of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int]):
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id = len(tokens) - 1

    def __call__(self, text: Any) -> list[int]:
        """Unused: it would choose tokens for text that is certain, and all are allowed here."""
        return []


_vocabularies: WeakKeyDictionary[Tokenizer, _Vocabulary] = WeakKeyDictionary()
_lock = threading.Lock()


def _vocabulary_of(tokenizer: Tokenizer) -> _Vocabulary:
    with _lock:
        found = _vocabularies.get(tokenizer)
        if found is None:
            found = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
        return found


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise GenerationError(
            "constrained output needs llguidance, which is not installed: "
            'pip install "gpt2fast[serve]"'
        ) from None
    return llguidance


def _dumped(schema: object) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
        raise GenerationError("the JSON schema is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise GenerationError(f"the JSON schema is no JSON: {error}") from None


def _check_size(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise GenerationError(f"{name} is {text!r:.80}; it must be a text (str)")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at position "
            f"{error.start}, which is no character: remove or replace it"
        ) from None
    if size > LARGEST:
        raise GenerationError(
            f"{name} has {size} bytes, and a grammar at most {LARGEST}: make it shorter"
        )


def _over_limit(matcher: Any) -> bool:
    """True if a matcher of llguidance gave up; that no token can follow is no limit."""
    return matcher.is_error() and not matcher.get_error().startswith("NoExtension")


def _reason(error: str) -> str:
    """What an error of llguidance says, in one line."""
    text = _PLACE.sub("", _LISTING.split(error, maxsplit=1)[0], count=1)
    text = text.rpartition("\nerror: ")[2]  # a regex comes before it, as long as it may be
    return " ".join(text.split())[:300]


def _signed(word: int) -> int:
    """The int32 with these 32 bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word
