"""Writing a tokenizer's files, for `loading` and for transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._system.files import atomic_write_text
from .added_tokens import END_OF_TEXT, GPT2_SPECIAL_TOKENS, AddedToken, flags_of
from .steps import Around, template

TOKENIZER_JSON = "tokenizer.json"
VOCAB_JSON = "vocab.json"
MERGES_TXT = "merges.txt"
TOKENIZER_CONFIG = "tokenizer_config.json"

GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
"""transformers' names of GPT-2's tokenizer."""

_OTHER_CLASS = "PreTrainedTokenizerFast"
"""transformers' name of every tokenizer that a tokenizer.json describes."""

KIND = "gpt2fast_kind"
"""The field of tokenizer_config.json that marks a character tokenizer ("char")."""


def save_bpe(
    directory: Path,
    *,
    vocab: dict[str, int],
    merges: Sequence[str],
    added_tokens: Sequence[AddedToken],
    special_tokens: Mapping[str, str | None],
    add_prefix_space: bool,
    around: Around,
) -> None:
    """Write a byte-level BPE so that `load` and `transformers` read the same tokenizer."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }
    by_id = sorted(vocab.items(), key=lambda item: item[1])
    names = {id: token for token, id in by_id}
    names |= {token.id: token.content for token in added_tokens}
    # transformers' GPT2Tokenizer adds <|endoftext|> where it's missing: it isn't the class for that
    is_gpt2 = any(token.content == END_OF_TEXT for token in added_tokens)
    if is_gpt2:
        special_tokens = dict.fromkeys(GPT2_SPECIAL_TOKENS) | dict(special_tokens)
    _save(
        directory,
        added_tokens,
        {
            "pre_tokenizer": byte_level,
            "post_processor": template(around, names) if any(around) else byte_level,
            "decoder": byte_level,
        },
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(by_id),
            "merges": [merge.split(" ") for merge in merges],
        },
        {
            "tokenizer_class": GPT2_CLASSES[0] if is_gpt2 else _OTHER_CLASS,
            "add_prefix_space": add_prefix_space,
            **special_tokens,
        },
    )
    _write_json(directory / VOCAB_JSON, dict(by_id))
    lines = ["#version: 0.2", *merges]
    atomic_write_text(directory / MERGES_TXT, "\n".join(lines) + "\n")


def save_library(
    directory: Path, tokenizer_json: Mapping[str, Any], described: Mapping[str, Any]
) -> None:
    """Write a tokenizer of Hugging Face's library as that library describes it."""
    _write_json(directory / TOKENIZER_JSON, tokenizer_json)
    _write_json(directory / TOKENIZER_CONFIG, {"tokenizer_class": _OTHER_CLASS, **described})


def save_char(directory: Path, vocab: dict[str, int]) -> None:
    """Write a character vocabulary, for people to read and for `load` and `transformers`."""
    _write_json(directory / VOCAB_JSON, vocab, indent=0)
    end = vocab.get(END_OF_TEXT)
    _save(
        directory,
        [] if end is None else [AddedToken(END_OF_TEXT, end)],
        {"pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Fuse"}},
        {"type": "BPE", "vocab": vocab, "merges": []},
        {
            KIND: "char",
            "tokenizer_class": _OTHER_CLASS,
            "eos_token": None if end is None else END_OF_TEXT,
        },
    )


def _save(
    directory: Path,
    added_tokens: Sequence[AddedToken],
    steps: Mapping[str, Any],
    model: Mapping[str, Any],
    described: Mapping[str, Any],
) -> None:
    """Write tokenizer.json, and tokenizer_config.json with what is `described`."""
    added = {token.id: added_token_json(token) for token in added_tokens}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, **token} for id, token in added.items()],
        "normalizer": None,
        **steps,
        "model": model,
    }
    _write_json(directory / TOKENIZER_JSON, content)
    described = {
        **described,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(id): token for id, token in added.items()},
    }
    _write_json(directory / TOKENIZER_CONFIG, described)


def added_token_json(token: AddedToken) -> dict[str, Any]:
    """An added token as tokenizer_config.json has it."""
    return {"content": token.content, **flags_of(token)}


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")
