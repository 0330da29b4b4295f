"""GPT-2 (Radford et al., 2019): embeddings, pre-norm blocks, a tied output projection."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._system.doors import above
from .config import GPT2Config, as_config
from .nn import Block, LayerNorm, LinearCrossEntropy
from .nn.changes import weights_moved
from .nn.dropout import drop
from .nn.embedding import Embedding, table_of
from .nn.head import predict, reads_one_table, reads_projection
from .nn.initialization import Device, Dtype, reset
from .nn.inputs import check_held, given_tokens, kept_columns, mask_of_texts, place, predicted
from .nn.kv_cache import KVCache
from .nn.output import GPT2Output
from .nn.output_projection import OutputProjection, TiedOutputProjection, tie_untied
from .nn.past import Past, one_cache, opened
from .nn.stack import Record, may_cache, read, run_blocks
from .nn.vocabulary import resize_token_embeddings
from .ops.embedding import tied_embedding
from .ops.projection import linear


class GPT2(nn.Module):
    """GPT-2 with a language-model head.

    Its modules have the names of transformers' `GPT2LMHeadModel` and see the same tensors:
    hooks, parametrizations, and modules or a `forward` put in their place act in every pass and in
    every step of decoding. Weights are read without calling modules only where nothing can tell.

    Args:
        config: the shape; transformers' own is taken as well.
        device, dtype: of the parameters, which are initialized as transformers does. On device
            "meta" nothing is stored or drawn.

    `model.gradient_checkpointing = True` trades time for memory: each block's activations are
    recomputed in the backward pass (Chen et al., 2016).
    """

    def __init__(self, config: GPT2Config, device: Device = None, dtype: Dtype = None):
        super().__init__()
        config = as_config(config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.gradient_checkpointing = False
        self.generation_config: dict[str, Any] = {}
        """Content of generation_config.json, where the model was loaded with one."""
        std = config.initializer_range
        self.wte = Embedding(config.vocab_size, config.n_embd, std, **factory)
        self.wpe = Embedding(config.n_positions, config.n_embd, std, **factory)
        self.drop = nn.Dropout(config.embd_pdrop)
        mlp = config.inner_width, config.activation_function
        dropout, eps = (config.resid_pdrop, config.attn_pdrop), config.layer_norm_epsilon
        self.h = nn.ModuleList(
            Block(config.n_embd, config.n_head, *mlp, *dropout, scale, eps, **factory)
            for scale in map(config.attention_scale, range(config.n_layer))
        )
        for block in self.blocks:
            block.attn.c_attn.std = block.mlp.c_fc.std = std
            # Projections into the residual stream (Radford et al., 2019, section 2.3).
            block.attn.c_proj.std = block.mlp.c_proj.std = std / (2 * config.n_layer) ** 0.5
        self.ln_f = LayerNorm(config.n_embd, eps, **factory)
        self.lm_head: OutputProjection | TiedOutputProjection
        if config.tie_word_embeddings:
            self.lm_head = TiedOutputProjection(self)
        else:
            self.lm_head = OutputProjection(config.n_embd, config.vocab_size, std, **factory)
        self.loss = LinearCrossEntropy()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: N(0, initializer_range^2), biases zero; what is added to the residual
        stream is scaled by 1 / sqrt(2 * n_layer) (Radford et al., 2019, section 2.3)."""
        reset(self.wte, self.wpe)
        for block in self.blocks:
            reset(block.attn.c_attn, block.mlp.c_fc, block.attn.c_proj, block.mlp.c_proj)
            reset(block.ln_1, block.ln_2)
        reset(self.ln_f, self.lm_head)

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks, first to last."""
        return cast("list[Block]", list(self.h))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.parameters()).dtype

    @property
    def projection(self) -> Tensor:
        """(vocab, width) output projection: the token embedding where they are tied.

        Raises:
            ArgumentError: the module in the embedding's place does not hold exactly one such table.
        """
        if self.config.tie_word_embeddings:
            return table_of(self.wte, (self.config.vocab_size, self.config.n_embd))
        return self.lm_head.weight

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step for one token reads: all but tables used by row."""
        tables = [self.wpe] if self.config.tie_word_embeddings else [self.wpe, self.wte]
        looked_up = sum(p.nbytes for table in tables for p in table.parameters())
        return sum(p.nbytes for p in self.parameters()) - looked_up

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> GPT2Output | tuple[Any, ...]:
        """Logits and, with labels or targets, the loss.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, T), 1 where a token is real and 0 where it is padding; any pattern.
                Outputs at masked positions are unspecified. With a cache of P tokens it may be
                (B, P + T), and has to be with transformers' caches. Or (B, 1, T, P + T) of what
                each token sees: bool, or numbers that are added to the scores; torch's SDPA attends
                then, and a `KVCache` must be empty.
            position_ids: (B, T) or (T,) int64; defaults to 0 .. T - 1, or to what follows the
                tokens seen where a cache is given. Where they do not go up by one, without a mask
                and with use_cache=False, another text begins, which sees itself alone.
            labels: (B, T) int64; position t is trained to predict labels[:, t + 1]; -100 does not
                count.
            cache: the tokens before these; their keys and values are appended to it. A `KVCache`;
                a cache of transformers; or a tuple of (keys, values), (B, H, P, D), for each layer,
                which is left as it is.
            logits_to_keep: compute logits for the last so many positions only (0 means all), or
                for the positions of an index tensor.
            targets: (B, T) int64; position t is trained to predict targets[:, t]; -100 does not
                count. Give labels or targets, not both.
            inputs_embeds: (B, T, width) in place of `input_ids`, before positions are added.
            token_type_ids: (B, T) int64, whose rows of the token embedding are added.
            past_key_values: another name for `cache`.
            use_cache: True makes a `KVCache` where no cache is given; False returns none.
            output_hidden_states: return each block's input and the last layer norm's output, or
                those of some indices; None, here and next, means as the config says.
            output_attentions: return attention weights; attention is unfused then, since fused
                kernels never have them.
            return_dict: False returns a tuple of what is not None, in the output's order.

        Raises:
            ArgumentError, GenerationError: arguments that do not fit the model or each other.
        """
        tokens = given_tokens(self.config, input_ids, inputs_embeds, token_type_ids)
        wanted, columns = predicted(self.config, tokens, labels, targets)
        record = Record.of(self.config, output_hidden_states, output_attentions)
        past = opened(self.config, one_cache(cache, past_key_values), tokens.shape[0])
        if past is None and use_cache and may_cache(self):
            past = self.new_cache(tokens.shape[0])
        keeps_none = use_cache is False or (self.gradient_checkpointing and self.training)
        if keeps_none and past is None and attention_mask is None and position_ids is not None:
            attention_mask = mask_of_texts(position_ids)
        table = None
        if wanted is not None and past is None and reads_one_table(self, tokens):
            check_held(self.wte)
            placed = place(self.config, tokens, attention_mask, position_ids, None)
            ids = cast("Tensor", tokens.ids)
            x, table = tied_embedding(ids, placed.positions, self.wte.weight, self.wpe.weight)
            hidden = run_blocks(self, drop(self.drop, x), placed.mask, repeat(None), record)
        else:
            hidden = read(self, tokens, attention_mask, position_ids, past, record)
        output = predict(self, hidden, table, wanted, columns, kept_columns(logits_to_keep))
        if record is not None:
            output.hidden_states, output.attentions = record.with_last(hidden)
        if past is not None and use_cache is not False:
            output.past_key_values = past.result if isinstance(past, Past) else past
        return output.to_tuple() if return_dict is False else output

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """(B, T, width) output of the last layer normalization; arguments as in `forward`."""
        tokens = given_tokens(self.config, input_ids)
        past = opened(self.config, cache, tokens.shape[0])
        return read(self, tokens, attention_mask, position_ids, past)

    def project(self, hidden: Tensor) -> Tensor:
        """(..., width) hidden states -> (..., vocab) logits."""
        if reads_projection(self):
            return linear(hidden, self.projection)
        return self.lm_head(hidden)

    def _apply(self, fn: Any, recurse: bool = True) -> GPT2:
        super()._apply(fn, recurse)  # called by .to(), .cuda(), .half() and the like
        weights_moved(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        tie_untied(self)

    def new_cache(
        self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache; arguments as of `KVCache.of`; the dtype is the model's by default."""
        return KVCache.of(self.config, batch_size, max_length, dtype or self.dtype, self.device)

    def generate(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue each row; see `gpt2fast.inference.generation.generate` for the options."""
        generation = above("inference.generation")
        return generation.generate(self, input_ids, attention_mask, **options)

    def decode_step(
        self, tokens: Tensor, cache: KVCache, position_ids: Tensor | None = None
    ) -> Tensor:
        """Append one token to each row of a cache; returns the logits (B, vocab) of the next.

        Arguments as of `inference.engine.decode_step`.
        """
        return above("inference.engine").decode_step(self, tokens, cache, position_ids)

    def for_decoding(self) -> Any:
        """The form of this model that decodes fastest here; see `inference.engine.for_decoding`."""
        return above("inference.engine").for_decoding(self)

    def can_be_packed(self) -> bool:
        """True if there are kernels here that read packed weights of this model."""
        return above("inference.packing").can_be_packed(self)

    def pack(self, *, release: bool = False) -> Any:
        """A `PackedGPT2`: a copy for inference, its weights in the order of a step's reads.

        Args:
            release: free this model's parameters on the way, so that there is never more than one
                copy of them; only the result can be used then.

        Raises:
            ArgumentError: not on the CPU, or of another dtype than float32, bfloat16 and float16.
        """
        return above("inference.packing").pack(self, release=release)

    def quantize(self, scheme: str, *, release: bool = False, **options: Any) -> Any:
        """A `PackedGPT2`: a copy for inference with weights of 8 or 4 bits.

        Args:
            scheme: "int8" or "int4".
            release: free this model's parameters on the way; only the result can be used then.
            options: `calibration`, `group_size`, … of `gpt2fast.quantization.quantize_weights`.
        """
        return above("inference.packing").quantize(self, scheme, release=release, **options)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Embedding:
        """Change the number of tokens, in place; see `nn.vocabulary.resize_token_embeddings`."""
        return resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Load a checkpoint; see `gpt2fast.checkpoints.gpt2.from_pretrained` for the options."""
        return above("checkpoints.gpt2").from_pretrained(name_or_path, **options)

    @classmethod
    def from_hf(cls, model: Any) -> GPT2:
        """The model of transformers as a `GPT2` with its parameters; see `gpt2fast.hf.from_hf`."""
        return cast("GPT2", above("hf.conversion").from_hf(model))

    def to_hf(self) -> Any:
        """A `GPT2LMHeadModel` with these parameters; see `gpt2fast.hf.to_hf`."""
        return above("hf.conversion").to_hf(self)

    def save_pretrained(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Write a directory that transformers loads; see `checkpoints.saving.save_pretrained`."""
        above("checkpoints.saving").save_pretrained(self, directory, tokenizer)
