"""generation_config.json: the settings of generation that come with a checkpoint.

Its end tokens (one or several), its padding token and the options `OF_CHECKPOINT` are honored.
Everything else is kept, and written back; settings that would change the output of transformers,
and are not taken over by `generate` here, are named once when the file is read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .._system.parsing import read_json
from ..errors import ConfigError, GenerationError, shown
from ..sampling import OF_CHECKPOINT, SamplingOptions

NAME = "generation_config.json"

_log = logging.getLogger(__name__)

# Defaults of transformers' `generate`; any other value changes its output.
_NEUTRAL: dict[str, Any] = {
    "assistant_early_exit": None, "bad_words_ids": None, "begin_suppress_tokens": None,
    "constraints": None, "diversity_penalty": 0.0, "do_sample": False, "dola_layers": None,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "exponential_decay_length_penalty": None,
    "force_words_ids": None, "forced_bos_token_id": None, "forced_decoder_ids": None,
    "forced_eos_token_id": None, "guidance_scale": None, "length_penalty": 1.0,
    "max_length": 20, "max_new_tokens": None, "max_time": None, "min_length": 0,
    "min_new_tokens": None, "min_p": None, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "penalty_alpha": None,
    "prompt_lookup_num_tokens": None, "remove_invalid_values": False, "renormalize_logits": False,
    "repetition_penalty": 1.0, "sequence_bias": None, "stop_strings": None,
    "suppress_tokens": None, "temperature": 1.0, "token_healing": False, "top_h": None,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "watermarking_config": None,
}  # fmt: skip
_PASSED = frozenset(option.name for option in fields(SamplingOptions))
_MOST_IDS = 1000


def read_generation_config(folder: Path, config_json: Mapping[str, Any]) -> dict[str, Any]:
    """The settings beside a checkpoint, for `GPT2.generation_config`.

    Args:
        folder: where generation_config.json may lie.
        config_json: content of config.json, which counts where the other file is missing.

    Raises:
        ConfigError: a file that cannot be read, or token ids that are none.
    """
    path = folder / NAME
    values = read_json(path) if path.exists() else {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        _check_ids(values.get(name), f"{path}: {name}", several=name == "eos_token_id")
    if path.exists():
        values.setdefault(
            "eos_token_id", None
        )  # where there is this file, the other does not count
    elif isinstance(config_json.get("eos_token_id"), list):
        values["eos_token_id"] = config_json["eos_token_id"]
        _check_ids(values["eos_token_id"], f"{folder / 'config.json'}: eos_token_id", several=True)
    # Without a file of their own, transformers takes these settings out of config.json.
    settings, source = (values, path) if path.exists() else (config_json, folder / "config.json")
    for name in OF_CHECKPOINT:
        if settings.get(name) is not None:
            values[name] = _checked_option(name, settings[name], source)
    _tell_ignored(settings, path if path.exists() else path.parent)
    return values


def _checked_option(name: str, value: Any, source: Path) -> Any:
    try:
        SamplingOptions().of_call({name: value}, {})
    except GenerationError as error:
        raise ConfigError(f"{source}: {error}") from None
    return value


def _tell_ignored(values: Mapping[str, Any], source: Path) -> None:
    set_here = {
        name: f"{name}={shown(values[name], 40)}"
        for name, neutral in _NEUTRAL.items()
        if values.get(name) not in (None, neutral) and name not in OF_CHECKPOINT
    }
    if not set_here:
        return
    passed = ", ".join(text for name, text in set_here.items() if name in _PASSED)
    others = ", ".join(text for name, text in set_here.items() if name not in _PASSED)
    ways = (passed and f"{passed} (pass them)", others and f"{others} (it has no such settings)")
    _log.warning(
        "%s sets what transformers' generate takes over and this one does not: %s",
        source,
        ", ".join(filter(None, ways)),
    )


def first_end_token(config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of config.json with one end token, where it lists several."""
    ends = config_json.get("eos_token_id")
    if not isinstance(ends, list):
        return config_json
    return {**config_json, "eos_token_id": ends[0] if ends else None}


def _check_ids(value: Any, where: str, *, several: bool) -> None:
    ids = value if several and isinstance(value, list) else [value]
    if len(ids) > _MOST_IDS or not all(
        id is None or (type(id) is int and abs(id) < 2**63) for id in ids
    ):
        kind = "token ids" if several else "a token id"
        raise ConfigError(f"{where} is {shown(value)}, and must be {kind} or null")
