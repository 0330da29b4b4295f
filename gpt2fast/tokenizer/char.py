"""A token per character, for small models of one book or one author."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from ..errors import TokenizerError, shown
from .added_tokens import END_OF_TEXT, AddedToken
from .base import Tokenizer, digest
from .checks import check_vocab
from .saving import save_char
from .streams import ordinary_text


class CharTokenizer(Tokenizer):
    """One id for each character.

    Args:
        vocab: character to id; `<|endoftext|>` may be there too, as a token of its own.
    """

    def __init__(self, vocab: dict[str, int]) -> None:
        self._vocab = vocab
        end = vocab.get(END_OF_TEXT)
        super().__init__(
            tokens={id: token.encode("utf-8") for token, id in vocab.items()},
            added_tokens=() if end is None else (AddedToken(END_OF_TEXT, id=end),),
            eos_token_id=end,
        )

    @classmethod
    def train(cls, texts: Iterable[str]) -> CharTokenizer:
        """The characters of the texts, sorted; the texts are one stream, cut anywhere.

        `<|endoftext|>` is one token, the last, and is there only if it occurs.

        Raises:
            TokenizerError: there is no character in the texts.
        """
        found_end = False
        characters: set[str] = set()

        def watched() -> Iterable[str]:
            nonlocal found_end
            before = ""
            for text in texts:
                found_end = found_end or END_OF_TEXT in before + text
                before = (before + text)[1 - len(END_OF_TEXT) :]
                yield text

        for text in ordinary_text(watched()):
            characters.update(text)
        if not characters:
            raise TokenizerError(
                "a character vocabulary needs text, but there is no character in it"
            )
        vocab = {character: id for id, character in enumerate(sorted(characters))}
        if found_end:
            vocab[END_OF_TEXT] = len(vocab)
        return cls(vocab)

    @classmethod
    def of_characters(cls, vocab: dict[str, int], source: str) -> CharTokenizer:
        """The tokenizer of a vocabulary out of a file, checked.

        Args:
            vocab: character to id.
            source: the file, for messages.

        Raises:
            TokenizerError: a token is no character, or the ids are not 0, 1, 2, …
        """
        check_vocab(vocab, source)
        for token in vocab:
            if len(token) != 1 and token != END_OF_TEXT:
                raise TokenizerError(
                    f"{source}: the token {token!r:.80} is not a single character; a character "
                    f"vocabulary has only those and {END_OF_TEXT}, and a BPE vocabulary needs its "
                    "merges.txt beside it"
                )
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise TokenizerError(
                f"{source}: the ids of {len(vocab)} characters must be 0 to {len(vocab) - 1}, each "
                "once"
            )
        return cls(vocab)

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write vocab.json (character to id), tokenizer.json and tokenizer_config.json."""
        save_char(Path(directory), self._vocab)

    def _fingerprint_below(self, size: int) -> str:
        below = [item for item in self._vocab.items() if item[1] < size]
        content = ["char", sorted(below, key=lambda item: item[1])]
        return digest(content)

    def _id_of(self, token: str) -> int | None:
        return self._vocab.get(token)

    def _with(self, tokens: Sequence[AddedToken]) -> CharTokenizer:
        for token in tokens:
            if len(token.content) != 1 and token.content != END_OF_TEXT:
                raise TokenizerError(
                    f"{shown(token.content)} is not a single character, and a character tokenizer "
                    f"has only those and {END_OF_TEXT}: use a bpe tokenizer for other tokens"
                )
        return CharTokenizer(self._vocab | {token.content: token.id for token in tokens})

    def _encode_ordinary(self, text: str) -> list[int]:
        vocab = self._vocab
        try:
            return [vocab[character] for character in text]
        except KeyError as error:
            character = error.args[0]
        raise TokenizerError(
            f"the character {character!r} (U+{ord(character):04X}, position "
            f"{text.index(character)}) is not among the {len(vocab)} of this tokenizer; remove it, "
            "or prepare data whose text has it"
        )
