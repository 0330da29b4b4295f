"""Finding the tokenizer in a directory: Hugging Face layouts, OpenAI's, ours, others'."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import MissingTokenizerError, TokenizerError, shown
from .added_tokens import END_OF_TEXT, GPT2_SPECIAL_TOKENS, AddedToken
from .base import Tokenizer
from .bpe import BPETokenizer
from .char import CharTokenizer
from .checks import (
    added_token,
    check_merges,
    check_vocab,
    get_field,
    read_json,
    read_json_object,
    read_text,
)
from .huggingface import LibraryTokenizer, check_steps
from .llm_c import NAME as LLM_C
from .llm_c import load_llm_c
from .merges import UnusualVocabularyError
from .nanogpt import CHECKPOINT, load_nanogpt
from .nanogpt import NAME as META
from .saving import (
    GPT2_CLASSES,
    KIND,
    MERGES_TXT,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCAB_JSON,
    added_token_json,
)
from .steps import Around, as_gpt2_tokenizer, gpt2_steps, template

_VOCABULARIES = ((VOCAB_JSON, MERGES_TXT), ("encoder.json", "vocab.bpe"))
FILE_NAMES = (
    *(TOKENIZER_JSON, *_VOCABULARIES[0], *_VOCABULARIES[1], META, LLM_C),
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
)
"""Every file that `load` may read."""

SPECIAL_NAMES = (*GPT2_SPECIAL_TOKENS, "sep_token", "pad_token", "cls_token", "mask_token")
"""transformers' names of the tokens that play a part."""
_MAX_ADDED_TOKENS = 1 << 16

_log = logging.getLogger(__name__)


def load(path: Path) -> Tokenizer:
    """The tokenizer whose files are in a directory (or beside a file)."""
    directory = path if path.is_dir() else path.parent
    try:
        return _load(directory)
    except RecursionError:  # from showing a value in an error, after a parser that dares more
        raise TokenizerError(f"{directory}: a tokenizer file is nested too deeply") from None


def _load(directory: Path) -> Tokenizer:
    config_path = directory / TOKENIZER_CONFIG
    config = read_json_object(config_path) if config_path.exists() else {}
    if config.get(KIND) == "char":
        return _load_char(directory / VOCAB_JSON)
    if (directory / TOKENIZER_JSON).exists():
        return _load_tokenizer_json(directory, config)
    for vocab_name, merges_name in _VOCABULARIES:
        if (directory / vocab_name).is_file() and (directory / merges_name).is_file():
            return _load_vocab_and_merges(directory, vocab_name, merges_name, config)
    if (directory / VOCAB_JSON).exists():
        return _load_char(directory / VOCAB_JSON)
    if (directory / LLM_C).is_file():
        return load_llm_c(directory / LLM_C)
    if (directory / META).is_file():
        return load_nanogpt(directory / META)
    hint = ""
    if (directory / CHECKPOINT).is_file():
        hint = f", or {META}, which nanoGPT keeps with the data (data/shakespeare_char/{META})"
    raise MissingTokenizerError(
        f"{directory} holds no tokenizer; it needs tokenizer.json, or vocab.json with merges.txt, "
        f"or encoder.json with vocab.bpe{hint}"
    )


def _load_char(path: Path) -> CharTokenizer:
    return CharTokenizer.of_characters(read_json(path), str(path))


def _load_tokenizer_json(directory: Path, config: dict[str, Any]) -> Tokenizer:
    path = directory / TOKENIZER_JSON
    content = read_json_object(path)
    get_field(content, "model", dict, path)
    config = _with_special_tokens_map(directory, config)
    if config.get("tokenizer_class") in GPT2_CLASSES:
        # transformers' GPT2Tokenizer looks for the prefix space in tokenizer_config.json only
        add_prefix_space = _prefix_space(config, str(path))
        if content["model"].get("type", "BPE") != "BPE":
            raise TokenizerError(
                f"{path}: model.type is {shown(content['model']['type'])}, and the class that "
                f"tokenizer_config.json names, {config['tokenizer_class']}, has BPE: make them "
                "agree"
            )
        if gpt2_steps(content) is None:
            check_steps(content, str(path))
            _log.warning(
                "%s: steps or options that are not GPT-2's are left out, as transformers' %s does; "
                "for all of them, name PreTrainedTokenizerFast in tokenizer_config.json",
                path,
                config["tokenizer_class"],
            )
        content = as_gpt2_tokenizer(content, add_prefix_space)
    return from_content(content, config, str(path))


