"""What a model is given: checked before it is used, with errors that say what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import GPT2Config
from ..errors import ArgumentError, GenerationError
from .kv_cache import KVCache


def check_inputs(config: GPT2Config, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Token ids (B, T) and their mask."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise GenerationError(
            f"input_ids must be (batch, time) with at least one token, not {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise GenerationError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids "
            f"{tuple(input_ids.shape)}"
        )
    check_tokens(config, input_ids)


def check_tokens(config: GPT2Config, tokens: Tensor) -> None:
    """Token ids of any shape lie in the vocabulary."""
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise GenerationError(f"token ids have dtype {tokens.dtype}; they are integers")
    if _is_readable(tokens) and tokens.numel():
        low, high = (int(bound) for bound in _values(tokens).aminmax())
        if low < 0 or high >= config.vocab_size:
            raise GenerationError(
                f"token id {low if low < 0 else high} is outside the vocabulary "
                f"0 .. {config.vocab_size - 1}; was the text encoded with this model's tokenizer?"
            )


def check_positions(config: GPT2Config, positions: Tensor) -> None:
    """Positions (..., T): not more than the model has, and in their range."""
    limit = config.n_positions
    if positions.shape[-1] > limit:
        raise GenerationError(
            f"{positions.shape[-1]} tokens exceed this model's n_positions={limit}; "
            "shorten the input"
        )
    if not _is_readable(positions) or not positions.numel():
        return
    low, high = (int(bound) for bound in _values(positions).aminmax())
    if low < 0 or high >= limit:
        raise GenerationError(
            f"position {low if low < 0 else high} is outside this model's 0 .. {limit - 1} "
            f"(n_positions={limit}); shorten the input or generate fewer tokens"
        )


def check_wanted(config: GPT2Config, name: str, wanted: Tensor, input_ids: Tensor) -> None:
    """Labels or targets: `name` says which."""
    if wanted.shape != input_ids.shape:
        raise ArgumentError(
            f"{name} {tuple(wanted.shape)} must have the shape of input_ids "
            f"{tuple(input_ids.shape)}"
        )
    if _is_readable(wanted) and wanted.numel():
        wanted = _values(wanted)
        high = int(wanted.max())
        low = int(wanted.where(wanted != -100, 0).min())
        if low < 0 or high >= config.vocab_size:
            raise ArgumentError(
                f"{name} hold {low if low < 0 else high}, which is neither a token id "
                f"0 .. {config.vocab_size - 1} nor -100 (does not count)"
            )


def check_cache(config: GPT2Config, cache: KVCache, rows: int) -> None:
    """A cache fits the model and has `rows` rows."""
    shape = (config.n_layer, rows, cache.max_length, config.n_head, config.head_dim)
    if cache.k.shape != shape:
        raise GenerationError(
            f"the cache has the shape {tuple(cache.k.shape)} and this call needs {shape} "
            "(layers, rows, length, heads, head size); model.new_cache(rows) makes one"
        )


def check_stream(x: Tensor, width: int) -> None:
    """A block's input: (batch, time, width)."""
    if x.dim() != 3 or x.shape[-1] != width:
        way_out = "; x[None] makes a batch of one sequence" if x.shape[1:] == (width,) else ""
        raise ArgumentError(
            f"x has the shape {tuple(x.shape)}; it must be (batch, time, width={width}){way_out}"
        )


def is_known_full(mask: Tensor) -> bool:
    """Whether a mask hides nothing, as far as that can be told for free."""
    return _is_readable(mask) and bool(_values(mask).all())


def _values(tensor: Tensor) -> Tensor:
    """Every sample's values where torch.func has batched them, which then show one sample alone."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _is_readable(tensor: Tensor) -> bool:
    """Whether looking at values is free: on the CPU, outside a traced program."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
