"""Generation from token ids to token ids: the implementation of `GPT2.generate`."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import GenerationError, shown
from ..model import GPT2
from ..sampling import SamplingOptions
from ..tokenizer import Tokenizer
from .beam_search import beam_search
from .callables import Callables
from .contrastive import check_contrastive
from .decoding import decode
from .packed import PackedGPT2
from .processors import check_ids
from .stopping import StopCriteria


class _FromConfig:
    """The type of `FROM_CONFIG`."""

    def __repr__(self) -> str:
        return "FROM_CONFIG"


FROM_CONFIG = _FromConfig()
"""Default of options that generation_config.json may set, which count then: of `eos_token_id` the
ids in that file, or else the one in the model's configuration. (None switches an option off.)"""

EosTokenId = int | Sequence[int] | None | _FromConfig


def generate(
    model: GPT2,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | _FromConfig | None = FROM_CONFIG,
    max_length: int | _FromConfig | None = FROM_CONFIG,
    min_new_tokens: int | _FromConfig | None = FROM_CONFIG,
    max_time: float | _FromConfig | None = FROM_CONFIG,
    do_sample: bool = False,
    temperature: float | None = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    epsilon_cutoff: float | _FromConfig | None = FROM_CONFIG,
    eta_cutoff: float | _FromConfig | None = FROM_CONFIG,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    penalty_alpha: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    bad_words_ids: Sequence[Sequence[int]] | _FromConfig | None = FROM_CONFIG,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    eos_token_id: EosTokenId = FROM_CONFIG,
    pad_token_id: int | None = None,
    stop: str | Sequence[str | Sequence[int]] | None = None,
    tokenizer: Any = None,
    seed: int | None = None,
    use_cache: bool = True,
    logits_processor: Iterable[Callable[[Tensor, Tensor], Tensor]] | None = None,
    stopping_criteria: Iterable[Callable[..., Any]] | None = None,
) -> Tensor:
    """Continue each row of `input_ids`.

    Greedy and beam output equal transformers' token for token. A masked token does not exist: it
    has no position, no processor of scores sees it, and `max_length` does not count it. So each row
    of a batch gives what it gives alone. A text never outgrows `n_positions`: if it could, the call
    is refused. (A `Generator` refuses by default, too, and can also slide or stop; the command
    `generate` slides by default.) Sampling draws for sample i of a prompt from the seed and i
    alone; rows with equal prompts are further samples of it. Without a seed, each row of
    `input_ids` gets one of its own.

    Args:
        model: switched to evaluation mode meanwhile.
        input_ids: (B, T) token ids. None, as in transformers, is one row of the token that begins a
            text: the `bos_token_id` of generation_config.json, or else of the configuration. An
            empty row, of no columns or all masked, is continued from there as well.
        attention_mask: (B, T), 1 where a token is real; padding on either side, or holes.
        max_new_tokens, max_length, min_new_tokens, max_time, do_sample, temperature, top_k, top_p,
            min_p, typical_p, repetition_penalty, no_repeat_ngram_size, epsilon_cutoff, eta_cutoff,
            frequency_penalty, presence_penalty, penalty_alpha, logit_bias, bad_words_ids,
            num_beams, length_penalty, early_stopping, num_return_sequences, seed: see
            `SamplingOptions`. By default max_new_tokens is 20, where generation_config.json says
            nothing.
        eos_token_id: id or ids that end a continuation; None switches this off.
        pad_token_id: fills the rows of continuations that ended early; the end token if not given.
        stop: strings, or lists of token ids, that end a continuation.
        tokenizer: decodes tokens to look for the strings of `stop` in; one of transformers will do.
        use_cache: keep keys and values; without, every step computes everything again, to the
            same result.
        logits_processor: functions of (input_ids, scores) that return other scores (rows, vocab)
            for the next tokens, transformers' `LogitsProcessor`s for example; called after
            the penalties, bad words and `min_new_tokens`, before temperature and the like.
        stopping_criteria: functions of (input_ids, None) that are true for a row that ends,
            transformers' `StoppingCriteria` for example. Neither these nor the processors see
            padding.

    Returns:
        (B * num_return_sequences, T + new) int64 on the device of `input_ids`: prompt and
        continuation, where `new` is the length of the longest continuation.

    Raises:
        GenerationError: an option or an argument out of its range, both max_new_tokens and
            max_length, or a prompt that exceeds `n_positions` with the new tokens; nothing has been
            computed then.
    """
    if do_sample and penalty_alpha:
        raise GenerationError(
            f"do_sample is True and penalty_alpha is {penalty_alpha}, which asks for contrastive "
            "search: leave one of them out"
        )
    of_checkpoint = {
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "min_new_tokens": min_new_tokens,
        "max_time": max_time,
        "epsilon_cutoff": epsilon_cutoff,
        "eta_cutoff": eta_cutoff,
        "bad_words_ids": bad_words_ids,
    }
    options = SamplingOptions(
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        penalty_alpha=penalty_alpha,
        logit_bias=logit_bias,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_return_sequences=num_return_sequences,
        seed=seed,
    ).of_call(
        model.generation_config,
        {name: value for name, value in of_checkpoint.items() if value is not FROM_CONFIG},
    )
    check_ids(options, model.config.vocab_size)
    check_contrastive(model, options, use_cache)
    ends = end_tokens(model, eos_token_id)
    padding = _padding(model, ends, pad_token_id, num_beams)
    criteria = StopCriteria(ends, stop, tokenizer)
    callables = Callables(logits_processor, stopping_criteria)
    input_ids, attention_mask = _with_beginning(model, input_ids, attention_mask)
    prompts = _real_tokens(model, input_ids, attention_mask)
    limits = []
    for index, prompt in enumerate(prompts):
        name = f"row {index} of input_ids"
        limits.append(options.new_tokens(len(prompt), name))
        check_length(model, len(prompt), limits[-1], name, options.max_length)
    if options.max_new_tokens == 0:
        continuations: list[list[int]] = [[] for _ in range(len(prompts) * num_return_sequences)]
    elif num_beams > 1:
        beams = beam_search(
            model, prompts, limits, options, criteria, use_cache=use_cache, callables=callables
        )
        continuations = [beam.tokens for beam in beams]
    else:
        continuations = [[] for _ in range(len(prompts) * num_return_sequences)]
        for step in decode(
            model, prompts, limits, options, criteria, use_cache=use_cache, callables=callables
        ):
            for row, token in zip(step.rows, step.tokens, strict=True):
                continuations[row].append(token)

    longest = max(len(tokens) for tokens in continuations)
    new = torch.tensor(
        [tokens + [padding] * (longest - len(tokens)) for tokens in continuations],
        dtype=torch.int64,
        device=input_ids.device,
    )
    return torch.cat([input_ids.long().repeat_interleave(num_return_sequences, dim=0), new], dim=1)


