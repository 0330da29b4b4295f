"""What is asked of a generator: options and texts, checked before anything is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import GenerationError, TokenizerError
from ..model import GPT2
from ..sampling import DEFAULTS, SamplingOptions
from ..tokenizer import Tokenizer
from .callables import Callables
from .continuation import Request
from .contrastive import check_contrastive
from .generation import FROM_CONFIG, EosTokenId, beginning, check_vocabulary, end_tokens
from .grammar import Grammar
from .processors import check_ids
from .stopping import StopCriteria
from .window import Window

_MOST_PADDING = 127
"""Most rows that pad a vocabulary: it is rounded up to a multiple of 128 at most."""


def make_request(
    model: GPT2,
    tokenizer: Tokenizer,
    eos_token_id: EosTokenId = FROM_CONFIG,
    stop: Any = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    bad_words: str | Sequence[str] | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    grammar: Any = None,
    **options: Any,
) -> Request:
    """The request of a call of a `Generator`, with the arguments and errors of that call."""
    if "num_beams" in options and options["num_beams"] != 1:
        options = {"do_sample": False, **options}
    if options.get("penalty_alpha") and "top_k" not in options:
        options = {"top_k": None, **options}  # not the many that sampling may draw from
    chosen = DEFAULTS.of_call(model.generation_config, options)
    if bad_words is not None:
        words = [*(chosen.bad_words_ids or []), *encode_words(tokenizer, bad_words)]
        chosen = chosen.changed({"bad_words_ids": words})
    check_ids(chosen, model.config.vocab_size)
    check_contrastive(model, chosen, use_cache=True)
    ends = end_tokens(model, eos_token_id)
    own_end = tokenizer.eos_token_id
    if eos_token_id is FROM_CONFIG and own_end is not None and own_end not in ends:
        ends += [own_end] if own_end < model.config.vocab_size else []
    alternatives = _alternatives(model, logprobs, top_logprobs)
    criteria = StopCriteria(ends, stop, tokenizer)
    callables = Callables(logits_processor, stopping_criteria)
    _check_grammar(grammar, tokenizer, chosen)
    return Request(chosen, criteria, alternatives, callables, grammar)


def _check_grammar(grammar: Any, tokenizer: Tokenizer, options: SamplingOptions) -> None:
    if grammar is None:
        return
    if not isinstance(grammar, Grammar):
        raise GenerationError(
            f"grammar is {grammar!r:.80}; it must be a Grammar, as "
            "Grammar.json_schema(schema, generator.tokenizer) makes one"
        )
    if options.num_beams > 1:
        raise GenerationError(
            f"num_beams is {options.num_beams}, and a grammar is followed token by token: set "
            "num_beams=1, or leave the grammar out"
        )
    if options.contrastive:
        raise GenerationError(
            f"penalty_alpha is {options.penalty_alpha}, and contrastive search follows no grammar: "
            "leave one of them out"
        )
    grammar.check_tokenizer(tokenizer)


def encode_words(tokenizer: Tokenizer, words: str | Sequence[str]) -> list[list[int]]:
    """The tokens of words, each as it is and after a space, as words within a text are spelled.

    Raises:
        GenerationError: not a list of texts that are not empty.
        TokenizerError: a text that cannot be encoded.
    """
    if not isinstance(words, Iterable):
        raise GenerationError(f"bad_words is {words!r:.80}; it must be a text, or a list of texts")
    found: list[list[int]] = []
    for word in [words] if isinstance(words, str) else words:
        if not isinstance(word, str) or not word:
            raise GenerationError(
                f"bad_words has the item {word!r:.80}; each must be a text of at least one "
                "character (bad_words_ids takes tokens)"
            )
        found.append(tokenizer.encode(word, add_special_tokens=False))
        with contextlib.suppress(TokenizerError):  # an alphabet without a space
            found.append(tokenizer.encode(" " + word, add_special_tokens=False))
    return found


def _alternatives(model: GPT2, logprobs: bool, top_logprobs: int) -> int | None:
    """Number of likely alternatives to return with each token; None: nothing is scored."""
    if type(logprobs) is not bool:
        raise GenerationError(
            f"logprobs is {logprobs!r:.80}; it must be True or False (top_logprobs says how "
            "many of the likeliest tokens to name)"
        )
    most = model.config.vocab_size
    if type(top_logprobs) is not int or not 0 <= top_logprobs <= most:
        raise GenerationError(
            f"top_logprobs is {top_logprobs!r:.80}; it must be a whole number from 0 to the "
            f"model's vocab_size, {most}"
        )
    if top_logprobs and not logprobs:
        raise GenerationError(
            f"top_logprobs is {top_logprobs}, and logprobs is off: pass logprobs=True too"
        )
    return top_logprobs if logprobs else None


def encode_prompt(
    model: GPT2, tokenizer: Tokenizer, window: Window, text: str, request: Request, name: str
) -> list[int]:
    """The prompt's tokens, checked for what the model can take.

    Args:
        model, tokenizer: a pair.
        window: treatment of long texts.
        text: the prompt.
        request: what is asked for.
        name: the prompt's name in errors.
    """
    if not isinstance(text, str):
        raise GenerationError(f"{name} is {text!r:.80}; it must be a text (str)")
    tokens = tokenizer.encode(text)
    if not tokens:
        # As in transformers: a text without a token to begin with follows the end token.
        first = beginning(model)
        first = tokenizer.start_token_id if first is None else first
        if first is None:
            raise GenerationError(
                f"{name} is empty, and neither is there a bos_token_id in the model's "
                "configuration nor an end-of-text token in the tokenizer to begin with: give "
                "at least one character"
            )
        tokens = [first]
    check_vocabulary(model, tokens, name, tokenizer)
    room = model.config.n_positions
    if request.scores_prompt:
        if len(tokens) > room:
            raise GenerationError(
                f"{name} has {len(tokens)} tokens, and the model scores no more than its "
                f"n_positions={room} at a time: shorten it; python -m gpt2fast.evaluate --task "
                "perplexity scores longer texts, window by window"
            )
    else:
        window.check(model, len(tokens), request.options, name)
    return tokens


def encode_texts(model: GPT2, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts to read.

    Raises:
        GenerationError: not a list of texts, or tokens that the model does not have.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise GenerationError(f"texts is {texts!r:.80}; it must be a list of texts")
    found = []
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise GenerationError(f"text {number} is {text!r:.80}; it must be a text (str)")
        found.append(tokenizer.encode(text))
        check_vocabulary(model, found[-1], f"text {number}", tokenizer)
    return found


def check_pair(model: GPT2, tokenizer: Tokenizer, notify: Callable[[str], None]) -> None:
    """Refuse a tokenizer with more tokens than the model, and notify of one with far fewer."""
    rows = model.config.vocab_size
    added = {token.id for token in tokenizer.added_tokens}
    # Added tokens often have no row in the model; a prompt that holds one is refused then.
    newest_first = range(tokenizer.vocab_size - 1, -1, -1)
    largest = next((id for id in newest_first if id not in added), -1)
    if largest >= rows:
        raise GenerationError(
            f"the tokenizer has ids up to {largest}, and the model's vocabulary ends at "
            f"{rows - 1}: load the tokenizer that belongs to the model"
        )
    if rows - tokenizer.vocab_size > _MOST_PADDING:
        notify(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the model's vocabulary "
            f"{rows}: if the text makes no sense, load the tokenizer that belongs to the model"
        )
