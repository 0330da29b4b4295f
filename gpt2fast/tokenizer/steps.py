"""The steps of a tokenizer.json before and after BPE, where they are GPT-2's own or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Around = tuple[list[int], list[int]]
"""Ids that are put before and after a text."""

_NEUTRAL = {
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
"""Options of BPE, and the values with which they do nothing."""

_LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
"""The field of a `Sequence` that lists its steps, by the kind of step."""


class GPT2Steps(NamedTuple):
    """Options of GPT-2's own steps."""

    add_prefix_space: bool
    around: Around


def gpt2_steps(content: Mapping[str, Any]) -> GPT2Steps | None:
    """The steps of a tokenizer.json, or None where they are others than GPT-2's.

    A `Sequence` stands for what is in it, and a template that adds nothing for nothing.
    """
    model = content.get("model")
    if not isinstance(model, Mapping) or model.get("type", "BPE") != "BPE":
        return None
    if any(model.get(name) not in neutral for name, neutral in _NEUTRAL.items()):
        return None
    steps = {name: _flat(content.get(name), name) for name in _LISTS}
    if steps["normalizer"] != []:
        return None
    before = steps["pre_tokenizer"]
    if before is None or not _is_byte_level(before) or not _is_byte_level(steps["decoder"]):
        return None
    (first,) = before
    add_prefix_space = first.get("add_prefix_space", True)
    if first.get("use_regex", True) is not True or not isinstance(add_prefix_space, bool):
        return None
    around = _template(steps["post_processor"])
    return None if around is None else GPT2Steps(add_prefix_space, around)


def as_gpt2_tokenizer(content: Mapping[str, Any], add_prefix_space: Any) -> dict[str, Any]:
    """The tokenizer.json as transformers' GPT2Tokenizer reads it.

    That class takes vocabulary, merges, added tokens and post-processor, and has all else itself.
    """
    model = content["model"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space}
    byte_level |= {"trim_offsets": True, "use_regex": True}
    return {
        **content,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {name: model[name] for name in ("type", "vocab", "merges") if name in model},
    }


def template(around: Around, names: Mapping[int, str]) -> dict[str, Any]:
    """The post-processor that puts the ids `around` a text; `names` are the tokens' by id."""
    before, after = (
        [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in ids] for ids in around
    )
    single = [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]}
            for ids in around
            for i in ids
        },
    }


def is_byte_level_decoder(content: Mapping[str, Any]) -> bool:
    """True if the text of ids is their bytes, put together."""
    return _is_byte_level(_flat(content.get("decoder"), "decoder"))


def _flat(step: Any, name: str) -> list[Any] | None:
    """The steps one after the other, or None where that cannot be told."""
    if step is None:
        return []
    if not isinstance(step, Mapping):
        return None
    if step.get("type") != "Sequence":
        return [step]
    parts = step.get(_LISTS[name])
    if not isinstance(parts, list):
        return None
    found: list[Any] = []
    for part in parts:
        inner = _flat(part, name)
        if inner is None:
            return None
        found += inner
    return found


def _is_byte_level(steps: list[Any] | None) -> bool:
    return steps is not None and len(steps) == 1 and steps[0].get("type") == "ByteLevel"


def _template(processors: list[Any] | None) -> Around | None:
    """The ids that post-processors put around a text, or None where they do something else."""
    if processors is None:
        return None
    # ByteLevel as a post-processor changes offsets alone.
    processors = [step for step in processors if step.get("type") != "ByteLevel"]
    if not processors:
        return [], []
    (first, *more) = processors
    if more or first.get("type") != "TemplateProcessing":
        return None
    around: Around = ([], [])
    texts = 0
    try:
        for piece in first["single"]:
            (kind,) = piece
            if kind == "Sequence" and piece[kind]["id"] == "A":
                texts += 1
            elif kind == "SpecialToken":
                around[min(texts, 1)].extend(first["special_tokens"][piece[kind]["id"]]["ids"])
            else:
                return None
    except (TypeError, KeyError, ValueError):
        return None
    ids = [*around[0], *around[1]]
    return around if texts == 1 and all(type(id) is int for id in ids) else None