def end_tokens(model: GPT2, eos_token_id: EosTokenId) -> list[int]:
    """The ids that end a continuation."""
    if eos_token_id is None:
        return []
    vocab_size = model.config.vocab_size
    if isinstance(eos_token_id, _FromConfig):
        named = model.generation_config.get("eos_token_id", model.config.eos_token_id)
        # A small vocabulary under GPT-2's default of 50256 has no such token.
        tokens = named if isinstance(named, list) else [named]
        return [token for token in tokens if token is not None and 0 <= token < vocab_size]
    if isinstance(eos_token_id, Tensor):
        eos_token_id = eos_token_id.tolist()
    is_list = isinstance(eos_token_id, Iterable) and not isinstance(eos_token_id, str | bytes)
    ids: list[Any] = list(eos_token_id) if is_list else [eos_token_id]  # type: ignore[arg-type]
    for token in ids:
        if not _is_id(token) or not 0 <= token < vocab_size:
            raise GenerationError(
                f"eos_token_id has {token!r}; ids of this model are whole numbers from 0 to "
                f"{vocab_size - 1}, and None switches the end token off"
            )
    return [int(token) for token in ids]


def beginning(model: GPT2) -> int | None:
    """The token that a text begins with where nothing is given, or None if the model has none."""
    named = model.generation_config.get("bos_token_id")
    if named is None:
        named = model.config.bos_token_id
    # A small vocabulary under GPT-2's default of 50256 has no such token.
    return named if named is not None and 0 <= named < model.config.vocab_size else None


