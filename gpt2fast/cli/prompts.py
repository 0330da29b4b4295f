"""A file of prompts: a text on each line, or an object that has options of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .._system.parsing import Unreadable, parse_json
from ..errors import GenerationError, shown
from ..sampling_options import SamplingOptions

OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
"""What a line may say about its own continuation."""

_RESULTS = (
    "sample", "text", "finish_reason", "prompt_tokens", "new_tokens", "tokens", "index", "logprobs",
    "top_logprobs", "prompt_token_ids", "prompt_logprobs", "prompt_top_logprobs",
)  # fmt: skip
"""What --json writes beside the prompt; its output may be read again."""


class PromptFileError(GenerationError):
    """A line of a file of prompts that cannot be understood."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and what its line says about it."""

    text: str
    index: int | None = None
    """Number of its line, counted from 0; None where it comes from no file."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Goes to the output as it is: its "id", if it has one."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `OPTIONS`, what its line sets."""


def parse_prompts(name: str, content: str, shared: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a file, one for each line; of a .jsonl file, blank lines are none.

    Args:
        name: the file's name, which says whether its lines are JSON.
        content: its text.
        shared: what `SamplingOptions` takes, for whatever a line does not set.

    Raises:
        PromptFileError: names the line that is wrong, and what is.
        GenerationError: there is no prompt at all.
    """
    # Not splitlines(), which takes a form feed and U+2028 for ends of lines.
    lines = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    is_blank = not any(line.strip() for line in lines)
    if not content or (is_blank and name.lower().endswith(".jsonl")):
        raise GenerationError(f"{name} has no prompts; put one on each line")
    if not name.endswith(".jsonl"):
        return [Prompt(line, index) for index, line in enumerate(lines)]
    return [
        _parse(f"{name}, line {index + 1}", index, line, shared)
        for index, line in enumerate(lines)
        if line.strip()
    ]


def _parse(place: str, index: int, line: str, shared: Mapping[str, Any]) -> Prompt:
    try:
        value = parse_json(line)
    except Unreadable as error:
        raise GenerationError(
            f'{place}: {shown(line)} is neither a JSON text nor an object with a "prompt": {error}'
        ) from None
    values = dict(value) if isinstance(value, dict) else {"prompt": value}
    text = values.pop("prompt", None)
    if not isinstance(text, str):
        raise GenerationError(
            f'{place}: {shown(line)} is neither a JSON text nor an object with a "prompt"'
        )
    labels = {"id": values.pop("id")} if "id" in values else {}
    if "finish_reason" in values:
        for result in _RESULTS:
            values.pop(result, None)
    values.pop("index", None)
    unknown = [option for option in values if option not in OPTIONS]
    if unknown:
        raise PromptFileError(
            f"{place}: there is no option {shown(unknown[0])}; a line takes prompt, id, "
            f"{', '.join(OPTIONS)}"
        )
    stop = values.get("stop")
    texts = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(one, str) and one for one in texts):
        raise PromptFileError(
            f"{place}: stop is {shown(stop)}; it must be a text that is not empty, or a "
            "list of them"
        )
    try:
        SamplingOptions(**{**shared, **{key: values[key] for key in values if key != "stop"}})
    except GenerationError as error:
        raise PromptFileError(f"{place}: {error}") from None
    return Prompt(text, index, labels, values)
