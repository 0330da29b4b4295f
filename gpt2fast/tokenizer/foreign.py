"""Tokenizer objects of other packages, transformers' above all, as ours."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from .._system.files import atomic_write
from ..errors import TokenizerError
from .added_tokens import AddedToken
from .base import StreamDecoder, Tokenizer, check_text, digest, no_bytes_of_its_own
from .huggingface import GenericStreamDecoder
from .loading import SPECIAL_NAMES, from_content

_PLAIN_CLASSES = (
    *("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
)
"""transformers' classes that do nothing beside what their backend does."""


def tokenizer_of(tokenizer: Any) -> Tokenizer:
    """Our tokenizer with the ids and texts of another package's object.

    Objects of `tokenizers`, and those of transformers that only pass on to one, are converted;
    others are asked through their own `encode` and `decode`.

    Raises:
        TokenizerError: it is no tokenizer.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    import tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", getattr(tokenizer, "_tokenizer", tokenizer))
    plain = not hasattr(tokenizer, "special_tokens_map") or (
        type(tokenizer).__name__ in _PLAIN_CLASSES
        and type(tokenizer).__module__.startswith("transformers.")
        and not getattr(tokenizer, "split_special_tokens", False)
        and getattr(tokenizer, "errors", "replace") == "replace"
    )
    source = f"the {type(tokenizer).__name__}"
    if isinstance(backend, tokenizers.Tokenizer) and plain:
        config: dict[str, Any] = {}
        for name in SPECIAL_NAMES:
            if hasattr(tokenizer, name):  # those of `tokenizers` know no parts
                token = getattr(tokenizer, name)
                config[name] = None if token is None else str(token)
        config["clean_up_tokenization_spaces"] = getattr(
            tokenizer, "clean_up_tokenization_spaces", False
        )
        return from_content(json.loads(backend.to_str()), config, source)
    needed = ("encode", "decode", "get_vocab")
    if all(callable(getattr(tokenizer, name, None)) for name in needed):
        return ForeignTokenizer(tokenizer)
    raise _no_tokenizer(tokenizer)


def save_tokenizer(tokenizer: Any, directory: str | PathLike[str]) -> None:
    """Write a tokenizer's files, those of its own package where that has such, each atomically."""
    if isinstance(tokenizer, Tokenizer) or not hasattr(tokenizer, "save_pretrained"):
        tokenizer_of(tokenizer).save_pretrained(directory)
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as written:
        tokenizer.save_pretrained(written)
        for path in sorted(Path(written).rglob("*")):
            place = folder / path.relative_to(written)
            if path.is_dir():
                place.mkdir(exist_ok=True)
                continue
            with atomic_write(place) as file:
                file.write(path.read_bytes())


def _no_tokenizer(given: Any) -> TokenizerError:
    return TokenizerError(
        f"{type(given).__name__} is no tokenizer: give one of gpt2fast, transformers or "
        "tokenizers, as Tokenizer.from_pretrained loads it"
    )


class Decoding:
    """`decode` and `in` of any tokenizer, without converting another package's.

    Objects of transformers, tokenizers and tiktoken will do; without `decode`, TokenizerError.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._token_of: Callable[[int], Any] | None = None
        self._options: dict[str, Any] = {}
        if isinstance(tokenizer, Tokenizer):
            return
        if not callable(getattr(tokenizer, "decode", None)) or isinstance(tokenizer, (str, bytes)):
            raise _no_tokenizer(tokenizer)
        for name in ("convert_ids_to_tokens", "id_to_token"):
            if callable(getattr(tokenizer, name, None)):
                self._token_of = getattr(tokenizer, name)
                self._options = {"skip_special_tokens": False}
                return

    def __contains__(self, id: int) -> bool:
        """True if a token has this id, as far as the tokenizer says."""
        if isinstance(self._tokenizer, Tokenizer):
            return id in self._tokenizer
        return self._token_of is None or self._token_of(id) is not None

    def decode(self, ids: list[int]) -> str:
        """Same as `Tokenizer.decode`."""
        return self._tokenizer.decode(ids, **self._options)


class ForeignTokenizer(Tokenizer):
    """A tokenizer of transformers' that is written in Python, or does more than its backend."""

    def __init__(self, tokenizer: Any) -> None:
        self._foreign = tokenizer
        self._vocab = dict(tokenizer.get_vocab())
        added = getattr(tokenizer, "added_tokens_decoder", {})
        super().__init__(
            tokens={id: token.encode("utf-8", "replace") for token, id in self._vocab.items()},
            added_tokens=[AddedToken(str(token), id) for id, token in added.items()],
            eos_token_id=getattr(tokenizer, "eos_token_id", None),
            bos_token_id=getattr(tokenizer, "bos_token_id", None),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Same as `Tokenizer.encode`."""
        check_text(text)
        return list(self._foreign.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Iterable[int]) -> str:
        """Same as `Tokenizer.decode`."""
        return self._foreign.decode(self._known(ids))

    def decoder(self) -> StreamDecoder:
        """A decoder for tokens that come one at a time."""
        return GenericStreamDecoder(self)

    def token_bytes(self) -> Mapping[int, bytes]:
        """Raises TokenizerError: nothing is known about the tokens' texts."""
        raise no_bytes_of_its_own(self)

    @property
    def cuts_at_spaces(self) -> bool:
        """False: nothing is known about how it looks at a text."""
        return False

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write the files that its own package writes."""
        if not hasattr(self._foreign, "save_pretrained"):
            raise TokenizerError(
                f"a {type(self._foreign).__name__} has no save_pretrained to write its files with"
            )
        save_tokenizer(self._foreign, directory)

    def _fingerprint_below(self, size: int) -> str:
        added = {token.content for token in self.added_tokens if token.id >= size}
        vocab = [item for item in sorted(self._vocab.items()) if item[0] not in added]
        content = [type(self._foreign).__name__, vocab, self.eos_token_id]
        return digest(content)

    def _encode_ordinary(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)
