"""GPT-2 with packed weights, for inference only: as fast as memory can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._system.doors import above
from ..config import GPT2Config
from ..errors import ArgumentError, did_you_mean
from ..nn.inputs import (
    check_cache,
    check_inputs,
    check_positions,
    check_tokens,
    given_tokens,
    kept_columns,
    place,
    predicted,
)
from ..nn.kv_cache import KVCache
from ..nn.output import GPT2Output
from ..nn.plain import is_unwatched
from ..ops.packed import ModelShape, PackedWeights
from ..quantization.quantized import QuantizedWeights

# Tokens in one pass through the model; more would need more memory and be no faster.
_BLOCK = 512
# Products with float16 weights are float32's, and so are their keys and values.
_CACHE_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32,
}  # fmt: skip


class PackedGPT2(nn.Module):
    """A read-only GPT-2: `GPT2.pack` and `GPT2.quantize` make one.

    It has the forward pass, `generate` and `save_pretrained` of `GPT2`, without gradients. Logits
    are float32 whatever the weights are.

    Args:
        config: the shape.
        weights: packed.
        quantization: description of their quantization, without the matrices; None: unquantized.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: PackedWeights,
        quantization: QuantizedWeights | None = None,
    ):
        super().__init__()
        self.config = config
        self.weights = weights
        self.quantization = quantization
        self.generation_config: dict[str, Any] = {}
        """Content of generation_config.json, where the model was loaded with one."""
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weights.arena.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits."""
        return torch.float32

    @property
    def format(self) -> str:
        """The format of most weights: float32, bfloat16, float16, int8 or int4."""
        return self.weights.formats["h.0.attn.c_attn.weight"].name

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step for one token reads."""
        return self.weights.weight_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per parameter, including scales and what stays in float32."""
        return 8 * self.weights.arena.numel() / self.config.parameter_count

    def _apply(self, fn: Any, recurse: bool = True) -> PackedGPT2:
        """Called by .to(), .half(), .cuda() and the like: does nothing, or raises."""
        logits = torch.empty(0, dtype=self.dtype, device=self.device)
        moved = fn(logits)
        if moved.dtype != logits.dtype or moved.device != logits.device:
            raise ArgumentError(
                f"packed weights stay on {self.device} as {self.format}, with logits in "
                f"{self.dtype}; convert the GPT2 and pack it again, as in model.bfloat16().pack()"
            )
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Printed with the module's name."""
        return f"{self.format}, {self.bits_per_weight:.2f} bits per weight"

    def new_cache(
        self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for this model.

        Args:
            batch_size: rows.
            max_length: entries per row; None means `n_positions`.
            dtype: of keys and values: float32, bfloat16 or int8. None means that of float weights,
                float32 beside float16 and int8 beside quantized ones.
        """
        config = self.config
        if dtype is None:
            dtype = _CACHE_DTYPES.get(self.format, torch.int8)
            if dtype == torch.bfloat16 and config.head_dim % 2:
                dtype = torch.float32  # the kernels read bfloat16 in pairs
        return KVCache.of(config, batch_size, max_length, dtype, self.device)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> GPT2Output | tuple[Any, ...]:
        """Logits and, with labels or targets, the loss: arguments as in `GPT2.forward`.

        Nothing has a gradient. Logits at masked positions are zero. There are neither hidden states
        nor attention weights, whatever the config asks for.

        Args:
            others: what only `GPT2.forward` takes, which may be None or False here.

        Raises:
            ArgumentError: one of `others` is asked for, or the cache is no `KVCache`.
        """
        _refuse(others, cache)
        if input_ids is None:
            raise ArgumentError("a PackedGPT2 reads input_ids: none are given")
        tokens = given_tokens(self.config, input_ids)
        wanted, columns = predicted(self.config, tokens, labels, targets)
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ArgumentError(
                "a PackedGPT2 takes an attention_mask (rows, tokens), of padding alone: give one "
                "of four dimensions to the GPT2 that it was packed from"
            )
        check_inputs(self.config, tokens, attention_mask, cache)
        batch, time = input_ids.shape
        if cache is None:
            cache = self.new_cache(batch, time, torch.float32)
        placed = place(self.config, tokens, attention_mask, position_ids, cache)
        mask, positions, counts = placed.mask, placed.positions, placed.counts
        kept = torch.arange(time, device="cpu")
        if wanted is None:
            kept = kept[kept_columns(logits_to_keep)]
        real = torch.ones(batch, time, dtype=torch.bool, device="cpu") if mask is None else mask
        # Index of each kept position among the unmasked tokens.
        order = real.flatten().cumsum(0).view(batch, time)[:, kept] - 1
        shown = real[:, kept]
        found = self._run(
            input_ids.long()[real],
            positions[real],
            real.sum(1).tolist(),
            cache,
            order[shown],
        )
        logits = found.new_zeros(batch, len(kept), self.config.vocab_size)
        logits[shown] = found
        cache.advance(time, counts, positions[:, -1] + 1)
        loss = None
        if wanted is not None:
            predicting = logits[:, columns].flatten(0, 1)
            loss = F.cross_entropy(predicting, wanted.flatten(), ignore_index=-100)
        output = GPT2Output.computed(loss, logits)
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, counts: Sequence[int], offsets: Sequence[int], cache: KVCache | None
    ) -> Tensor:
        """Logits (B, V) after the newest tokens of each row.

        Args:
            tokens: (B, T) int64; row b's newest counts[b] columns are read.
            counts: tokens of each row, at least 1.
            offsets: position of each row's first token.
            cache: with B rows, which keeps what was read; None keeps nothing.
        """
        config = self.config
        longest = max(counts)
        if cache is None:
            cache = self.new_cache(len(tokens), longest)
        check_cache(config, cache, len(tokens))
        flat = torch.cat([row[len(row) - n :] for row, n in zip(tokens, counts, strict=True)])
        check_tokens(config, flat)
        positions = torch.cat(
            [torch.arange(at, at + n, device="cpu") for at, n in zip(offsets, counts, strict=True)]
        )
        check_positions(config, positions[:, None])
        each = None if min(counts) == longest else torch.tensor(counts, device="cpu")
        cache.reserve(longest, each)
        ends = torch.tensor(counts, device="cpu").cumsum(0)
        logits = self._run(flat, positions, counts, cache, ends - 1)
        cache.advance(longest, each, positions[ends - 1] + 1)
        return logits

    @torch.no_grad()
    def decode_step(
        self, tokens: Tensor, cache: KVCache, position_ids: Tensor | None = None
    ) -> Tensor:
        """Append one token to each row of a cache and return the logits of the next.

        Args:
            tokens: (B,) int64.
            cache: with B rows.
            position_ids: (B,) int64; defaults to what follows the tokens seen.

        Returns:
            (B, vocab) float32 logits.
        """
        positions = cache.positions if position_ids is None else position_ids
        check_tokens(self.config, tokens)
        check_positions(self.config, positions[:, None])
        check_cache(self.config, cache, len(tokens))
        cache.reserve(1)
        numbers = torch.arange(len(tokens) + 1, device="cpu")
        logits = ops.packed_step(
            self.weights,
            cache.k,
            cache.v,
            tokens.long(),
            positions,
            numbers,
            numbers[:-1],
            cache.lengths,
            numbers[:-1],
            k_scales=cache.k_scales,
            v_scales=cache.v_scales,
        )
        cache.advance(1, None, positions + 1)
        return logits

    @torch.no_grad()
    def decode_and_sample(
        self,
        tokens: Tensor,
        cache: KVCache,
        history: Tensor,
        uniform: Tensor | None = None,
        **choice: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append one token to each row of a cache and choose the next ones.

        Args:
            tokens: (B,) int64.
            cache: with B rows.
            history, uniform, choice: arguments of `ops.packed_next`.

        Returns:
            (B, vocab) float32 logits and (B,) int64 tokens.
        """
        check_cache(self.config, cache, len(tokens))
        cache.reserve(1)
        positions = cache.positions
        try:
            logits, chosen = ops.packed_next(
                self.weights,
                cache.k,
                cache.v,
                tokens.long(),
                positions,
                cache.lengths,
                history,
                uniform,
                k_scales=cache.k_scales,
                v_scales=cache.v_scales,
                **choice,
            )
        except ArgumentError:
            # The kernel checks every number itself; these errors say what to do.
            check_tokens(self.config, tokens)
            check_positions(self.config, positions[:, None])
            raise
        cache.advance(1, None, positions + 1)
        return logits, chosen

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue each row; see `gpt2fast.inference.generation.generate` for the options."""
        generation = above("inference.generation")
        return generation.generate(self, input_ids, attention_mask, **options)

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> None:
        """Refuse to resize, unlike `GPT2.resize_token_embeddings`.

        Args:
            arguments, options: those of that method.

        Raises:
            ArgumentError: always; packed weights can only be read.
        """
        raise ArgumentError(
            f"the vocabulary of packed weights ({self.format}) cannot be resized: resize the GPT2 "
            "that they were made of, and pack or quantize it again"
        )

    def for_decoding(self) -> PackedGPT2:
        """The form of this model that decodes fastest: this one.

        Raises:
            ArgumentError: a hook is on it, which decoding steps would not call.
        """
        if not is_unwatched(self, PackedGPT2):
            raise ArgumentError(
                "a hook or another forward is on this PackedGPT2, whose steps of decoding call no "
                "module: put it on the GPT2 that was packed, and generate with that"
            )
        return self

    def save_pretrained(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Write a directory that `from_pretrained` loads; see `checkpoints.saving.save_packed`."""
        above("checkpoints.saving").save_packed(self, directory, tokenizer)

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor,
        counts: Sequence[int],
        cache: KVCache,
        outputs: Tensor,
    ) -> Tensor:
        """Logits (P, V) after tokens[outputs]; row b reads counts[b] tokens."""
        found = []
        outputs, order = outputs.sort()
        for pieces in _blocks(counts):
            rows = torch.tensor([row for row, _, _, _ in pieces], device="cpu")
            sizes = torch.tensor([end - begin for _, begin, end, _ in pieces], device="cpu")
            first = pieces[0][3]
            last = first + int(sizes.sum())
            done = torch.tensor([begin for _, begin, _, _ in pieces], device="cpu")
            wanted = outputs[(outputs >= first) & (outputs < last)] - first
            logits = ops.packed_step(
                self.weights,
                cache.k,
                cache.v,
                tokens[first:last],
                positions[first:last],
                F.pad(sizes.cumsum(0), (1, 0)),
                rows,
                cache.lengths[rows] + done,
                wanted,
                k_scales=cache.k_scales,
                v_scales=cache.v_scales,
                # The one token that a cut may leave over is still a prompt's.
                singly=torch.tensor([counts[row] == 1 for row, _, _, _ in pieces], device="cpu"),
            )
            found.append(logits)
        if not found:  # every token is masked
            return torch.empty(0, self.config.vocab_size, dtype=torch.float32, device="cpu")
        return torch.cat(found)[order.argsort()]


