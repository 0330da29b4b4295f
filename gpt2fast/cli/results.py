"""Continuations on standard output: as text, in JSON, with log-probabilities; speed at the end."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .._system.output import held, takes_unicode
from ..errors import TokenizerError, printable
from ..sampling import overridden

if TYPE_CHECKING:
    from ..inference.continuation import Generation
    from ..inference.decoding import Timing
    from ..inference.generator import Generator
    from .prompts import Prompt


def stream(generator: Generator, prompt: str, options: dict[str, Any]) -> None:
    """Write a prompt, and its continuation as it comes."""
    pieces = generator.stream(prompt, **options)
    begin = next(pieces, "")  # what there is to say of kernels and the like comes before the text
    with held():
        write(prompt + begin)
        for piece in pieces:
            write(piece)
        write("\n")
    if pieces.logprobs is not None:
        write(_table(generator, pieces.tokens, pieces.logprobs, pieces.top_logprobs))


def write_all(generator: Generator, prompts: Sequence[Prompt], options: dict[str, Any]) -> None:
    """Write each prompt with its continuation, in the order of the prompts."""
    for number, (_, result) in enumerate(_results(generator, prompts, options)):
        write(f"---\n{result}\n" if number else f"{result}\n")
        if result.prompt_logprobs is not None:
            tops = result.prompt_top_logprobs
            write(_table(generator, result.prompt_token_ids, result.prompt_logprobs, tops))
        elif result.logprobs is not None:
            write(_table(generator, result.tokens, result.logprobs, result.top_logprobs))


def write_json(generator: Generator, prompts: Sequence[Prompt], options: dict[str, Any]) -> None:
    """Write a JSON object for each continuation."""
    copies = options["num_return_sequences"]
    for number, (prompt, result) in enumerate(_results(generator, prompts, options)):
        line = as_object(generator, prompt, result, number % copies)
        write(json.dumps(line, ensure_ascii=not takes_unicode()) + "\n")


def _results(
    generator: Generator, prompts: Sequence[Prompt], options: dict[str, Any]
) -> Iterator[tuple[Prompt, Generation]]:
    """The continuations in order; prompts with equal options are computed together."""
    from ..inference.sampling import Draws
    from .prompt_progress import PromptProgress

    draws, timing = Draws(), options["timing"]
    for own, together in itertools.groupby(prompts, key=lambda prompt: prompt.options):
        group = list(together)
        found = generator.one_by_one(
            [prompt.text for prompt in group], draws=draws, **overridden(options, own)
        )
        for number, result in enumerate(found):
            if isinstance(timing, PromptProgress):
                timing.add_result(result)
                timing.line.clear()
            yield group[number // options["num_return_sequences"]], result


def _table(
    generator: Generator,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[dict[int, float] | None] | None,
) -> str:
    """A line for each token: log-probability, id, text; then the likeliest in its place."""
    lines = ["   logprob     id  token" + ("   likeliest in its place" if tops else "")]
    width = max((len(_quoted(generator, token)) for token in tokens), default=0)
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        value = "none" if logprob is None else f"{logprob:.6f}"
        line = f"{value:>10} {token:>6}  {_quoted(generator, token):<{width}}"
        top = (tops[place] if tops else None) or {}
        likely = ", ".join(f"{_quoted(generator, t)} {x:.6f}" for t, x in top.items())
        lines.append(f"{line}   {likely}".rstrip())
    return "".join(f"{line}\n" for line in lines)


def _quoted(generator: Generator, token: int) -> str:
    """A token's text on one line, in quotes; null for ids that the tokenizer does not have."""
    return printable(json.dumps(_token_text(generator, token), ensure_ascii=False))


def _token_text(generator: Generator, token: int) -> str | None:
    """A token's text, in which bytes that are no whole character are U+FFFD."""
    try:
        return generator.tokenizer.decode([token])
    except TokenizerError:  # the model's vocabulary is padded
        return None


def as_object(
    generator: Generator, prompt: Prompt, result: Generation, number: int
) -> dict[str, Any]:
    """A continuation as --json writes it.

    Args:
        generator: which wrote it.
        prompt: what it continues.
        result: the continuation.
        number: of the sample, among those of the prompt.
    """

    def named(tops: Sequence[dict[int, float] | None] | None) -> list[Any] | None:
        if tops is None:
            return None
        return [
            None
            if top is None
            else [
                {"id": token, "text": _token_text(generator, token), "logprob": logprob}
                for token, logprob in top.items()
            ]
            for top in tops
        ]

    scores = {
        "logprobs": result.logprobs,
        "top_logprobs": named(result.top_logprobs),
        "prompt_token_ids": None if result.prompt_logprobs is None else result.prompt_token_ids,
        "prompt_logprobs": result.prompt_logprobs,
        "prompt_top_logprobs": named(result.prompt_top_logprobs),
    }
    place = {} if prompt.index is None else {"index": prompt.index}
    return {
        **place,
        **prompt.labels,
        "prompt": result.prompt,
        "sample": number,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "tokens": result.tokens,
        "seed": result.seed,
        **{name: value for name, value in scores.items() if value is not None},
    }


def stats(timing: Timing, load_seconds: float) -> str:
    """The line of --stats."""

    def rate(amount: float, seconds: float) -> float:
        return amount / seconds if seconds else 0.0

    speed = rate(timing.decode_tokens, timing.decode_seconds)
    bandwidth = rate(timing.decode_bytes, timing.decode_seconds) / 1e9
    prefill = rate(timing.prefill_tokens, timing.prefill_seconds)
    return (
        f"load {load_seconds:.2f} s | "
        f"prefill {timing.prefill_tokens} tokens, {prefill:.1f} tok/s | "
        f"time to first token {timing.first_token_seconds or 0.0:.3f} s | "
        f"decode {timing.decode_tokens} tokens, {speed:.1f} tok/s, {bandwidth:.2f} GB/s"
    )


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
