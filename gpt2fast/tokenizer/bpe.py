"""GPT-2's byte-level BPE (Radford et al., 2019; Sennrich et al., 2016), running on tiktoken."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

from ..errors import TokenizerError, shown
from .added_tokens import END_OF_TEXT, WHITESPACE, AddedToken
from .base import Tokenizer
from .merges import BYTE_TO_CHAR, merge_ranks, token_bytes
from .streams import ordinary_text, short_words

# GPT-2's pattern in the form that does not backtrack, which matches the same (OpenAI's r50k_base).
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Longer runs of white space than this don't go through the pattern: it backtracks over them on a
# stack that overflows near a million.
_LONG_RUN = 8192
_SPACES = re.compile(f"[{WHITESPACE}]*")


class BPETokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's pre-tokenization.

    Args:
        vocab: token to id, in the spelling of GPT-2's files (`Ġ` for a space).
        merges: pairs of tokens, a space between the two, in the order in which they are joined.
        added_tokens: tokens that are matched whole in the text, `<|endoftext|>` for one.
        special_tokens: which token plays which part, by transformers' names; `eos_token` is the one
            that ends a document.
        add_prefix_space: put a space before a text that doesn't begin with one.
        around: ids that `encode` puts before and after a text.
        source: where this comes from, for error messages.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[str],
        added_tokens: Sequence[AddedToken] = (),
        *,
        special_tokens: Mapping[str, str | None] | None = None,
        add_prefix_space: bool = False,
        around: tuple[Sequence[int], Sequence[int]] = ((), ()),
        source: str = "BPETokenizer",
    ) -> None:
        import tiktoken

        ids = merge_ranks(vocab, merges, source)
        merged_ids = list(ids.values())[256:]
        if all(a < b for a, b in itertools.pairwise(merged_ids)):
            ranks, self._rank_to_id = ids, None  # the usual case: ids are in merge order
        else:
            ranks = {token: rank for rank, token in enumerate(ids)}
            self._rank_to_id = list(ids.values())
        self._encoding = tiktoken.Encoding(
            "gpt2fast", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self._vocab = vocab
        self._merges = merges
        self._add_prefix_space = add_prefix_space
        self._special_tokens = dict(special_tokens or {})
        eos_token = self._special_tokens.get("eos_token")
        by_content = vocab | {token.content: token.id for token in added_tokens}
        if eos_token is not None and eos_token not in by_content:
            raise TokenizerError(f"{source}: eos_token is {shown(eos_token)}, which is no token")
        tokens = {id: token for token, id in ids.items()}
        for token, id in by_content.items():
            if id not in tokens:
                tokens[id] = token_bytes(token)
        super().__init__(
            tokens=tokens,
            added_tokens=added_tokens,
            eos_token_id=None if eos_token is None else by_content[eos_token],
            around=around,
            bos_token_id=by_content.get(self._special_tokens.get("bos_token") or ""),
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn a vocabulary from texts (Hugging Face's `tokenizers` trains).

        The texts are one stream: how it is cut into pieces makes no difference. `<|endoftext|>` in
        it separates documents, and is the last id. A small text may not have enough repeated pairs
        for `vocab_size`; the vocabulary is then smaller. Of a word of more than 512 characters (a
        genome, base64, a line of ====) pieces of 512 are looked at; other texts have no such words.

        Raises:
            TokenizerError: vocab_size has no room for the 256 bytes and `<|endoftext|>`.
        """
        from tokenizers import Tokenizer as HFTokenizer
        from tokenizers import models, pre_tokenizers, trainers

        if not isinstance(vocab_size, int) or not 257 <= vocab_size <= 1 << 24:
            raise TokenizerError(
                f"vocab_size={vocab_size!r}: needs an int from 257 (the 256 bytes and "
                f"{END_OF_TEXT}) to {1 << 24}"
            )
        trained = HFTokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(BYTE_TO_CHAR.values()),
        )
        trained.train_from_iterator(short_words(ordinary_text(texts)), trainer)
        model = json.loads(trained.to_str())["model"]
        vocab = model["vocab"]
        end_of_text = AddedToken(END_OF_TEXT, id=len(vocab))
        return cls(
            vocab | {END_OF_TEXT: end_of_text.id},
            [f"{left} {right}" for left, right in model["merges"]],
            [end_of_text],
            special_tokens=dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        )

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write tokenizer.json, vocab.json, merges.txt and tokenizer_config.json."""
        from .saving import save_bpe

        save_bpe(
            Path(directory),
            vocab=self._vocab,
            merges=self._merges,
            added_tokens=self.added_tokens,
            special_tokens=self._special_tokens,
            add_prefix_space=self._add_prefix_space,
            around=self._around,
        )

    def _fingerprint_below(self, size: int) -> str:
        added = [token for token in self.added_tokens if token.id < size]
        left_out = {token.content for token in self.added_tokens[len(added) :]}
        vocab = {token: id for token, id in self._vocab.items() if token not in left_out}
        passes = {token.normalized for token in added}
        content: list[object] = [
            "bpe",
            self._add_prefix_space,
            sorted(
                (vocab | {token.content: token.id for token in added}).items(),
                key=lambda item: item[1],
            ),
            [merge.split(" ") for merge in self._merges],
            [
                # whether it is normalized tells only where both kinds are there
                (t.id, t.single_word, t.lstrip, t.rstrip, len(passes) == 2 and t.normalized)
                for t in added
            ],
        ]
        if any(self._around):
            content.append(self._around)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _id_of(self, token: str) -> int | None:
        return self._vocab.get(token, super()._id_of(token))

    def _with(self, tokens: Sequence[AddedToken]) -> BPETokenizer:
        return BPETokenizer(
            self._vocab,
            self._merges,
            [*self.added_tokens, *tokens],
            special_tokens=self._special_tokens,
            add_prefix_space=self._add_prefix_space,
            around=self._around,
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        if self._add_prefix_space and not text.startswith(" "):
            text = " " + text
        ids: list[int] = []
        done = 0
        for start, end in _long_whitespace(text):
            # The run's last character begins the next piece, unless the text ends there.
            end = end if end == len(text) else end - 1
            ids += self._encoding.encode_ordinary(text[done:start])
            ids += self._encoding.encode_ordinary(text[start:end])
            done = end
        ids += self._encoding.encode_ordinary(text[done:] if done else text)
        if self._rank_to_id is not None:
            table = self._rank_to_id
            ids = [table[rank] for rank in ids]
        return ids


def _long_whitespace(text: str) -> Iterator[tuple[int, int]]:
    """Where runs of white space begin and end; finds all of `_LONG_RUN` characters or more."""
    end = 0
    for at in range(_LONG_RUN - 1, len(text), _LONG_RUN):
        if at >= end and text[at] in WHITESPACE:
            before = text[max(end, at - _LONG_RUN) : at]
            start = at - (len(before) - len(before.rstrip(WHITESPACE)))
            end = _SPACES.match(text, at).end()  # type: ignore[union-attr]  # matches always
            if end - start >= _LONG_RUN:
                yield start, end