def _load_vocab_and_merges(
    directory: Path, vocab_name: str, merges_name: str, config: dict[str, Any]
) -> Tokenizer:
    path = directory / vocab_name
    vocab = check_vocab(read_json(path), str(path))
    merges_path = directory / merges_name
    lines = read_text(merges_path).replace("\r\n", "\n").split("\n")
    merges = check_merges(
        [line for line in lines if line and not line.startswith("#version")],
        f"{merges_path}: merge",
    )
    config_path = directory / TOKENIZER_CONFIG
    added_path = directory / "added_tokens.json"
    described = _with_special_tokens_map(directory, config)
    if "added_tokens_decoder" in config:
        field = f"{config_path}: added_tokens_decoder"
        by_id = get_field(config, "added_tokens_decoder", dict, config_path)
        added = [
            added_token(token, int(id) if id.isdecimal() and len(id) < 10 else id, f"{field}.{id}")
            for id, token in by_id.items()
        ]
    elif added_path.exists():
        special = {_content(token) for token in _special_tokens(described, str(path))[0].values()}
        added = [
            added_token({"content": content, "special": content in special}, id, str(added_path))
            for content, id in read_json_object(added_path).items()
        ]
    else:
        added = []
    added.sort(key=lambda token: token.id)
    described = {"tokenizer_class": GPT2_CLASSES[0], **described}  # no other class has these files
    source = f"{path} with {merges_name}"
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    content = as_gpt2_tokenizer({"model": model}, _prefix_space(described, source))
    content["added_tokens"] = [{"id": token.id, **added_token_json(token)} for token in added]
    return from_content(content, described, source)


def from_content(content: dict[str, Any], config: dict[str, Any], source: str) -> Tokenizer:
    """The tokenizer that the `content` of a tokenizer.json (it may be changed) and the `config` of
    a tokenizer_config.json, its special_tokens_map.json included, describe.

    GPT-2's byte-level BPE runs on tiktoken, and everything else as `tokenizers` runs it.
    """
    model = get_field(content, "model", dict, source)
    added = []
    for i, token in enumerate(
        get_field({"added_tokens": [], **content}, "added_tokens", list, source)
    ):
        id = token.get("id") if isinstance(token, dict) else None
        added.append(added_token(token, id, f"{source}: added_tokens[{i}]"))
    is_bpe = model.get("type", "BPE") == "BPE"
    if is_bpe:
        field = f"{source}: model.vocab"
        vocab = check_vocab(get_field(model, "vocab", dict, source, "model."), field)
        found = get_field(model, "merges", list, source, "model.")
        spaced = any(isinstance(merge, list) and " " in "".join(map(str, merge)) for merge in found)
        merges = (
            []
            if spaced  # which the library checks
            else check_merges([_joined(merge) for merge in found], f"{source}: model.merges")
        )
    else:
        vocab, merges, spaced = _ids_of(model), [], False
    ids = _with_added(vocab, added, source, numbered=is_bpe)
    known = {token.content for token in added}
    named, extra = _special_tokens(config, source)
    more = []
    for value in (*named.values(), *extra):
        if value is None or _content(value) in known:
            continue
        token = added_token(
            {"content": value, "special": True} if isinstance(value, str) else value,
            ids.get(_content(value), len(ids)),
            f"{source}: special token",
        )
        known.add(token.content)
        ids[token.content] = token.id
        more.append(token)
    if len(set(ids.values())) != len(ids):
        raise TokenizerError(
            f"{source}: the vocabulary's {len(vocab)} ids leave gaps, so that added tokens get "
            "ids of others; number the vocabulary from 0 without gaps"
        )
    if len(added) + len(more) > _MAX_ADDED_TOKENS:
        raise TokenizerError(
            f"{source}: there are {len(added) + len(more)} added tokens; supported are "
            f"{_MAX_ADDED_TOKENS}"
        )
    special_tokens = {name: _content(token) for name, token in named.items()}
    if END_OF_TEXT in known:
        special_tokens.setdefault("eos_token", END_OF_TEXT)
    around = _asked_around(config, special_tokens, ids, source)
    if around is not None:
        names = {id: token for token, id in ids.items()}
        content["post_processor"] = template(around, names) if any(around) else None
    steps = None if spaced else gpt2_steps(content)
    if steps is not None:
        try:
            return BPETokenizer(
                vocab,
                merges,
                added + more,
                special_tokens=special_tokens,
                add_prefix_space=steps.add_prefix_space,
                around=steps.around,
                source=source,
            )
        except UnusualVocabularyError as error:
            if model.get("unk_token") is None:
                _log.warning("%s; what has no token is left out of encoded text", error)
    return LibraryTokenizer(
        content,
        special_tokens,
        more_tokens=more,
        clean_up_spaces=config.get("clean_up_tokenization_spaces") is True,
        source=source,
    )


