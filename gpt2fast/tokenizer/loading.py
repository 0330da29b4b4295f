"""Finding the tokenizer in a directory: Hugging Face layouts, OpenAI's, our characters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .added_tokens import END_OF_TEXT, AddedToken
from .base import Tokenizer
from .bpe import BPETokenizer
from .char import CharTokenizer
from .checks import (
    SUPPORTED,
    added_token,
    check_merges,
    check_vocab,
    get_field,
    read_json,
    read_json_object,
    read_text,
)
from .saving import GPT2_CLASSES, GPT2_DEFAULTS, KIND

FILE_NAMES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Every file that `load` may read."""

_SPECIAL_NAMES = (*GPT2_DEFAULTS, "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_ADDED_TOKENS = 1 << 16


def load(path: Path) -> Tokenizer:
    """The tokenizer whose files are in a directory (or beside a file)."""
    directory = path if path.is_dir() else path.parent
    try:
        return _load(directory)
    except RecursionError:  # from showing a value in an error, after a parser that dares more
        raise TokenizerError(f"{directory}: a tokenizer file is nested too deeply") from None


def _load(directory: Path) -> Tokenizer:
    config_path = directory / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    if config.get(KIND) == "char":
        return _load_char(directory / "vocab.json")
    if (directory / "tokenizer.json").is_file():
        return _load_tokenizer_json(directory, config)
    for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (directory / vocab_name).is_file() and (directory / merges_name).is_file():
            return _load_vocab_and_merges(directory, vocab_name, merges_name, config)
    if (directory / "vocab.json").is_file():
        return _load_char(directory / "vocab.json")
    raise TokenizerError(
        f"{directory} holds no tokenizer; it needs tokenizer.json, or vocab.json with merges.txt, "
        "or encoder.json with vocab.bpe"
    )


def _load_char(path: Path) -> CharTokenizer:
    vocab = check_vocab(read_json(path), str(path))
    for token in vocab:
        if len(token) != 1 and token != END_OF_TEXT:
            raise TokenizerError(
                f"{path}: the token {token!r:.80} is not a single character; a character "
                f"vocabulary has only those and {END_OF_TEXT}, and a BPE vocabulary needs its "
                "merges.txt beside it"
            )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError(
            f"{path}: the ids of {len(vocab)} characters must be 0 to {len(vocab) - 1}, each once"
        )
    return CharTokenizer(vocab)


def _load_tokenizer_json(directory: Path, config: dict[str, Any]) -> BPETokenizer:
    path = directory / "tokenizer.json"
    content = read_json_object(path)
    model = get_field(content, "model", dict, path)
    if model.get("type", "BPE") != "BPE":
        raise _unsupported(path, "model.type", model["type"], '"BPE"')
    for name, neutral in (
        ("dropout", (None, 0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        ("byte_fallback", (None, False)),
        ("ignore_merges", (None, False)),
    ):
        if model.get(name) not in neutral:
            raise _unsupported(path, f"model.{name}", model[name], json.dumps(neutral[1]))
    if content.get("normalizer") is not None:
        raise _unsupported(path, "normalizer", content["normalizer"], "null")
    pre_tokenizer = _byte_level(content, "pre_tokenizer", path)
    if pre_tokenizer.get("use_regex", True) is not True:
        raise _unsupported(
            path, "pre_tokenizer.use_regex", pre_tokenizer["use_regex"], "true, GPT-2's pattern"
        )
    _byte_level(content, "decoder", path)
    if content.get("post_processor") is not None:
        _byte_level(content, "post_processor", path)
    vocab = check_vocab(get_field(model, "vocab", dict, path, "model."), f"{path}: model.vocab")
    merges = check_merges(
        [_joined(merge) for merge in get_field(model, "merges", list, path, "model.")],
        f"{path}: model.merges",
    )
    added = []
    for i, token in enumerate(
        get_field({"added_tokens": [], **content}, "added_tokens", list, path)
    ):
        id = token.get("id") if isinstance(token, dict) else None
        added.append(added_token(token, id, f"{path}: added_tokens[{i}]"))
    # transformers' GPT2Tokenizer looks for the prefix space in tokenizer_config.json only
    add_prefix_space = (
        config.get("add_prefix_space", False)
        if config.get("tokenizer_class") in GPT2_CLASSES
        else pre_tokenizer.get("add_prefix_space", True)
    )
    return _build(directory, config, vocab, merges, added, add_prefix_space, str(path))


def _load_vocab_and_merges(
    directory: Path, vocab_name: str, merges_name: str, config: dict[str, Any]
) -> BPETokenizer:
    path = directory / vocab_name
    vocab = check_vocab(read_json(path), str(path))
    merges_path = directory / merges_name
    lines = read_text(merges_path).replace("\r\n", "\n").split("\n")
    merges = check_merges(
        [line for line in lines if line and not line.startswith("#version")],
        f"{merges_path}: merge",
    )
    config_path = directory / "tokenizer_config.json"
    if config.get("add_bos_token"):
        raise _unsupported(config_path, "add_bos_token", config["add_bos_token"], "false")
    added_path = directory / "added_tokens.json"
    if "added_tokens_decoder" in config:
        field = f"{config_path}: added_tokens_decoder"
        by_id = get_field(config, "added_tokens_decoder", dict, config_path)
        added = [
            added_token(token, int(id) if id.isdecimal() and len(id) < 10 else id, f"{field}.{id}")
            for id, token in by_id.items()
        ]
    elif added_path.is_file():
        special = {_content(token) for token in _special_tokens(directory, config)[0].values()}
        added = [
            added_token({"content": content, "special": content in special}, id, str(added_path))
            for content, id in read_json_object(added_path).items()
        ]
    else:
        added = []
    added.sort(key=lambda token: token.id)
    config = {"tokenizer_class": GPT2_CLASSES[0], **config}  # no other class has these files
    add_prefix_space = config.get("add_prefix_space", False)
    source = f"{path} with {merges_name}"
    return _build(directory, config, vocab, merges, added, add_prefix_space, source)


def _build(
    directory: Path,
    config: dict[str, Any],
    vocab: dict[str, int],
    merges: Sequence[str],
    added: list[AddedToken],
    add_prefix_space: Any,
    source: str,
) -> BPETokenizer:
    if not isinstance(add_prefix_space, bool):
        raise TokenizerError(
            f"{source}: add_prefix_space is {add_prefix_space!r:.80}, not true or false"
        )
    ids = dict(vocab)

    def expected_id(content: str) -> int:
        return ids.get(content, len(ids))

    for token in added:
        if token.id != expected_id(token.content):
            raise TokenizerError(
                f"{source}: the added token {token.content!r:.80} has id {token.id}, where it must "
                f"have {expected_id(token.content)}: added tokens keep the id that they have in "
                "the vocabulary, or follow it one by one"
            )
        ids[token.content] = token.id
    contents = {token.content for token in added}
    named, extra = _special_tokens(directory, config)
    for value in (*named.values(), *extra):
        if value is None or _content(value) in contents:
            continue
        token = added_token(
            {"content": value, "special": True} if isinstance(value, str) else value,
            expected_id(_content(value)),
            f"{source}: special token",
        )
        contents.add(token.content)
        ids[token.content] = token.id
        added.append(token)
    if len(set(ids.values())) != len(ids):
        raise TokenizerError(
            f"{source}: the vocabulary's {len(vocab)} ids leave gaps, so that added tokens get "
            "ids of others; number the vocabulary from 0 without gaps"
        )
    if len(added) > _MAX_ADDED_TOKENS:
        raise TokenizerError(
            f"{source}: there are {len(added)} added tokens; supported are {_MAX_ADDED_TOKENS}"
        )
    special_tokens = {name: _content(token) for name, token in named.items()}
    if END_OF_TEXT in contents:
        special_tokens.setdefault("eos_token", END_OF_TEXT)
    return BPETokenizer(
        vocab,
        merges,
        added,
        special_tokens=special_tokens,
        add_prefix_space=add_prefix_space,
        source=source,
    )


def _special_tokens(directory: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """What plays which part (`eos_token` and so on), and further special tokens.

    Each is None, a string, or an object like an added token's, as transformers reads them.
    """
    path = directory / "tokenizer_config.json"
    values = dict(config)
    map_path = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and map_path.is_file():
        values.update(read_json_object(map_path))
    named = {}
    for name in _SPECIAL_NAMES:
        if name in values:
            named[name] = values[name]
        elif config.get("tokenizer_class") in GPT2_CLASSES and name in GPT2_DEFAULTS:
            named[name] = END_OF_TEXT
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    if not isinstance(extra, list):
        raise TokenizerError(f"{path}: extra_special_tokens is {extra!r:.80}, not a list")
    for name, value in (*named.items(), *(("extra_special_tokens", value) for value in extra)):
        content = _content(value)
        if content == "" or not isinstance(content, str | None):
            raise TokenizerError(f"{path}: {name} is {value!r:.80}, not a token's text")
    return named, extra


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _joined(merge: Any) -> Any:
    """A merge as in merges.txt; newer files have a list of the two tokens instead."""
    if isinstance(merge, list) and len(merge) == 2 and all(isinstance(t, str) for t in merge):
        return f"{merge[0]} {merge[1]}"
    return merge


def _byte_level(content: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    value = content.get(name)
    if not isinstance(value, dict) or value.get("type") != "ByteLevel":
        kind = value.get("type") if isinstance(value, dict) else value
        raise _unsupported(path, f"{name}.type", kind, '"ByteLevel"')
    return value


def _unsupported(path: Path, field: str, value: Any, supported: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: {field} is {json.dumps(value):.80}; {SUPPORTED}, where it is {supported}"
    )