def _blocks(counts: Sequence[int]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Rows' tokens in blocks of at most `_BLOCK`: (row, begin, end, place of begin among all)."""
    block: list[tuple[int, int, int, int]] = []
    place = size = 0
    for row, count in enumerate(counts):
        begin = 0
        while begin < count:
            end = min(count, begin + _BLOCK - size)
            block.append((row, begin, end, place))
            size += end - begin
            place += end - begin
            begin = end
            if size == _BLOCK:
                yield block
                block, size = [], 0
    if block:
        yield block


_OF_GPT2 = (
    *("inputs_embeds", "token_type_ids", "past_key_values", "use_cache"),
    *("output_hidden_states", "output_attentions"),
)
"""Arguments of `GPT2.forward` that packed weights have no answer to."""


def _refuse(others: Mapping[str, Any], cache: KVCache | None) -> None:
    """Refuse arguments that only a GPT2 takes, and caches that are not ours."""
    for name, value in others.items():
        if name not in _OF_GPT2:
            raise ArgumentError(f"forward has no argument {name}{did_you_mean(name, _OF_GPT2)}")
        if value is not None and value is not False:
            raise ArgumentError(
                f"a PackedGPT2 takes no {name}: it calls no module whose values it could give or "
                "take; call the GPT2 that it was packed from"
            )
    if cache is not None and not isinstance(cache, KVCache):
        raise ArgumentError(
            f"a PackedGPT2 takes a KVCache, which new_cache(rows) makes, not a "
            f"{type(cache).__name__}; a GPT2 takes transformers' caches"
        )


def model_shape(config: GPT2Config) -> ModelShape:
    """The shape of a model of this configuration, for the header of packed weights."""
    return ModelShape(
        config.n_head,
        config.n_embd,
        config.inner_width,
        config.vocab_size,
        config.n_positions,
        config.activation,
        config.layer_norm_epsilon,
        tuple(config.attention_scale(layer) for layer in range(config.n_layer)),
        config.tie_word_embeddings,
    )