def _with_added(
    vocab: dict[str, int], added: list[AddedToken], source: str, *, numbered: bool
) -> dict[str, int]:
    """Tokens and ids of both; with `numbered`, added tokens must follow the vocabulary."""
    ids = dict(vocab)
    for token in added:
        expected = ids.get(token.content, len(ids))
        if token.id != expected and numbered:
            raise TokenizerError(
                f"{source}: the added token {shown(token.content)} has id {token.id}, where it "
                f"must have {expected}: added tokens keep the id that they have in "
                "the vocabulary, or follow it one by one"
            )
        ids[token.content] = token.id
    return ids


def _ids_of(model: dict[str, Any]) -> dict[str, int]:
    """The vocabulary of a model of words (an object) or of unigrams (a list of pairs)."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        return {token: id for token, id in vocab.items() if type(id) is int}
    pairs = vocab if isinstance(vocab, list) else []
    return {pair[0]: id for id, pair in enumerate(pairs) if isinstance(pair, list) and pair}


def _asked_around(
    config: dict[str, Any], special_tokens: dict[str, Any], ids: dict[str, int], source: str
) -> Around | None:
    """The ids that `add_bos_token` and `add_eos_token` ask for; None where neither is there."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return None
    around: Around = ([], [])
    for name, place in (("bos", around[0]), ("eos", around[1])):
        asked = config.get(f"add_{name}_token", False)
        if not isinstance(asked, bool | None):
            raise TokenizerError(f"{source}: add_{name}_token is {shown(asked)}, not true or false")
        token = special_tokens.get(f"{name}_token")
        if asked and token is not None:
            place.append(ids[token])
    return around


def _prefix_space(config: dict[str, Any], source: str) -> bool:
    value = config.get("add_prefix_space", False)
    if not isinstance(value, bool):
        raise TokenizerError(f"{source}: add_prefix_space is {shown(value)}, not true or false")
    return value


def _with_special_tokens_map(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    map_path = directory / "special_tokens_map.json"
    if "added_tokens_decoder" in config or not map_path.exists():
        return config
    return {**config, **read_json_object(map_path)}


def _special_tokens(config: dict[str, Any], source: str) -> tuple[dict[str, Any], list[Any]]:
    """Special tokens by their part (`eos_token` and so on), and further ones.

    Each is None, a string, or an object like an added token's, as transformers reads them.
    """
    named = {}
    for name in SPECIAL_NAMES:
        if name in config:
            named[name] = config[name]
        elif config.get("tokenizer_class") in GPT2_CLASSES and name in GPT2_SPECIAL_TOKENS:
            named[name] = GPT2_SPECIAL_TOKENS[name]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    if not isinstance(extra, list):
        raise TokenizerError(f"{source}: extra_special_tokens is {shown(extra)}, not a list")
    for name, value in (*named.items(), *(("extra_special_tokens", value) for value in extra)):
        content = _content(value)
        if content == "" or not isinstance(content, str | None):
            raise TokenizerError(f"{source}: {name} is {shown(value)}, not a token's text")
    return named, extra


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _joined(merge: Any) -> Any:
    """A merge as in merges.txt; newer files have a list of the two tokens instead."""
    if isinstance(merge, list) and len(merge) == 2 and all(isinstance(t, str) for t in merge):
        return f"{merge[0]} {merge[1]}"
    return merge
