"""The interface of every tokenizer: text to ids, ids to text, streaming."""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from os import PathLike
from typing import Any

from .._system.doors import above
from ..errors import TokenizerError, shown
from .added_tokens import AddedToken, AddedTokenSplitter


class Tokenizer(ABC):
    """Text to token ids and back.

    `BPETokenizer` is GPT-2's byte-level BPE, `CharTokenizer` has a token per character, and
    `LibraryTokenizer` runs every other kind that Hugging Face's `tokenizers` knows.
    `Tokenizer.from_pretrained` finds out which of them a model's files describe.

    Args:
        tokens: the bytes that each id stands for, those of `added_tokens` included.
        added_tokens: tokens that are matched whole in a text.
        eos_token_id: id of the token that ends a document, or None.
        around: ids that `encode` puts before and after a text.
        bos_token_id: id of the token that begins a text, or None.
    """

    eos_token_id: int | None
    """Id of the token that ends a document, or None."""

    bos_token_id: int | None
    """Id of the token that begins a text, or None. `encode` puts it where `around` has it alone."""

    added_tokens: tuple[AddedToken, ...]
    """Tokens that are matched whole in a text, by id."""

    vocab_size: int
    """Number of ids, special tokens included: every id is below it."""

    def __init__(
        self,
        tokens: dict[int, bytes],
        added_tokens: Iterable[AddedToken],
        eos_token_id: int | None,
        around: tuple[Sequence[int], Sequence[int]] = ((), ()),
        bos_token_id: int | None = None,
    ) -> None:
        self._tokens = tokens
        self.vocab_size = max(tokens) + 1
        self.added_tokens = tuple(sorted(added_tokens, key=lambda token: token.id))
        self._splitter = AddedTokenSplitter(self.added_tokens)
        self.eos_token_id, self.bos_token_id = eos_token_id, bos_token_id
        self._around = (list(around[0]), list(around[1]))

    @staticmethod
    def of(tokenizer: Any) -> Tokenizer:
        """`tokenizer` itself, or the same one where it is an object of transformers'.

        Raises:
            TokenizerError: it is neither.
        """
        return above("tokenizer.foreign").tokenizer_of(tokenizer)

    @staticmethod
    def from_pretrained(
        name_or_path: str | PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Tokenizer:
        """The tokenizer of a directory, of a bundled model or of a model on the Hugging Face hub.

        Understands `tokenizer.json`, `vocab.json` with `merges.txt`, OpenAI's `encoder.json` with
        `vocab.bpe`, the `vocab.json` that `CharTokenizer.save_pretrained` writes, llm.c's
        `gpt2_tokenizer.bin`, and nanoGPT's `meta.pkl`, beside a `ckpt.pt` or in the folder of the
        data set that it names.

        Args:
            name_or_path: as for `GPT2.from_pretrained`.
            revision: branch, tag or commit of a model on the hub.
            local_files_only: use huggingface_hub's cache alone.

        Raises:
            TokenizerError: a file is missing or broken, or it describes another kind of tokenizer;
                the message names the file, the field and what would work.
        """
        load = above("checkpoints.tokenizer").load_tokenizer
        return load(name_or_path, revision=revision, local_files_only=local_files_only)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A special token's text, `<|endoftext|>` say, becomes that token.

        Args:
            text: any text.
            add_special_tokens: put the tokens around it that the tokenizer's files ask for, as
                transformers does. GPT-2's ask for none.

        Raises:
            TokenizerError: the text holds a lone surrogate, or a character that a
                `CharTokenizer` does not know.
        """
        check_text(text)
        if add_special_tokens and any(self._around):
            before, after = self._around
            return [*before, *self.encode(text, add_special_tokens=False), *after]
        ids: list[int] = []
        for part in self._splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_ordinary(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Bytes that are not UTF-8 become U+FFFD, as transformers does.

        Raises:
            TokenizerError: no token has one of the ids.
        """
        tokens = self._tokens
        ids = _listed(ids)
        try:
            joined = b"".join([tokens[id] for id in ids])
        except (KeyError, TypeError):
            joined = b"".join([self._token_bytes(id) for id in ids])  # says which id is wrong
        return joined.decode("utf-8", "replace")

    def token_bytes(self) -> Mapping[int, bytes]:
        """The bytes that each id adds to a text, whatever stands around it.

        Raises:
            TokenizerError: a token's text depends on its neighbors, as in tokenizers of words.
        """
        return self._tokens

    @property
    def start_token_id(self) -> int | None:
        """The token for the start of a text: the one that begins texts, or else the one that ends
        documents; None without either."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def __contains__(self, id: int) -> bool:
        """True if a token has this id: a model's vocabulary may be larger, or padded."""
        try:
            return index(id) in self._tokens  # those of tensors, too
        except TypeError:
            return False

    def decoder(self) -> StreamDecoder:
        """A decoder for tokens that come one at a time."""
        return StreamDecoder(self)

    @property
    def cuts_at_spaces(self) -> bool:
        """True if a text that is cut before white space has the same tokens as the whole."""
        return True

    @abstractmethod
    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write the files that `from_pretrained` reads, and `transformers.AutoTokenizer` too."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that determines ids; equal for equal tokenizers."""
        return self._fingerprint_below(self.vocab_size)

    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer with special tokens more, whose ids follow all others.

        Args:
            tokens: their texts, such as `<|user|>`, matched whole wherever they stand in a text.

        Raises:
            TokenizerError: a text that is a token already, is empty or no text; or a tokenizer
                that takes no more.
        """
        for place, token in enumerate(tokens):
            if not isinstance(token, str) or not token:
                raise TokenizerError(f"{shown(token)} is no token: give a text of one character")
            check_text(token)
            if token in tokens[:place]:
                raise TokenizerError(f"the token {shown(token)} is given twice")
            known = self._id_of(token)
            if known is not None:
                raise TokenizerError(
                    f"{shown(token)} is a token of this tokenizer already, with the id {known}: "
                    "leave it out"
                )
        return self._with(
            [AddedToken(token, self.vocab_size + place) for place, token in enumerate(tokens)]
        )

    def difference(self, base: Tokenizer) -> str | None:
        """The reason why this tokenizer is not `base` with more tokens at its end.

        Args:
            base: whose ids are to mean the same here.

        Returns:
            None where nothing does: texts without the new tokens have the ids that `base` gives.
        """
        if self._fingerprint_below(base.vocab_size) == base.fingerprint():
            return None
        if type(self) is not type(base):
            return f"it is a {type(self).__name__}, and not a {type(base).__name__}"
        for id, token in sorted(base._tokens.items()):
            here = self._tokens.get(id)
            if here != token:
                instead = "no token" if here is None else _text(here)
                return f"the id {id} is {instead} in it, and {_text(token)} in the other"
        return "the ids are the same, but merges, special tokens or steps differ"

    @abstractmethod
    def _fingerprint_below(self, size: int) -> str:
        """`fingerprint` without the added tokens whose ids are `size` or more."""

    def _id_of(self, token: str) -> int | None:
        """The id of a token, which is spelled as in the tokenizer's files, or None."""
        return next((added.id for added in self.added_tokens if added.content == token), None)

    def _with(self, tokens: Sequence[AddedToken]) -> Tokenizer:
        """The same tokenizer with these tokens, which it does not have."""
        raise TokenizerError(
            f"a {type(self).__name__} takes no more tokens: add them with its own package, and "
            "load what that saves"
        )

    @abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text (not empty) without added tokens."""

    def _known(self, ids: Iterable[int]) -> list[int]:
        """The ids, if each has a token; TokenizerError says which has none."""
        ids = _listed(ids)
        for id in ids:
            self._token_bytes(id)
        return ids

    def _token_bytes(self, id: int) -> bytes:
        try:
            return self._tokens[index(id)]
        except (KeyError, TypeError):
            raise TokenizerError(
                f"token id {shown(id)}: this tokenizer has {len(self._tokens)} tokens with ids "
                f"from {min(self._tokens)} to {self.vocab_size - 1}; is it the one that belongs to "
                "the model? (Of a padded vocabulary, leave out what is not `in` the tokenizer.)"
            ) from None


class StreamDecoder:
    """Turns tokens into text as they come, and never emits half a character.

    All that `push` and `flush` return, joined, equals `Tokenizer.decode` of all the ids.

    Args:
        tokenizer: whose ids they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer._token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes; may be empty."""
        return self._utf8.decode(self._token_bytes(id))

    def flush(self) -> str:
        """The rest of the text (U+FFFD for half a character); the decoder can be used again."""
        return self._utf8.decode(b"", final=True)


def digest(content: object, *, sort_keys: bool = False) -> str:
    """SHA-256 (hex) of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=sort_keys).encode()).hexdigest()


def end_and_beginning(
    special_tokens: Mapping[str, str | None], ids: Mapping[str, int], source: str
) -> tuple[int | None, int | None]:
    """The ids of the tokens that end and begin a text, of those that play a part."""
    end = special_tokens.get("eos_token")
    if end is not None and end not in ids:
        raise TokenizerError(f"{source}: eos_token is {shown(end)}, which is no token")
    begin = special_tokens.get("bos_token")
    return None if end is None else ids[end], None if begin is None else ids.get(begin)


def no_bytes_of_its_own(tokenizer: Tokenizer) -> TokenizerError:
    """The error of `token_bytes` where there are none."""
    return TokenizerError(
        f"the tokens of this {type(tokenizer).__name__} stand for different texts in different "
        "places, and grammars of output need tokens that stand for bytes, as those of byte-level "
        "BPE (GPT-2's) and of characters do"
    )


def _listed(ids: Any) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)  # tensors and arrays


def _text(token: bytes) -> str:
    return shown(token.decode("utf-8", "replace"))


def check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"encode needs a str, got {type(text).__name__}")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at position "
            f"{error.start}, which is no character (a byte that is not UTF-8 may have been "
            "read as one): remove or replace it"
        ) from None