def _with_beginning(model: GPT2, input_ids: Any, mask: Any) -> tuple[Tensor, Any]:
    """Both arguments, or one column with the token that a text begins with if there are none."""
    rows, device = 1, model.device
    if input_ids is not None:
        input_ids = _tensor("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.shape[1] or not len(input_ids):
            return input_ids, mask
        rows, device = len(input_ids), input_ids.device
    mask = None if mask is None else _tensor("attention_mask", mask)
    if mask is not None and mask.numel():
        raise GenerationError(
            f"attention_mask has shape {tuple(mask.shape)}, and there are no input_ids for it"
        )
    first = beginning(model)
    if first is None:
        raise GenerationError(
            "input_ids is empty, and the model's configuration names no bos_token_id to begin with "
            "(or one that its vocabulary lacks): give at least one token, such as the end token"
        )
    return torch.full((rows, 1), first, dtype=torch.int64, device=device), None


def check_length(
    model: GPT2, tokens: int, new_tokens: int, name: str, max_length: int | None = None
) -> None:
    """Refuse a text that does not fit the model's positions.

    Args:
        model: what generates.
        tokens, new_tokens: number of tokens of the prompt, and to add.
        name: the prompt's name.
        max_length: the option that asks for so many, if it is not max_new_tokens.

    Raises:
        GenerationError: `tokens` + `new_tokens` exceed `n_positions`.
    """
    room = model.config.n_positions
    if tokens + new_tokens <= room:
        return
    if max_length is not None and tokens < room:
        way_out = f"pass max_length={room} or less"
    elif tokens < room:
        way_out = f"pass max_new_tokens={room - tokens} or less, or a shorter prompt"
    else:
        way_out = "shorten the prompt"
    raise GenerationError(
        f"{name} has {tokens} tokens and {new_tokens} new ones are asked for, "
        f"{tokens + new_tokens} together; the model has n_positions={room}: {way_out}"
    )


def _real_tokens(model: GPT2, input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each row's tokens without the masked ones."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise GenerationError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, time) with at least "
            "one token"
        )
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise GenerationError(f"input_ids has dtype {input_ids.dtype}; token ids are integers")
    rows = input_ids.tolist()
    if mask is not None:
        mask = _tensor("attention_mask", mask)
        if mask.shape != input_ids.shape:
            raise GenerationError(
                f"attention_mask has shape {tuple(mask.shape)}; it must be that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise GenerationError("attention_mask must hold 0 and 1 only")
        rows = [
            [token for token, real in zip(tokens, keep, strict=True) if real]
            for tokens, keep in zip(rows, mask.tolist(), strict=True)
        ]
    for index, tokens in enumerate(rows):
        if not tokens:
            first = beginning(model)
            if first is None:
                raise GenerationError(
                    f"row {index} of input_ids has no token that attention_mask keeps, and the "
                    "model's configuration names no bos_token_id to begin with: give it a token"
                )
            tokens.append(first)
        check_vocabulary(model, tokens, f"row {index} of input_ids")
    return rows


def check_vocabulary(
    model: GPT2 | PackedGPT2,
    tokens: Sequence[int],
    name: str,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        GenerationError: names the first of them, with its text if there is a `tokenizer`.
    """
    vocab_size = model.config.vocab_size
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return
    for token in tokens:
        if 0 <= token < vocab_size:
            continue
        if tokenizer is not None and token in tokenizer:
            raise GenerationError(
                f"{name} has the token {shown(tokenizer.decode([token]))} with the id {token}, "
                f"which was added to the tokenizer and not to the model, whose ids go from 0 to "
                f"{vocab_size - 1}: leave it out, or give the model more tokens "
                "(resize_token_embeddings) and train them"
            )
        raise GenerationError(
            f"{name} has the token id {token}; ids of this model go from 0 to "
            f"{vocab_size - 1}: is this the tokenizer that belongs to the model?"
        )


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value  # as_tensor would move it to torch's default device
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GenerationError(
            f"{name} is {value!r:.80}, which makes no tensor: pass a tensor (batch, time) of whole "
            "numbers, as in torch.tensor([tokenizer.encode(text)])"
        ) from error


def _is_id(token: object) -> bool:
    return isinstance(token, numbers.Integral) and not isinstance(token, bool)


def _padding(model: GPT2, ends: list[int], pad_token_id: int | None, num_beams: int) -> int:
    if pad_token_id is not None and not (_is_id(pad_token_id) and abs(pad_token_id) < 2**63):
        raise GenerationError(
            f"pad_token_id is {pad_token_id!r}; it must be a whole number of 64 bits, or None for "
            "the end token"
        )
    if pad_token_id is None:
        pad_token_id = model.generation_config.get("pad_token_id")
    # transformers' beam search treats a pad_token_id of 0 as not given.
    if pad_token_id is not None and not (pad_token_id == 0 and num_beams > 1 and ends):
        return int(pad_token_id)
    if ends:
        return ends[0]
    return model.config.eos_token_id or 0
