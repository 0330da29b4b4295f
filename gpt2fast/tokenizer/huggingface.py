"""Every tokenizer that Hugging Face's `tokenizers` runs, run by it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .added_tokens import AddedToken, flags_of
from .base import (
    StreamDecoder,
    Tokenizer,
    check_text,
    digest,
    end_and_beginning,
    no_bytes_of_its_own,
)
from .checks import MOST_IDS
from .merges import token_bytes
from .saving import save_library
from .steps import is_byte_level_decoder

# Characters at the end of a text that the library's decoders and the clean-up may still change.
_UNSURE = 16

_CLEAN_UP = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
"""transformers' `clean_up_tokenization_spaces`, which is for words and not for BPE."""


class GenericStreamDecoder(StreamDecoder):
    """Decodes all that has come so far, for tokenizers whose tokens are not bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def push(self, id: int) -> str:
        """The text that is certain now; may be empty."""
        self._ids.append(id)
        certain = self._tokenizer.decode(self._ids)[:-_UNSURE].rstrip("\ufffd")
        piece = certain[self._given :]
        self._given += len(piece)
        return piece

    def flush(self) -> str:
        """The rest of the text; the decoder can be used again."""
        rest = self._tokenizer.decode(self._ids)[self._given :] if self._ids else ""
        self._ids, self._given = [], 0
        return rest


class LibraryTokenizer(Tokenizer):
    """A tokenizer that `tokenizers` runs: what GPT-2's own BPE does not do.

    Normalizers, other pre-tokenizers than GPT-2's, vocabularies without all the bytes, unigram and
    word models, and whatever else a tokenizer.json can say.

    Args:
        tokenizer_json: the content of a tokenizer.json; its padding and truncation don't count.
        special_tokens: which token plays which part, by transformers' names; tokens that the
            vocabulary lacks must be among `more_tokens`.
        more_tokens: special tokens beside those of `tokenizer_json`.
        clean_up_spaces: leave out the spaces before punctuation in decoded text, as transformers
            does where a tokenizer of words says so.
        source: where this comes from, for error messages.

    Raises:
        TokenizerError: the library does not take it.
    """

    def __init__(
        self,
        tokenizer_json: Mapping[str, Any],
        special_tokens: Mapping[str, str | None] | None = None,
        *,
        more_tokens: Sequence[AddedToken] = (),
        clean_up_spaces: bool = False,
        source: str = "LibraryTokenizer",
    ) -> None:
        content = {**tokenizer_json, "padding": None, "truncation": None}
        backend = _backend(content, source)
        with _failures(f"{source}: the library does not take it"):
            backend.add_special_tokens([_library_token(token) for token in more_tokens])
            vocab = backend.get_vocab(with_added_tokens=True)
        if not vocab or max(vocab.values()) >= MOST_IDS:
            raise TokenizerError(
                f"{source}: the vocabulary has {len(vocab)} tokens with ids up to "
                f"{max(vocab.values(), default=-1)}; at least one, and ids below {MOST_IDS}, are "
                "needed"
            )
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._clean_up = clean_up_spaces and content["model"].get("type", "BPE") != "BPE"
        self._is_bytes = is_byte_level_decoder(content) and not self._clean_up
        end, begin = end_and_beginning(self._special_tokens, vocab, source)
        super().__init__(
            tokens={id: token_bytes(token) for token, id in vocab.items()},
            added_tokens=[
                AddedToken(token.content, id, **flags_of(token))
                for id, token in backend.get_added_tokens_decoder().items()
            ],
            eos_token_id=end,
            bos_token_id=begin,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Same as `Tokenizer.encode`.

        Raises:
            TokenizerError: also where the vocabulary has no token for a part of the text, and none
                for what is unknown.
        """
        check_text(text)
        with _failures("the text cannot be encoded"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Same as `Tokenizer.decode`, with the spaces that the tokenizer's own decoder puts."""
        if self._is_bytes:
            return super().decode(ids)
        ids = self._known(ids)
        with _failures("the tokens cannot be decoded"):
            text = self._backend.decode(ids, skip_special_tokens=False)
        if self._clean_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text

    def decoder(self) -> StreamDecoder:
        """A decoder for tokens that come one at a time."""
        return super().decoder() if self._is_bytes else GenericStreamDecoder(self)

    def token_bytes(self) -> Mapping[int, bytes]:
        """Same as `Tokenizer.token_bytes`."""
        if self._is_bytes:
            return super().token_bytes()
        raise no_bytes_of_its_own(self)

    @property
    def cuts_at_spaces(self) -> bool:
        """False: normalizers and pre-tokenizers may look at all of a text."""
        return False

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        described = {**self._special_tokens, "clean_up_tokenization_spaces": self._clean_up}
        save_library(Path(directory), json.loads(self._backend.to_str()), described)

    def _fingerprint_below(self, size: int) -> str:
        content = json.loads(self._backend.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < size]
        return digest(["library", content, self._clean_up], sort_keys=True)

    def _id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _with(self, tokens: Sequence[AddedToken]) -> LibraryTokenizer:
        content = json.loads(self._backend.to_str())
        grown = LibraryTokenizer(
            content,
            self._special_tokens,
            more_tokens=tokens,
            clean_up_spaces=self._clean_up,
        )
        if reason := grown.difference(self):
            raise TokenizerError(f"this tokenizer takes no more tokens: with them, {reason}")
        return grown

    def _encode_ordinary(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)


def check_steps(content: Mapping[str, Any], source: str) -> None:
    """Raise TokenizerError unless the library reads what a tokenizer.json says of its steps."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    _backend({"model": empty, **{name: content.get(name) for name in steps}}, source)


def _backend(content: Mapping[str, Any], source: str) -> Any:
    import tokenizers

    with _failures(
        f"{source}: neither GPT-2's byte-level BPE nor a tokenizer that Hugging Face's "
        f"tokenizers {tokenizers.__version__} reads"
    ):
        return tokenizers.Tokenizer.from_str(json.dumps(content))


@contextmanager
def _failures(told: str) -> Iterator[None]:
    """Turn errors of the library, its panics included (no Exceptions), into a TokenizerError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{told}: {error!s:.200}") from None


def _library_token(token: AddedToken) -> Any:
    from tokenizers import AddedToken as LibraryToken

    return LibraryToken(token.content, **flags_of(token))
